"""What `EngineConfig.speculative_config` asks for: vLLM's keys, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from jax_engine.sampling_params import integer

METHODS = ("ngram",)
MAX_SPECULATIVE_TOKENS = 32  # a row of a step for each, of every sequence
MAX_LOOKUP = 64
DEFAULT_LOOKUP = 5


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Settings of speculative decoding.

    "ngram": what followed the latest like n-gram of the prompt and the answer is taken for what comes next (prompt
    lookup: Saxena 2023).
    """

    method: str
    num_speculative_tokens: int  # drafted for a sequence in one step, at most
    prompt_lookup_max: int  # tokens of the n-gram that is looked up: the longest that is found
    prompt_lookup_min: int

    @classmethod
    def of(cls, given: object) -> "SpeculativeConfig":
        """Check a dictionary of vLLM's keys.

        Raises:
            ValueError: an unknown key, or a value out of range.
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
        if given.get("method") not in METHODS:
            raise ValueError(
                f"speculative_config.method={given.get('method')!r} must be one of {', '.join(METHODS)}; "
                '"ngram" looks up what the prompt and the answer have said before'
            )
        for key in ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min"):
            high = MAX_SPECULATIVE_TOKENS if key == "num_speculative_tokens" else MAX_LOOKUP
            if key == "num_speculative_tokens" or given.get(key) is not None:
                remedy = "4 is a good start" if key == "num_speculative_tokens" else f"{DEFAULT_LOOKUP} is the default"
                integer(f"speculative_config.{key}", given.get(key), low=1, high=high, remedy=remedy)
        longest, shortest = given.get("prompt_lookup_max"), given.get("prompt_lookup_min")
        longest = longest or shortest or DEFAULT_LOOKUP
        shortest = shortest or longest
        if shortest > longest:
            raise ValueError(
                f"speculative_config.prompt_lookup_min={shortest} must be at most prompt_lookup_max={longest}; "
                "lower it, or raise the other"
            )
        return cls(
            method=given["method"],
            num_speculative_tokens=given["num_speculative_tokens"],
            prompt_lookup_max=longest,
            prompt_lookup_min=shortest,
        )
