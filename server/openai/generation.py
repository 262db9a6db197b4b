"""From a checked request to the engine and back: one JSON answer, or a stream of frames."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from msgspec.structs import replace
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jax_engine.core.core_client import EngineDeadError
from jax_engine.frontend.beam_search import BeamSearchParams
from jax_engine.frontend.beam_stream import BeamStream
from jax_engine.frontend.output_processor import EngineAsleepError, QueueOverflowError, RequestFailedError
from jax_engine.frontend.processor import PreparedRequest, Prompt
from jax_engine.frontend.request_stream import RequestStream
from jax_engine.outputs import CompletionOutput, RequestOutput
from jax_engine.pooling_params import RequestParams
from jax_engine.sampling_params import SamplingParams
from jax_engine.server.errors import ApiError, bad_request, unavailable
from jax_engine.server.gate import shutting_down
from jax_engine.server.in_flight import ShuttingDownError
from jax_engine.server.openai.answers import Answers
from jax_engine.server.openai.frames import Frames, Piece
from jax_engine.server.service import Service
from jax_engine.server.tracking import PromptTracker, RequestRecord

# Caches must not keep a stream, and nginx must not hold it back.
STREAM_HEADERS = ((b"cache-control", b"no-store"), (b"x-accel-buffering", b"no"))

RETRY_AFTER = 1  # seconds; a queue that is full has a place free about as often as a sequence ends
RETRY_WHEN_AWAKE = 10  # seconds; who put the engine to sleep decides


class PromptStream:
    """A stream's outputs without what follows their prompts: no text, no tokens to count, and not why that ended."""

    def __init__(self, stream: RequestStream) -> None:
        self._stream = stream

    @property
    def replica(self) -> int:
        return self._stream.replica

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        output = await anext(self._stream)
        return replace(output, outputs=[self._bare(completion) for completion in output.outputs])

    def abort(self) -> None:
        self._stream.abort()

    def _bare(self, completion: CompletionOutput) -> CompletionOutput:
        reason = "length" if completion.finish_reason == "stop" else completion.finish_reason
        nothing = {"text": "", "token_ids": [], "logprobs": completion.logprobs and []}
        return replace(completion, finish_reason=reason, stop_reason=None, **nothing)


Stream = RequestStream | BeamStream | PromptStream


@dataclass(frozen=True)
class Generation:
    """The prompts of one HTTP request, running in the engine; one stream and one tracker for each."""

    streams: Sequence[Stream]
    trackers: list[PromptTracker]
    completions_each: int

    def close(self) -> None:
        """Abort what still runs, which frees its pages at the next step."""
        for stream, tracker in zip(self.streams, self.trackers, strict=True):
            stream.abort()
            tracker.close()

    async def results(self) -> list[RequestOutput]:
        """The finished output of each prompt, in order."""
        finished = []
        for stream, tracker in zip(self.streams, self.trackers, strict=True):
            async for output in stream:
                tracker.take(output)
            finished.append(output)
        return finished

    async def batches(self) -> AsyncGenerator[list[tuple[int, RequestOutput]], None]:
        """(number of the prompt, output) for all that is there at once, until every prompt has ended."""
        if len(self.streams) == 1:
            async for output in self.streams[0]:
                yield [(0, output)]
            return
        # One output of each prompt at most is taken ahead: a slow client holds the rest back in the engine's streams,
        # where outputs that nobody has taken yet become one.
        waiting = {_next_output(stream): number for number, stream in enumerate(self.streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                batch = [(waiting.pop(task), task.result()) for task in done]
                for number, output in batch:
                    if not output.finished:
                        waiting[_next_output(self.streams[number])] = number
                yield sorted(batch, key=lambda pair: pair[0])
        finally:
            for task in waiting:
                task.cancel()


def _next_output(stream: Stream) -> "asyncio.Task[RequestOutput]":
    return asyncio.ensure_future(anext(stream))


@asynccontextmanager
async def generation(
    service: Service,
    record: RequestRecord,
    prompts: Sequence[Prompt],
    params: RequestParams,
    receive: Receive,
    *,
    priority: int,
    beams: BeamSearchParams | None = None,
    prompt_only: bool = False,
) -> AsyncIterator[Generation]:
    """Run the prompts, or search from them with `beams`, or with `prompt_only` run them without showing what follows;
    when the block is left, whatever the reason, what still runs is aborted.

    Raises:
        ApiError: 400 for a bad prompt or parameter, before anything runs; 503 when the engine is not there or asleep,
            or all of its queue is taken.
        ClientGoneError, ShuttingDownError: see `InFlight.track`.
    """
    engine, lora = service.engine(), record.adapter
    streams: list[Stream] = []
    running = Generation(streams, [], completions_each=params.n)
    record.trackers = running.trackers
    try:
        async with service.in_flight.track(receive):
            prepared: list[PreparedRequest] = []
            for number, prompt in enumerate(prompts):
                # The client may send one request id twice; the engine's ids must differ.
                engine_id = f"{record.request_id}-{uuid.uuid4().hex[:12]}"
                try:
                    if beams is None:
                        prepared.append(await engine.prepare(engine_id, prompt, params, lora, priority=priority))
                    else:
                        search = await engine.prepare_beam_search(engine_id, prompt, beams, lora, priority=priority)
                        streams.append(search)
                except ValueError as error:
                    if beams is not None:
                        error = ValueError(str(error).replace("beam_width=", "n="))
                    raise bad_request(error, prefix=f"prompt {number}: " if len(prompts) > 1 else "") from None
            try:
                added = engine.add_prepared(prepared) if beams is None else []
                streams.extend(map(PromptStream, added) if prompt_only else added)
            except ValueError as error:
                raise bad_request(error) from None
            running.trackers.extend(
                PromptTracker(service.metrics, params, record.counter, stream) for stream in streams
            )
            yield running
    except EngineDeadError as error:
        raise unavailable(f"the engine has died: {error}", code="engine_dead") from None
    except (QueueOverflowError, EngineAsleepError) as error:
        for tracker in running.trackers:
            tracker.refuse()
        raise not_taken(error) from None
    except RequestFailedError as error:
        raise ApiError(500, str(error), code="request_failed") from None
    finally:
        running.close()


def not_taken(error: QueueOverflowError | EngineAsleepError) -> ApiError:
    """The answer to a request that did not enter the engine.

    503 and not 429: the server is busy, whoever asks. Clients repeat both; to a load balancer a 503 is the reason to
    try another replica.
    """
    if isinstance(error, EngineAsleepError):
        return unavailable(str(error), code="engine_asleep", retry_after=RETRY_WHEN_AWAKE)
    return unavailable(str(error), code="queue_overflow", retry_after=RETRY_AFTER)


class GenerationStream(Response):
    """A streamed answer. It begins with the first output, so that what fails before still gets a proper status."""

    def __init__(
        self,
        service: Service,
        record: RequestRecord,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        frames: Frames,
        answers: Answers,
        *,
        priority: int,
        beams: BeamSearchParams | None = None,
        prompt_only: bool = False,
    ) -> None:
        super().__init__(media_type=frames.media_type)
        self._service = service
        self._record = record
        self._prompts = prompts
        self._params = params
        self._options: dict[str, Any] = {"priority": priority, "beams": beams, "prompt_only": prompt_only}
        self._frames = frames
        self._answers = answers
        self._started: set[int] = set()  # completions that have begun
        self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with (
                generation(
                    self._service, self._record, self._prompts, self._params, receive, **self._options
                ) as running,
                aclosing(running.batches()) as batches,
            ):
                async for batch in batches:
                    await self._send(send, b"".join(self._written(running, batch)))
        except (ApiError, ShuttingDownError) as error:
            if not self._sending:
                raise
            refusal = error if isinstance(error, ApiError) else shutting_down()
            self._record.note = refusal.code
            await self._send(send, self._frames.error(refusal), more=False)
        else:
            await self._send(send, self._frames.end(self._record.usage()), more=False)

    def _written(self, running: Generation, batch: list[tuple[int, RequestOutput]]) -> Iterator[bytes]:
        """The frames of all outputs that are ready: they go out in one write."""
        frames, answers = self._frames, self._answers
        for number, output in batch:
            running.trackers[number].take(output)
            for completion in output.outputs:
                index = number * running.completions_each + completion.index
                if index not in self._started:
                    self._started.add(index)
                    yield frames.start(index, answers.of_prompt(output))
                text = answers.text(index, output, completion)
                logprobs, fields = answers.logprobs(index, output, completion), answers.fields(completion)
                piece = Piece(index, text, logprobs, fields, completion.finish_reason, completion.stop_reason)
                if text or not piece.is_plain:
                    yield frames.write(piece)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        if not self._sending:
            self._sending = True
            headers = [(b"content-type", self._frames.media_type.encode()), *STREAM_HEADERS]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        if data or not more:
            await send({"type": "http.response.body", "body": data, "more_body": more})
