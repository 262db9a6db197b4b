"""What crosses between the front end (text) and the engine core (tokens), in one process or between two.

The structs are msgpack arrays on the wire (msgspec): small, typed, and checked on arrival.
"""

import msgspec

from jax_engine.core.engine_view import EngineView
from jax_engine.core.stats import EngineStats
from jax_engine.lora_request import LoRARequest
from jax_engine.sampling_params import RepetitionDetectionParams


class TokenControls(msgspec.Struct, array_like=True, frozen=True):
    """What a request asks of the FULL sampling mode; most ask for nothing of it. `SamplingParams` says what each is."""

    allowed_token_ids: tuple[int, ...] | None = None
    # Log-probabilities of each drawn token, and of each of the prompt's but the first, and of so many of the likeliest
    # in its place.
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}  # msgspec copies it
    bad_words: tuple[tuple[int, ...], ...] = ()  # as tokens, each with and without a space in front
    processor_arguments: dict[str, float] = {}
    pooling: str | None = None  # of `POOLING_TYPES`: the prompt's vector is asked for, and the token drawn is nobody's


NO_CONTROLS = TokenControls()


class ThinkingRequest(msgspec.Struct, array_like=True, frozen=True):
    """How a sequence may begin with thinking, in tokens; at most `budget` of them between `start` and `end`."""

    start: tuple[int, ...]
    end: tuple[int, ...]
    begins_inside: bool
    budget: int | None
    blanks: tuple[int, ...]  # what may stand between it and a form


class StructuredRequest(msgspec.Struct, array_like=True, frozen=True):
    """The form that a sequence is held to; its requests' `min_tokens` are here, since the grammar decides what may end
    it.
    """

    grammar: str  # as llguidance reads it; empty: any text
    min_tokens: int = 0  # it does not end before that many where the grammar can go on
    thinking: ThinkingRequest | None = None  # what may come before


class CoreRequest(msgspec.Struct, array_like=True, frozen=True):
    """One sequence to generate: everything resolved to numbers and already validated by the front end."""

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int  # resolved: prompt + max_tokens fits the model's context
    min_tokens: int
    temperature: float
    top_k: int  # 0 is all
    top_p: float
    min_p: float
    prng_key: tuple[int, int]  # two uint32 words; the token at a position is drawn with fold_in(key, position)
    eos_token_ids: tuple[int, ...]  # () with ignore_eos
    stop_token_ids: tuple[int, ...]
    arrival_time: float  # time.monotonic()
    # Common to requests of the same prompt and salt, one of which computes it for all: the id of the first.
    prompt_group: str | None = None
    cache_salt: str | None = None  # pages are shared only among requests of one salt
    priority: int = 0  # the lower, the sooner; other than 0 only under the policy "priority"
    needs_host: bool = False  # what ends it is not for the device to see: each token goes to the host before the next
    controls: TokenControls | None = None
    structured: StructuredRequest | None = None
    lora: LoRARequest | None = None  # the adapter that it runs with
    repetition: RepetitionDetectionParams | None = None
    branches: bool = False  # it goes on from the end of another, or others from its own: pages that are not full count

    @property
    def needs_full(self) -> bool:
        """Whether its steps are of the FULL sampling mode."""
        return self.controls is not None or self.structured is not None

    @property
    def pools(self) -> bool:
        """Whether a vector is asked for, and no tokens."""
        return self.controls is not None and self.controls.pooling is not None


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Log-probabilities at one position: of its own token, and then of the likeliest in order."""

    rank: int  # of its own token, 1 being the likeliest
    token_ids: list[int]
    logprobs: list[float]


class CoreOutput(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """New tokens of one sequence. `finish_reason` is set in the last one: "stop" (with `stop_reason` the id, None for
    end of sequence), "length", "repetition", "abort", "error", "refused" when the queue is full, or "asleep"."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0  # prompt tokens whose keys and values were in the cache when it first ran
    first_scheduled_time: float | None = None
    num_preemptions: int = 0
    error: str | None = None  # what went wrong, with finish_reason "error", "refused" or "asleep"
    logprobs: list[TokenLogprobs] | None = None  # one for each new token, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # of the prompt from its second token on, with the first output
    pooled: bytes | None = None  # the vector of a pooling request, float32


class StepOutputs(msgspec.Struct, array_like=True, frozen=True, tag="step"):
    """All that one engine step produced, in one message; without outputs, only a snapshot of the statistics."""

    outputs: list[CoreOutput]
    stats: EngineStats | None = None


class Add(msgspec.Struct, array_like=True, frozen=True, tag="add"):
    """Begin these, all or none: those that `max_num_queued_reqs` has no room for are answered with "refused"."""

    requests: list[CoreRequest]


class Vocabulary(msgspec.Struct, array_like=True, frozen=True, tag="vocabulary"):
    """What the core must know of text to follow grammars; sent before the first request that has one."""

    tokenizer: str  # the content of a tokenizer.json
    size: int  # the model's and the tokenizer's ids are below
    eos_token_ids: tuple[int, ...]


class Abort(msgspec.Struct, array_like=True, frozen=True, tag="abort"):
    """Drop these requests and free their pages at the next step; unknown or finished ids are ignored. No output
    follows.
    """

    request_ids: list[str]


class Shutdown(msgspec.Struct, array_like=True, frozen=True, tag="shutdown"):
    """End the core process."""


class ResetPrefixCache(msgspec.Struct, array_like=True, frozen=True, tag="reset_prefix_cache"):
    """Forget what free pages hold; answered by a `PrefixCacheReset`, in the order asked."""


class LoadAdapter(msgspec.Struct, array_like=True, frozen=True, tag="load_adapter"):
    """Have an adapter in host memory; with `served`, list it among those that clients may name, under a number that the
    core gives it. Answered by an `AdapterReply`.
    """

    lora: LoRARequest
    served: bool = False


class UnloadAdapter(msgspec.Struct, array_like=True, frozen=True, tag="unload_adapter"):
    """List an adapter no longer, and let go of it; requests that have it keep it. Answered by an `AdapterReply`."""

    lora_int_id: int


class AbortNamed(msgspec.Struct, array_like=True, frozen=True, tag="abort_named"):
    """Drop the requests of these clients' ids, or all; the core passes it on to every front end."""

    request_ids: list[str] | None


class Sleep(msgspec.Struct, array_like=True, frozen=True, tag="sleep"):
    """Give up the devices' memory: the weights go to host memory (level 1), or are dropped (2). Answered, as those that
    follow, by an `AdminReply`.
    """

    level: int


class WakeUp(msgspec.Struct, array_like=True, frozen=True, tag="wake_up"):
    """Have "weights", "kv_cache" or both again."""

    tags: tuple[str, ...]


class IsSleeping(msgspec.Struct, array_like=True, frozen=True, tag="is_sleeping"):
    """Ask whether any of that is not there."""


class Profile(msgspec.Struct, array_like=True, frozen=True, tag="profile"):
    """Begin to record a profile, or write what was recorded."""

    start: bool


class Inspect(msgspec.Struct, array_like=True, frozen=True, tag="inspect"):
    """Ask how the engine is at the moment; answered by an `EngineView`."""


Command = (
    Add
    | Abort
    | AbortNamed
    | ResetPrefixCache
    | LoadAdapter
    | UnloadAdapter
    | Sleep
    | WakeUp
    | IsSleeping
    | Profile
    | Inspect
    | Shutdown
    | Vocabulary
)


class Ready(msgspec.Struct, array_like=True, frozen=True, tag="ready"):
    """The core's first message: it serves from now on (smaller step programs may still compile)."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    step_sizes: tuple[int, ...] = ()  # token rows of the step programs, ascending
    processor_arguments: dict[str, float] = {}  # what requests may give to logits processors, with the defaults
    adapters: tuple[LoRARequest, ...] = ()  # that clients may name
    hidden_size: int = 0


class Starting(msgspec.Struct, array_like=True, frozen=True, tag="starting"):
    """How far the core is that does not serve yet, now and then before its `Ready`."""

    programs_compiled: int = 0
    programs_planned: int = 0  # 0: not known yet
    compile_eta_seconds: float = 0.0  # until the last one is ready; 0: not known


class Failed(msgspec.Struct, array_like=True, frozen=True, tag="failed"):
    """The core's last message: why it cannot start or cannot go on. `user_error`: the configuration is at fault, not
    the program.
    """

    reason: str
    user_error: bool = False


class PrefixCacheReset(msgspec.Struct, array_like=True, frozen=True, tag="prefix_cache_reset"):
    """Whether it was done: not while running requests hold pages."""

    done: bool


class AdapterReply(msgspec.Struct, array_like=True, frozen=True, tag="adapter_reply"):
    """What came of a `LoadAdapter` or `UnloadAdapter`: why it was refused, or None."""

    error: str | None = None


class ServedAdapters(msgspec.Struct, array_like=True, frozen=True, tag="served_adapters"):
    """All that clients may name, to every front end, when they have changed."""

    adapters: tuple[LoRARequest, ...]


class AdminReply(msgspec.Struct, array_like=True, frozen=True, tag="admin_reply"):
    """What came of an operator's order: why it was not done, or None. `is_busy`: it may be, later."""

    is_sleeping: bool
    error: str | None = None
    is_busy: bool = False


Event = (
    Starting
    | Ready
    | Failed
    | StepOutputs
    | PrefixCacheReset
    | AdapterReply
    | AdminReply
    | AbortNamed
    | ServedAdapters
    | EngineView
)
