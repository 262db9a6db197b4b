"""What a request returns; vLLM's objects and names.

Structs rather than frozen dataclasses: one of each is made for every streamed token, at a fifth of the cost.
"""

import msgspec


class Logprob(msgspec.Struct, frozen=True):
    """The log-probability of one token at one position, under the model's own distribution: before temperature,
    penalties and masks.
    """

    logprob: float  # natural logarithm
    rank: int | None = None  # among all tokens, 1 being the likeliest; of equal ones each has the last one's
    decoded_token: str | None = None  # its text by itself; special tokens are shown


LogprobsAtPosition = dict[int, Logprob]  # the position's own token first, then the likeliest ones in order


class CompletionOutput(msgspec.Struct, frozen=True):
    """One completion of a prompt, as far as it has got."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length", "repetition" or "abort" once it has ended
    stop_reason: int | str | None = None  # the stop id or stop string that ended it; None: end of sequence
    cumulative_logprob: float | None = None  # of all tokens so far, also where the other fields are deltas
    logprobs: list[LogprobsAtPosition] | None = None  # one for each of `token_ids`, if `SamplingParams.logprobs` asks

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct, frozen=True):
    """Monotonic times of one request, in seconds of one clock; None for what has not happened."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_preemptions: int = 0


class RequestOutput(msgspec.Struct, frozen=True):
    """A prompt and its completions; texts and token ids hold what `SamplingParams.output_kind` asks for."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = []  # msgspec gives each instance its own
    finished: bool = False
    metrics: RequestMetrics | None = None
    # Prompt tokens that an earlier request had left in the prefix cache; with several completions, those of the first.
    num_cached_tokens: int = 0
    # One for each prompt token, None for the first, if `SamplingParams.prompt_logprobs` asks; with deltas, in the first
    # output alone.
    prompt_logprobs: list[LogprobsAtPosition | None] | None = None
    pooled: bytes | None = None  # of a pooling request: its vector in float32, whole and not normalized
