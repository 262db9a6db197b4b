"""A front end's look at the engine core, shared by all who look at it."""

import asyncio
import time
from collections.abc import Callable

from jax_engine.core.core_client import EngineDeadError
from jax_engine.core.engine_view import EngineView
from jax_engine.core.messages import Inspect

PERIOD = 0.5  # seconds for which a view is good enough for the next one who asks


class ViewClient:
    """Asks the core how it is, once every PERIOD however many look. Mutable; owned by an `AsyncLLM`, in its event
    loop.
    """

    def __init__(self, send: Callable[[Inspect], None]) -> None:
        self._send = send
        self._latest: asyncio.Future[EngineView] | None = None
        self._asked_at = 0.0
        self._dead_reason: str | None = None

    async def latest(self) -> EngineView:
        """The engine as it was `PERIOD` ago at most; EngineDeadError once the core has died."""
        if self._dead_reason is not None:
            raise EngineDeadError(self._dead_reason)
        now = time.monotonic()
        if self._latest is None or (self._latest.done() and now - self._asked_at > PERIOD):
            self._latest = asyncio.get_running_loop().create_future()
            self._asked_at = now
            self._send(Inspect())
        return await asyncio.shield(self._latest)  # whoever leaves, others wait for it

    def take(self, view: EngineView) -> None:
        """Take what the core sends. For the `AsyncLLM`."""
        if self._latest is not None and not self._latest.done():
            self._latest.set_result(view)

    def fail(self, reason: str) -> None:
        """The core has died. For the `AsyncLLM`."""
        self._dead_reason = reason
        if self._latest is not None and not self._latest.done():
            self._latest.set_exception(EngineDeadError(reason))
            self._latest.exception()  # nobody may be waiting any more
