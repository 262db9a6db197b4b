"""What a pooling request asks for: one vector for its prompt instead of tokens that follow it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from jax_engine.sampling_params import SamplingParams, integer

POOLING_TYPES = ("LAST", "MEAN", "CLS")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How the hidden states of a prompt, those behind the model's final norm, become one vector; vLLM's names. What is
    None is the engine's `pooler_config` to say.

    Raises:
        ValueError: a value outside its range; the message names field, value, range and remedy.
    """

    pooling_type: str | None = None  # LAST, the last token's; MEAN, that of all; CLS, the first token's
    normalize: bool | None = None  # to length 1
    dimensions: int | None = None  # only so many, from the first, and normalized after that
    truncate_prompt_tokens: int | None = None  # keep the last so many tokens of the prompt; -1: as many as fit

    def __post_init__(self) -> None:
        if self.pooling_type not in (None, *POOLING_TYPES):
            raise ValueError(f"pooling_type={self.pooling_type!r} must be one of {', '.join(POOLING_TYPES)}")
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise ValueError(f"normalize={self.normalize!r} must be true or false; leave it out for the engine's own")
        if self.dimensions is not None:
            integer("dimensions", self.dimensions, low=1, high=2**31 - 1, remedy="leave it out for all")

    @property
    def n(self) -> int:
        """Results of a prompt, as in `SamplingParams`."""
        return 1

    @property
    def max_tokens(self) -> int | None:
        """No bound is given, as in `SamplingParams`."""
        return None

    @classmethod
    def of_engine(cls, pooler_config: Mapping[str, Any] | None) -> Self:
        """The defaults of an engine: what its `pooler_config` sets, the last token's vector, of length 1.

        Raises:
            ValueError: an unknown key, or a value outside its range.
        """
        known = ("pooling_type", "normalize", "dimensions")
        given = dict(pooler_config or {})
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"pooler_config has {unknown[0]!r}; its keys are {', '.join(known)}")
        try:
            asked = cls(**given)
        except ValueError as error:
            raise ValueError(f"pooler_config: {error}") from error
        return replace(
            asked,
            pooling_type=asked.pooling_type or "LAST",
            normalize=True if asked.normalize is None else asked.normalize,
        )

    def with_defaults(self, defaults: "PoolingParams") -> Self:
        """With the values of `defaults` where there is none."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: getattr(defaults, n) for n, value in values.items() if value is None})


RequestParams = SamplingParams | PoolingParams  # what a request may come with
