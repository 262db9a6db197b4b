"""What a request asks of the sampler; vLLM's names and defaults."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from jax_engine.structured_outputs import ReasoningParams, StructuredOutputsParams

# A device row has room for this many token ids that min_tokens holds back (its stop ids and the model's end-of-
# sequence ids).
MAX_HELD_BACK_TOKENS = 32
# What it has room for besides.
MAX_LOGIT_BIAS = 512  # tokens
MAX_BAD_WORD_SEQUENCES = 256  # of tokens: a bad word is one or two, without and with a space in front
MAX_BAD_WORD_TOKENS = 16  # of each
# What generation_config.json may set of the sampling parameters.
GENERATION_CONFIG_PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MAX_PATTERN_TOKENS = 1024  # which repetition detection looks for after every token


class RequestOutputKind(Enum):
    """What each output of a streamed request holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # only what is new
    FINAL_ONLY = 2  # one output, at the end


@dataclass(frozen=True, kw_only=True)
class RepetitionDetectionParams:
    """When an output counts as going round in circles: its last tokens are a pattern, `min_count` times in a row.

    It then ends with the finish reason "repetition" and the stop reason "repetition_detected", not before `min_tokens`.

    Raises:
        ValueError: a value outside its range.
    """

    max_pattern_size: int = 0  # tokens of the longest pattern; 0 detects nothing
    min_pattern_size: int = 0  # of the shortest; 0 is 1
    min_count: int = 0  # at least 2

    def __post_init__(self) -> None:
        least = 2 if self.max_pattern_size else 0
        for name, low, high in (
            ("max_pattern_size", 0, MAX_PATTERN_TOKENS),
            ("min_pattern_size", 0, self.max_pattern_size),
            ("min_count", least, MAX_PATTERN_TOKENS),
        ):
            remedy = "0 for max_pattern_size detects nothing"
            integer(f"repetition_detection.{name}", getattr(self, name), low=low, high=high, remedy=remedy)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "RepetitionDetectionParams":
        """Build from untrusted names and values, refusing unknown names."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"repetition_detection has the field {unknown[0]!r}; supported are {', '.join(known)}")
        return cls(**given)

    def found_in(self, tokens: Sequence[int], first: int) -> bool:
        """Whether a sequence ends with such a pattern, none of it before the token at `first`."""
        count = self.min_count
        for size in range(self.min_pattern_size or 1, self.max_pattern_size + 1):
            start = len(tokens) - size * count
            if start < first:
                return False
            if tokens[-1] == tokens[-1 - size] and tokens[start:-size] == tokens[start + size :]:
                return True
        return False


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends. Every field acts; one that this class lacks is not
    supported yet.

    Raises:
        ValueError: a value outside its range; the message names field, value, range and remedy.
    """

    n: int = 1  # completions of the prompt
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # smallest set of tokens whose probability reaches this (Holtzman et al. 2020, arXiv 1904.09751)
    top_k: int = 0  # the k likeliest tokens; 0 or -1 is all
    min_p: float = 0.0  # tokens at least this likely relative to the likeliest (Nguyen et al. 2024, arXiv 2407.01082)
    presence_penalty: float = 0.0  # subtracted once from the logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted for each time
    # Divides the logits of tokens in prompt or output, multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858).
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None  # token id -> added to its logit
    allowed_token_ids: tuple[int, ...] | list[int] | None = None  # no other is drawn
    bad_words: tuple[str, ...] | list[str] | None = None  # not written, nor with a space in front
    extra_args: Mapping[str, float] | None = None  # arguments of the engine's logits processors, by name
    seed: int | None = None  # same tokens alone or in any batch; None draws from the engine's seed
    max_tokens: int | None = 16  # None: up to the model's context
    min_tokens: int = 0  # neither an end-of-sequence token nor a stop id before that many
    stop: tuple[str, ...] | list[str] | str | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True  # False: where a decoder puts a space between two that are shown, none
    logprobs: int | None = None  # of each token drawn, and of so many of the likeliest beside it; -1: of all tokens
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None  # the form of the output; a mapping of its fields will do
    reasoning: ReasoningParams | None = (
        None  # how the model marks what it thinks before it answers: a form applies after
    )
    thinking_token_budget: int | None = None  # of thinking, at most; needs `reasoning`
    truncate_prompt_tokens: int | None = None  # keep so many of the prompt's last tokens; -1: what there is room for
    repetition_detection: RepetitionDetectionParams | None = None  # end the output when it goes round in circles

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if isinstance(self.structured_outputs, Mapping):
            form = StructuredOutputsParams.from_mapping(self.structured_outputs)
            object.__setattr__(self, "structured_outputs", form)
        elif not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError(
                f"structured_outputs={self.structured_outputs!r} must be StructuredOutputsParams or an object of its "
                "fields"
            )
        if not isinstance(self.reasoning, ReasoningParams | None):
            raise ValueError(f"reasoning={self.reasoning!r} must be ReasoningParams")
        object.__setattr__(self, "bad_words", tuple(self.bad_words or ()))
        if isinstance(self.repetition_detection, Mapping):
            detection = RepetitionDetectionParams.from_mapping(self.repetition_detection)
            object.__setattr__(self, "repetition_detection", detection)
        elif not isinstance(self.repetition_detection, RepetitionDetectionParams | None):
            raise ValueError(
                f"repetition_detection={self.repetition_detection!r} must be RepetitionDetectionParams or an object of "
                "its fields"
            )
        self._check_numbers()
        self._check_stops()
        self._check_controls()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` in its one normal form."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def bias(self) -> dict[int, float]:
        """`logit_bias` in its one normal form."""
        return {int(token): float(bias) for token, bias in (self.logit_bias or {}).items()}

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "SamplingParams":
        """Build from untrusted names and values, refusing an unknown name with the nearest known one."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; supported are {', '.join(known)}"
                raise ValueError(f"sampling parameter {name!r} is not supported{hint}")
        return cls(**given)

    def _check_numbers(self) -> None:
        integer("n", self.n, low=1, high=64, remedy="ask for at least one completion; send several requests for more")
        number(
            "temperature",
            self.temperature,
            low=0.0,
            high=math.inf,
            remedy="0 is greedy, 1 the model's own distribution",
        )
        number("top_p", self.top_p, low=0.0, high=1.0, open_low=True, remedy="1 turns it off")
        integer("top_k", self.top_k, low=-1, high=2**31 - 1, remedy="0 or -1 turns it off")
        number("min_p", self.min_p, low=0.0, high=1.0, remedy="0 turns it off")
        if self.seed is not None:
            integer("seed", self.seed, low=-(2**63), high=2**63 - 1, remedy="leave it out for a random one")
        if self.max_tokens is not None:
            integer(
                "max_tokens", self.max_tokens, low=1, high=2**31 - 1, remedy="leave it None for the rest of the context"
            )
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                remedy = "-1 is the whole vocabulary, 0 the token's own, None turns it off"
                integer(name, value, low=-1, high=2**31 - 1, remedy=remedy)
        if (kept := self.truncate_prompt_tokens) is not None and kept != -1:
            remedy = "it is how many of the prompt's last tokens are kept; -1 keeps what there is room for"
            integer("truncate_prompt_tokens", kept, low=1, high=2**31 - 1, remedy=remedy)
        if self.thinking_token_budget is not None:
            remedy = "leave it out for as much as the model likes"
            integer("thinking_token_budget", self.thinking_token_budget, low=0, high=2**31 - 1, remedy=remedy)
        integer("min_tokens", self.min_tokens, low=0, high=2**31 - 1, remedy="0 turns it off")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}; lower it or raise that"
            )

    def _check_controls(self) -> None:
        off = "0 turns it off"
        number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0, remedy=off)
        number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0, remedy=off)
        remedy = "1 turns it off"
        number("repetition_penalty", self.repetition_penalty, low=0.0, high=math.inf, open_low=True, remedy=remedy)
        for token, bias in mapping("logit_bias", self.logit_bias, "token ids to numbers").items():
            if not (str(token).isdecimal() and str(token).isascii()):
                raise ValueError(f"logit_bias has the key {token!r}; each must be a token id, a whole number from 0")
            name = f"logit_bias[{token}]"
            number(name, bias, low=-100.0, high=100.0, remedy="-100 all but bans the token, 100 all but demands it")
        if len(self.bias) > MAX_LOGIT_BIAS:
            raise ValueError(
                f"logit_bias has {len(self.bias)} entries; at most {MAX_LOGIT_BIAS} are supported: drop some, or say "
                "with allowed_token_ids what alone may be drawn"
            )
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids=[] leaves no token to draw; leave it out to allow all")
            for token in self.allowed_token_ids:
                integer("allowed_token_ids", token, low=0, high=2**31 - 1, remedy="use ids of the model's vocabulary")
        assert isinstance(self.bad_words, tuple)
        for word in self.bad_words:
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"bad_words has the entry {word!r}; each must be a string, not blank: remove it")
        for name, value in mapping("extra_args", self.extra_args, "names to numbers").items():
            number(f"extra_args.{name}", value, low=-math.inf, high=math.inf, remedy="leave it out for its default")

    def _check_stops(self) -> None:
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop has the entry {text!r}; each must be a non-empty string: remove it")
        assert isinstance(self.stop_token_ids, tuple)
        for token in self.stop_token_ids:
            integer("stop_token_ids", token, low=0, high=2**31 - 1, remedy="use ids of the model's vocabulary")
        if self.min_tokens and len(self.stop_token_ids) > MAX_HELD_BACK_TOKENS // 2:
            raise ValueError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; with min_tokens at most "
                f"{MAX_HELD_BACK_TOKENS // 2} are allowed: drop some, or min_tokens"
            )
        switches = {
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "ignore_eos": self.ignore_eos,
            "skip_special_tokens": self.skip_special_tokens,
            "spaces_between_special_tokens": self.spaces_between_special_tokens,
        }
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be true or false")


def integer(name: str, value: object, *, low: int, high: int, remedy: str) -> None:
    """Raise a ValueError unless `value` is a whole number in `[low, high]`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        above = f"at least {low}" if high >= 2**31 - 1 else f"between {low} and {high}"
        raise ValueError(f"{name}={value!r} must be a whole number, {above}; {remedy}")


def mapping(name: str, value: object, what: str) -> Mapping[Any, Any]:
    """`value`, or nothing for None; a ValueError unless it is a mapping."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r} must map {what}; leave it out for none")
    return value or {}


def number(name: str, value: object, *, low: float, high: float, remedy: str, open_low: bool = False) -> None:
    """Raise a ValueError unless `value` is a finite number in `[low, high]`, or in `(low, high]` with `open_low`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not low <= value <= high or (open_low and value == low):  # type: ignore[operator]
        above = f"{'above' if open_low else 'at least'} {low:g}"
        limits = above if high == math.inf else f"{above} and at most {high:g}"
        raise ValueError(f"{name}={value!r} must be a finite number, {limits}; {remedy}")
