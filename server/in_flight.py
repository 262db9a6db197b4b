"""Requests being answered, each of which ends early when its client leaves or when the server stops waiting for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from jax_engine.server.cells import Cells


class ClientGoneError(Exception):
    """The client closed its connection; nobody is there to answer."""


class ShuttingDownError(Exception):
    """The server's grace period is over."""


class InFlight:
    """The tasks that wait for the engine. Mutable; owned by the `Service`."""

    def __init__(self, load: Cells) -> None:
        """How many there are is counted in `load`, which has room for one number."""
        self._load = load
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopped = False

    @property
    def num_in_all(self) -> int:
        """How many all front ends are answering."""
        return int(self._load.total(0))

    def stop(self) -> None:
        """End all of them now, and each that comes later at once."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def track(self, receive: Receive) -> AsyncIterator[None]:
        """Run a block that may be ended from outside. The request's body must have been read.

        Raises, inside the block's await and out of this:
            ClientGoneError: the client closed its connection.
            ShuttingDownError: `stop` was called.
        """
        if self._stopped:
            raise ShuttingDownError
        task = asyncio.current_task()
        assert task is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        self._tasks.add(task)
        self._load.own[0] += 1
        try:
            yield
        except asyncio.CancelledError:
            if not gone and not self._stopped:
                raise
            task.uncancel()
            raise (ClientGoneError if gone else ShuttingDownError) from None
        finally:
            self._tasks.discard(task)
            self._load.own[0] -= 1
            watcher.cancel()
