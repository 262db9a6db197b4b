"""What the engine core sends, turned into what the user gets: text, stop strings, the completions of a prompt."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jax_engine.core.messages import CoreOutput, TokenLogprobs
from jax_engine.frontend.detokenizer import IncrementalDetokenizer, StopMatcher, StopStrings
from jax_engine.frontend.processor import PreparedRequest
from jax_engine.frontend.token_texts import TokenTexts
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.outputs import CompletionOutput, Logprob, LogprobsAtPosition, RequestMetrics, RequestOutput
from jax_engine.sampling_params import RequestOutputKind, SamplingParams


class RequestFailedError(RuntimeError):
    """The engine core gave up one request; the others go on. The message says why."""


class QueueOverflowError(RuntimeError):
    """As many sequences as `max_num_queued_reqs` allows are in flight: the request was refused before it entered. It
    may be sent again.
    """


class EngineAsleepError(RuntimeError):
    """The engine has given up its memory (`sleep`): the request was refused. It may be sent again once it is awake."""


# By the finish reason of requests that the core did not take.
REFUSALS: Mapping[str, type[RuntimeError]] = MappingProxyType(
    {"refused": QueueOverflowError, "asleep": EngineAsleepError}
)


class LogprobRecord:
    """The log-probabilities of a growing sequence's tokens, as the user gets them. Mutable; owned by a `Completion`."""

    def __init__(self, texts: TokenTexts) -> None:
        self.positions: list[LogprobsAtPosition] = []  # with deltas, those that no output had yet
        self.cumulative = 0.0
        self._texts = texts

    def append(self, position: TokenLogprobs) -> None:
        self.cumulative += position.logprobs[0]
        self.positions.append(by_token(position, self._texts))


def by_token(position: TokenLogprobs, texts: TokenTexts) -> LogprobsAtPosition:
    """vLLM's dictionary: the position's own token first, which may be one of the likeliest."""
    ranks = (position.rank, *range(1, len(position.token_ids)))
    return {
        token: Logprob(logprob, rank, texts.text(token))
        for token, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True)
    }


class Completion:
    """One completion as it grows. Mutable; owned by its `RequestState`.

    Without stop strings nothing depends on the text until somebody looks, so tokens are only put aside as they come
    and decoded together when an output is taken.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        detokenizer: IncrementalDetokenizer,
        stops: StopStrings | None,
        texts: TokenTexts,
    ) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.num_tokens = 0
        self.changed = False  # since the latest output was taken
        self._params = params
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops, include_stop_string=params.include_stop_str_in_output) if stops else None
        self._token_ids: list[int] = []  # all so far; with DELTA, those that no output had yet
        self._text: list[str] = []  # pieces of the text, likewise
        self._undecoded: list[int] = []
        self._logprobs = LogprobRecord(texts) if params.logprobs is not None else None

    def extend(self, output: CoreOutput) -> bool:
        """Take the core's new tokens; returns whether a stop string ended a sequence that the core would go on with."""
        self.changed = True
        if self._matcher is None:
            self._append(output.new_token_ids, output.logprobs)
        else:
            for position, token in enumerate(output.new_token_ids):
                self._append([token], output.logprobs and output.logprobs[position : position + 1])
                if self._is_hidden(output, position):
                    continue
                if self._match(self._matcher, self._decode_pending()):
                    return output.finish_reason is None
        if output.finish_reason is not None:
            if output.new_token_ids and self._is_hidden(output, len(output.new_token_ids) - 1):
                self._undecoded.pop()
            self.finish(output.finish_reason, output.stop_reason)
        return False

    def finish(self, reason: str, stop_reason: int | None = None) -> None:
        """End the sequence, and let go of the text that was held back."""
        self.changed = True
        self.finish_reason = reason
        self.stop_reason = "repetition_detected" if reason == "repetition" else stop_reason
        rest = self._decode_pending() + self._detokenizer.flush()
        if self._matcher is None:
            self._text.append(rest)
        elif not self._match(self._matcher, rest):
            self._text.append(self._matcher.flush())

    def take(self, kind: RequestOutputKind) -> CompletionOutput:
        """The completion so far; with DELTA, what is new since the last call."""
        self.changed = False
        if self._matcher is None and self._undecoded:
            self._text.append(self._decode_pending())
        text, token_ids, record = "".join(self._text), self._token_ids, self._logprobs
        logprobs = record.positions if record else None
        if kind is RequestOutputKind.DELTA:
            self._text, self._token_ids = [], []
            if record:
                record.positions = []
        else:
            self._text, token_ids = [text], token_ids.copy()
            logprobs = logprobs and logprobs.copy()
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=record.cumulative if record else None,
            logprobs=logprobs,
        )

    def _append(self, token_ids: list[int], logprobs: list[TokenLogprobs] | None) -> None:
        if self._logprobs is not None:
            assert len(logprobs or ()) == len(token_ids), "each token comes with the log-probabilities asked for"
            for position in logprobs or ():
                self._logprobs.append(position)
        self._token_ids += token_ids
        self._undecoded += token_ids
        self.num_tokens += len(token_ids)

    def _is_hidden(self, output: CoreOutput, position: int) -> bool:
        """Whether this token ended the sequence (end of sequence, stop id): it is output, but its text is not."""
        last = position == len(output.new_token_ids) - 1
        return last and output.finish_reason == "stop" and not self._params.include_stop_str_in_output

    def _decode_pending(self) -> str:
        pending, self._undecoded = self._undecoded, []
        return self._detokenizer.push(pending)

    def _match(self, matcher: StopMatcher, new: str) -> bool:
        """Add text that may be shown; returns whether a stop string ended the sequence.

        The text of the first `min_tokens` tokens ends none.
        """
        shown, found = matcher.push(new, armed=self.num_tokens > self._params.min_tokens)
        self._text.append(shown)
        if found is None:
            return False
        self.finish_reason, self.stop_reason = "stop", found
        return True


class RequestState:
    """One live request: its prompt and its completions. Mutable; owned by the `OutputProcessor`."""

    def __init__(self, request: PreparedRequest, tokenizer: Tokenizer, texts: TokenTexts) -> None:
        params = request.params
        stops = StopStrings(params.stop_strings) if params.stop_strings else None
        self.request = request
        self.error: RuntimeError | None = None  # why the core gave it up or did not take it
        self.changed = False  # has an output that was not taken
        self.finished = False  # every completion has ended
        self.completions = [
            Completion(
                index,
                params,
                IncrementalDetokenizer(
                    tokenizer,
                    skip_special_tokens=params.skip_special_tokens,
                    spaces_between_special_tokens=params.spaces_between_special_tokens,
                    prompt_token_ids=request.prompt_token_ids,
                ),
                stops,
                texts,
            )
            for index in range(params.n)
        ]
        self._texts = texts
        self._prompt_logprobs: list[LogprobsAtPosition | None] | None = None  # with deltas, until they were taken
        self._pooled: bytes | None = None
        self._num_cached_tokens = 0
        self._first_scheduled_time: float | None = None
        self._first_token_time: float | None = None
        self._last_token_time: float | None = None
        self._num_preemptions: dict[str, int] = {}

    @property
    def num_tokens(self) -> int:
        """Generated so far, all completions together."""
        return sum(completion.num_tokens for completion in self.completions)

    def record(self, output: CoreOutput, completion: Completion, now: float) -> None:
        """Keep the figures that go into the metrics."""
        if output.new_token_ids:
            self._first_token_time = self._first_token_time or now
            self._last_token_time = now
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = [None, *(by_token(position, self._texts) for position in output.prompt_logprobs)]
        self._pooled = self._pooled or output.pooled
        self._first_scheduled_time = self._first_scheduled_time or output.first_scheduled_time
        if completion.index == 0:  # the others may find what this one has computed
            self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        if output.num_preemptions:
            self._num_preemptions[output.request_id] = output.num_preemptions

    def take(self) -> RequestOutput:
        """The output that is due, by the request's `output_kind`: everything so far, or what nobody has taken yet."""
        self.changed = False
        request = self.request
        kind = request.params.output_kind
        delta = kind is RequestOutputKind.DELTA
        prompt_logprobs = self._prompt_logprobs
        if delta:
            self._prompt_logprobs = None
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[c.take(kind) for c in self.completions if c.changed or not delta],
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_time=request.arrival_time,
                first_scheduled_time=self._first_scheduled_time,
                first_token_time=self._first_token_time,
                last_token_time=self._last_token_time,
                num_preemptions=sum(self._num_preemptions.values()),
            ),
            num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
            pooled=self._pooled,
        )


@dataclass(frozen=True)
class Processed:
    """What one engine step changed."""

    changed: list[RequestState]  # those that finished, or have an output to take and had none before the step
    stopped: list[str]  # sequences that a stop string ended, by their core ids: the core must be told to drop them


class OutputProcessor:
    """All live requests of one engine. Mutable; owned by one `LLM` or `AsyncLLM` and used from one thread at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.texts = TokenTexts(tokenizer)
        self._tokenizer = tokenizer
        self._requests: dict[str, RequestState] = {}
        self._sequences: dict[str, tuple[RequestState, Completion]] = {}

    @property
    def num_requests(self) -> int:
        """Requests that are not finished."""
        return len(self._requests)

    def request_ids(self) -> list[str]:
        return list(self._requests)

    def add(self, request: PreparedRequest) -> RequestState:
        """Expect output for `request`.

        Raises:
            ValueError: a live request has the same id.
        """
        if request.request_id in self._requests:
            raise ValueError(f"request_id={request.request_id!r} is in use by a running request; use a unique one")
        state = RequestState(request, self._tokenizer, self.texts)
        self._requests[request.request_id] = state
        for core_request, completion in zip(request.core_requests, state.completions, strict=True):
            self._sequences[core_request.request_id] = (state, completion)
        return state

    def process(self, outputs: Iterable[CoreOutput]) -> Processed:
        """Take what one engine step produced; output of requests that are gone is ignored."""
        changed: dict[str, RequestState] = {}
        stopped: list[str] = []
        now = time.monotonic()
        for output in outputs:
            entry = self._sequences.get(output.request_id)
            if entry is None:
                continue
            state, completion = entry
            state.record(output, completion, now)
            if completion.extend(output):
                stopped.append(output.request_id)
            if output.error is not None:
                refusal = REFUSALS.get(output.finish_reason or "")
                failure = f"request {state.request.request_id} failed: {output.error}"
                state.error = refusal(output.error) if refusal else RequestFailedError(failure)
                stopped += self.abort([state.request.request_id])
            elif completion.finish_reason is not None:
                del self._sequences[output.request_id]
                state.finished = all(sibling.finish_reason is not None for sibling in state.completions)
                if state.finished:
                    del self._requests[state.request.request_id]
            streamed = state.request.params.output_kind is not RequestOutputKind.FINAL_ONLY
            if state.finished or (streamed and not state.changed):
                state.changed = True
                changed[state.request.request_id] = state
        return Processed(list(changed.values()), stopped)

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """End these requests with the finish reason "abort"; returns the core ids to abort.

        Unknown or finished ids are ignored.
        """
        core_ids: list[str] = []
        for request_id in request_ids:
            state = self._requests.pop(request_id, None)
            if state is None:
                continue
            for core_request, completion in zip(state.request.core_requests, state.completions, strict=True):
                if self._sequences.pop(core_request.request_id, None) is not None:
                    core_ids.append(core_request.request_id)
                if completion.finish_reason is None:
                    completion.finish("abort")
            state.finished = True
        return core_ids
