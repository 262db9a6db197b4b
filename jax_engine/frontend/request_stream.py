"""What `AsyncLLM` gives for a request: its outputs, as they come."""

import asyncio
from collections.abc import Callable
from typing import Self

from jax_engine.frontend.output_processor import RequestState
from jax_engine.outputs import RequestOutput


class RequestStream:
    """The outputs of one request, an async iterator. Mutable; owned by the `AsyncLLM`, iterated by one task.

    Outputs are made when they are asked for: what came since the last one is in the next, however slow the reader is.
    The iterator ends after the output that is `finished`, also when the request was aborted (finish reason "abort").

    Raises, while iterating:
        EngineDeadError: the engine core has died.
        QueueOverflowError: the core did not take this request, since too many are in flight.
        RequestFailedError: the core gave this request up.
    """

    def __init__(self, state: RequestState, abort: Callable[[], None]) -> None:
        self.replica = 0  # that it was sent to
        self._state = state
        self._abort = abort
        self._ready = asyncio.Event()
        self._error: RuntimeError | None = None
        self._ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            self._ended = True
            raise self._error
        output = self._state.take()
        self._ended = output.finished
        return output

    def abort(self) -> None:
        """Drop the request and free its pages at the next step; nothing happens when it has finished."""
        if self._error is None and not self._state.finished:
            self._abort()

    def wake(self) -> None:
        """There is an output to take. For the `AsyncLLM`."""
        if self._state.error is not None:
            self.fail(self._state.error)
        self._ready.set()

    def fail(self, error: RuntimeError) -> None:
        """End the stream with `error`. For the `AsyncLLM`."""
        self._error = error
        self._ready.set()
