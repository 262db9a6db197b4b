"""Responses that clients may come back to, in this process's memory."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.types import Message

from jax_engine.server.errors import ApiError, unavailable
from jax_engine.server.openai.frames import encode_json
from jax_engine.server.responses.answers import LiveResponse
from jax_engine.server.responses.items import Item

RETRY_AFTER = 1  # seconds


class EventLog:
    """The events of a response that is made in the background, for whoever follows it. Mutable; owned by its `Stored`.

    Its `send` is the end of an ASGI application that writes server-sent events.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._events: list[bytes] = []
        self._ended = False
        self._changed = asyncio.Event()

    async def send(self, message: Message) -> None:
        """Take what a stream writes."""
        if message["type"] == "http.response.body":
            self.append(message["body"], more=message.get("more_body", False))

    def append(self, data: bytes, *, more: bool) -> None:
        """Whole events, and whether others follow."""
        self.num_bytes += len(data)
        self._events += [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
        self._ended = not more
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int) -> AsyncIterator[bytes]:
        """The events from number `start` on, as many at once as there are, until the last."""
        while True:
            if start < len(self._events):
                yield b"".join(self._events[start:])
                start = len(self._events)
            elif self._ended:
                return
            else:
                await self._changed.wait()


class Stored:
    """One response and what it answers. Mutable; owned by the `ResponseStore`."""

    def __init__(self, live: LiveResponse, items: bytes) -> None:
        self.items = items  # the input items, JSON; those of the responses before it among them
        self.log: EventLog | None = None
        self.task: asyncio.Task[None] | None = None  # that makes it, in the background
        self.num_bytes = 0  # that the store counts for it
        self._live: LiveResponse | None = live
        self._content = b""

    @property
    def content(self) -> bytes:
        """The response object, JSON, as far as it has got."""
        if self._live is None:
            return self._content
        content = encode_json(self._live.content())
        if self._live.has_ended:
            self._live, self._content = None, content
        return content

    @property
    def is_running(self) -> bool:
        """Whether it is still being made."""
        return self._live is not None and not self._live.has_ended

    async def cancel(self) -> None:
        """End its making, if it is being made."""
        if self.task is not None and self.is_running:
            self.task.cancel()
            await asyncio.wait({self.task})

    def conversation(self) -> list[dict[str, Any]]:
        """Its input and its output, which a next turn continues."""
        return [*msgspec.json.decode(self.items), *msgspec.json.decode(self.content)["output"]]


class ResponseStore:
    """The responses used last, as many as there is room for; one that is being made stays.

    Mutable; owned by the routes.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` in bytes; 0 keeps nothing."""
        self._capacity = capacity
        self._size = 0
        self._responses: OrderedDict[str, Stored] = OrderedDict()

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    def keep(self, live: LiveResponse, items: Sequence[Item]) -> Stored:
        """Keep a response, which may still be made; `count` it again when it has ended.

        Raises:
            ApiError: 503, when those that are being made leave no room for another.
        """
        stored = self._responses[live.response_id] = Stored(live, encode_json(items))
        self.count(stored)
        if self._size > self._capacity and stored.is_running:
            self._forget(live.response_id)
            message = "too many responses are being made in the background; wait until some have ended"
            raise unavailable(message, code="background_overflow", retry_after=RETRY_AFTER)
        return stored

    def count(self, stored: Stored) -> None:
        """See how much room a response takes, and forget those used longest ago for it."""
        log_bytes = stored.log.num_bytes if stored.log else 0
        size = len(stored.content) + len(stored.items) + log_bytes
        self._size += size - stored.num_bytes
        stored.num_bytes = size
        for response_id, oldest in list(self._responses.items()):
            if self._size <= self._capacity:
                return
            if not oldest.is_running:
                self._forget(response_id)

    def get(self, response_id: str) -> Stored:
        """A response, which counts as used; ApiError 404 for one that is not here, or not any more."""
        stored = self._responses.get(response_id)
        if stored is None:
            message = f"there is no response {response_id!r}: it was not stored, or newer ones have taken its place"
            raise ApiError(404, message, param="response_id", code="response_not_found")
        self._responses.move_to_end(response_id)
        return stored

    def remove(self, response_id: str) -> Stored:
        """Forget a response; ApiError 404 for one that is not here."""
        stored = self.get(response_id)
        self._forget(response_id)
        return stored

    async def close(self) -> None:
        """End what is still being made."""
        tasks = [stored.task for stored in self._responses.values() if stored.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _forget(self, response_id: str) -> None:
        self._size -= self._responses.pop(response_id).num_bytes
