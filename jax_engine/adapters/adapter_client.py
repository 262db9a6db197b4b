"""A front end's view of the cores' adapters: which there are, and how they come and go."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from jax_engine.core.core_client import EngineDeadError
from jax_engine.core.messages import AdapterReply, LoadAdapter, ServedAdapters, UnloadAdapter
from jax_engine.lora_request import LoRARequest


class AdapterClient:
    """Asks the core of every replica for adapters. Mutable; owned by an `AsyncLLM`, in its event loop.

    `served` are those that clients of a server may name, whichever front end has listed them. The first replica keeps
    the list and gives the numbers; the others are told.
    """

    def __init__(
        self, served: Sequence[LoRARequest], sends: Sequence[Callable[[LoadAdapter | UnloadAdapter], None]]
    ) -> None:
        self.served = tuple(served)
        self._sends = sends
        self._loaded = set(served)  # that the cores have taken
        self._replies: list[deque[asyncio.Future[str | None]]] = [deque() for _ in sends]  # in the order asked

    async def add(self, lora: LoRARequest) -> None:
        """Have an adapter in the cores' host memory; ValueError when it cannot be used."""
        if lora not in self._loaded:
            await self._load(lora, range(len(self._sends)))
            self._loaded.add(lora)

    async def serve(self, lora_name: str, lora_path: str) -> None:
        """List an adapter among those `served`, under a number that the first core gives it.

        ValueError when it cannot be used, or its name is taken.
        """
        error = await self._ask(0, LoadAdapter(LoRARequest(lora_name, 1, lora_path), served=True))
        if error is not None:
            raise ValueError(error)
        for lora in self.served:
            if lora.lora_name == lora_name:
                await self._load(lora, range(1, len(self._sends)))

    async def remove(self, lora_int_id: int) -> None:
        """Let go of the adapter of a number; requests that have it keep it. ValueError when no core has one."""
        self._loaded = {lora for lora in self._loaded if lora.lora_int_id != lora_int_id}
        unload = UnloadAdapter(lora_int_id)
        errors = await asyncio.gather(*(self._ask(replica, unload) for replica in range(len(self._sends))))
        if all(errors):
            raise ValueError(errors[0])

    def take(self, replica: int, event: AdapterReply | ServedAdapters) -> None:
        """Take what a core sends. For the `AsyncLLM`."""
        if isinstance(event, AdapterReply):
            if not (reply := self._replies[replica].popleft()).cancelled():
                reply.set_result(event.error)
        elif replica == 0:
            self.served = event.adapters
            self._loaded |= set(event.adapters)

    def fail(self, reason: str) -> None:
        """A core has died. For the `AsyncLLM`."""
        for replies in self._replies:
            for reply in replies:
                if not reply.cancelled():
                    reply.set_exception(EngineDeadError(reason))
            replies.clear()

    async def _load(self, lora: LoRARequest, replicas: Sequence[int]) -> None:
        """Have it in all of `replicas`, or, with a ValueError, nowhere."""
        errors = await asyncio.gather(*(self._ask(replica, LoadAdapter(lora)) for replica in replicas))
        found = [error for error in errors if error is not None]
        if found:
            if len(found) < len(self._sends):
                await self.remove(lora.lora_int_id)
            raise ValueError(found[0])

    async def _ask(self, replica: int, command: LoadAdapter | UnloadAdapter) -> str | None:
        """What a core says was wrong, or None."""
        reply: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._replies[replica].append(reply)
        self._sends[replica](command)
        return await reply
