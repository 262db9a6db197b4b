"""A front end's view of the core's adapters: which there are, and how they come and go."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from jax_engine.core_client import EngineDeadError
from jax_engine.lora_request import LoRARequest
from jax_engine.messages import AdapterReply, LoadAdapter, ServedAdapters, UnloadAdapter


class AdapterClient:
    """Asks the core for adapters. Mutable; owned by an `AsyncLLM`, in its event loop.

    `served` are those that clients of a server may name, whichever front end has listed them.
    """

    def __init__(self, served: Sequence[LoRARequest], send: Callable[[LoadAdapter | UnloadAdapter], None]) -> None:
        self.served = tuple(served)
        self._send = send
        self._loaded = set(served)  # that the core has taken
        self._replies: deque[asyncio.Future[str | None]] = deque()  # in the order asked

    async def add(self, lora: LoRARequest) -> None:
        """Have an adapter in the core's host memory; ValueError when it cannot be used."""
        if lora not in self._loaded:
            await self._ask(LoadAdapter(lora))
            self._loaded.add(lora)

    async def serve(self, lora_name: str, lora_path: str) -> None:
        """List an adapter among those `served`, under a number that the core gives it.

        ValueError when it cannot be used, or its name is taken.
        """
        await self._ask(LoadAdapter(LoRARequest(lora_name, 1, lora_path), served=True))

    async def remove(self, lora_int_id: int) -> None:
        """Let go of the adapter of a number; requests that have it keep it. ValueError when there is none."""
        self._loaded = {lora for lora in self._loaded if lora.lora_int_id != lora_int_id}
        await self._ask(UnloadAdapter(lora_int_id))

    def take(self, event: AdapterReply | ServedAdapters) -> None:
        """Take what the core sends. For the `AsyncLLM`."""
        if isinstance(event, ServedAdapters):
            self.served = event.adapters
            self._loaded |= set(event.adapters)
        elif not (reply := self._replies.popleft()).cancelled():
            reply.set_result(event.error)

    def fail(self, reason: str) -> None:
        """The core has died. For the `AsyncLLM`."""
        for reply in self._replies:
            if not reply.cancelled():
                reply.set_exception(EngineDeadError(reason))
        self._replies.clear()

    async def _ask(self, command: LoadAdapter | UnloadAdapter) -> None:
        reply: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        self._send(command)
        if (error := await reply) is not None:
            raise ValueError(error)
