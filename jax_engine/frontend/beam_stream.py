"""A beam search over an `AsyncLLM`, as a stream of one output."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from jax_engine.frontend.beam_run import BeamRun
from jax_engine.frontend.output_processor import RequestFailedError
from jax_engine.frontend.processor import PreparedRequest
from jax_engine.outputs import RequestOutput

if TYPE_CHECKING:
    from jax_engine.frontend.request_stream import RequestStream


class BeamStream:
    """The output of one search, an async iterator that gives it once, when it is complete, or, aborted, never. Mutable;
    owned and iterated by one task.

    Raises, while iterating, what a `RequestStream` does: any step of the search may find the engine dead, or its queue
    full.
    """

    def __init__(self, run: BeamRun, add: "Callable[[Sequence[PreparedRequest]], list[RequestStream]]") -> None:
        self._run = run
        self._add = add
        self._streams: list[RequestStream] = []  # of the step that the search is at
        self._ended = False

    @property
    def replica(self) -> int:
        """That the latest step was sent to."""
        return self._streams[0].replica if self._streams else 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        while not (self._run.done or self._ended):
            self._streams = self._add(self._run.requests())
            try:
                outputs = [await anext(stream) for stream in self._streams]
                if any(output.outputs[0].finish_reason == "abort" for output in outputs) and not self._ended:
                    raise RequestFailedError("the search was aborted")
                self._run.advance(outputs)
            except BaseException:
                self.abort()
                raise
        if self._ended:
            raise StopAsyncIteration
        self._ended = True
        return self._run.output()

    def abort(self) -> None:
        """Drop what runs of the search."""
        self._ended = True
        for stream in self._streams:
            stream.abort()
