"""What `EngineConfig.speculative_config` asks for: vLLM's keys, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from jax_engine.sampling_params import integer

if TYPE_CHECKING:
    from jax_engine.config import EngineConfig

METHODS = {
    "ngram": '"ngram" looks up what the prompt and the answer have said before',
    "draft_model": '"draft_model" asks a smaller model',
}
KEYS_OF = {"prompt_lookup_max": "ngram", "prompt_lookup_min": "ngram", "model": "draft_model"}
MAX_SPECULATIVE_TOKENS = 32  # a row of a step for each, of every sequence
MAX_LOOKUP = 64
DEFAULT_LOOKUP = 5


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Settings of speculative decoding.

    "ngram": what followed the latest like n-gram of the prompt and the answer is taken for what comes next (prompt
    lookup: Saxena 2023). "draft_model": a smaller model of the same vocabulary says what it would (Leviathan et al.
    2023).
    """

    method: str
    num_speculative_tokens: int  # drafted for a sequence in one step, at most
    prompt_lookup_max: int = DEFAULT_LOOKUP  # tokens of the n-gram that is looked up: the longest that is found
    prompt_lookup_min: int = DEFAULT_LOOKUP
    model: str | None = None  # the draft model: a folder, a name, or a repository of the hub

    @classmethod
    def of(cls, given: object) -> "SpeculativeConfig":
        """Check a dictionary of vLLM's keys.

        Raises:
            ValueError: an unknown key, one of another method, or a value out of range.
        """
        if not isinstance(given, Mapping):
            raise ValueError(
                f"speculative_config={given!r} must be a dictionary (JSON on the command line), such as "
                '{"method": "ngram", "num_speculative_tokens": 4}; leave it out for no speculation'
            )
        known = [field.name for field in fields(cls)]
        for key in given:
            if key not in known:
                raise ValueError(f"speculative_config has no {key!r} here; its keys are {', '.join(known)}")
        method = given.get("method")
        if method not in METHODS:
            raise ValueError(
                f"speculative_config.method={method!r} must be one of {', '.join(METHODS)}; "
                f"{', and '.join(METHODS.values())}"
            )
        for key, value in given.items():
            if value is not None and KEYS_OF.get(key, method) != method:
                raise ValueError(
                    f"speculative_config.{key}={value!r} belongs to the method {KEYS_OF[key]!r}, and the method is "
                    f"{method!r}; leave it out, or change the method"
                )
        integer(
            "speculative_config.num_speculative_tokens",
            given.get("num_speculative_tokens"),
            low=1,
            high=MAX_SPECULATIVE_TOKENS,
            remedy="4 is a good start",
        )
        if method == "ngram":
            longest, shortest = _lookup(given)
            return cls(
                method=method,
                num_speculative_tokens=given["num_speculative_tokens"],
                prompt_lookup_max=longest,
                prompt_lookup_min=shortest,
            )
        model = given.get("model")
        if not isinstance(model, str) or not model:
            raise ValueError(
                f"speculative_config.model={model!r} must be the draft model's folder or name; "
                '"demo-draft" is that of the built-in model'
            )
        return cls(method=method, num_speculative_tokens=given["num_speculative_tokens"], model=model)


def _lookup(given: Mapping[str, Any]) -> tuple[int, int]:
    """The longest and the shortest n-gram to look up."""
    for key in ("prompt_lookup_max", "prompt_lookup_min"):
        if given.get(key) is not None:
            remedy = f"{DEFAULT_LOOKUP} is the default"
            integer(f"speculative_config.{key}", given[key], low=1, high=MAX_LOOKUP, remedy=remedy)
    longest, shortest = given.get("prompt_lookup_max"), given.get("prompt_lookup_min")
    longest = longest or shortest or DEFAULT_LOOKUP
    shortest = shortest or longest
    if shortest > longest:
        raise ValueError(
            f"speculative_config.prompt_lookup_min={shortest} must be at most prompt_lookup_max={longest}; "
            "lower it, or raise the other"
        )
    return longest, shortest


def check_speculation(config: "EngineConfig") -> None:
    """Raise a ValueError unless `speculative_config` is one, and fits the other settings."""
    speculation = config.speculation
    if speculation is None:
        return
    if config.num_scheduler_steps != 1:
        raise ValueError(
            f"num_scheduler_steps={config.num_scheduler_steps} must be 1 with speculative_config (both draw several "
            "tokens a step); leave one of them out"
        )
    if speculation.num_speculative_tokens >= config.token_budget:
        raise ValueError(
            f"speculative_config.num_speculative_tokens={speculation.num_speculative_tokens} must be less than "
            f"max_num_batched_tokens={config.token_budget}, which bounds all tokens of a step; lower it"
        )
