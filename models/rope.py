"""Rotary position embedding (Su et al., arXiv 2104.09864) and the context extensions that checkpoints ask for.

The frequencies are numbers of the model, not of a request: they are computed from the configuration while a step is
traced, in float32 as when checkpoints are trained, and enter the step as a constant of `rotary_dim / 2` floats.

Two scalings, `dynamic` and `longrope`, are defined by the length of the sequence being processed. A cached key was
rotated when it was written and is not rotated again, so an engine that keeps keys must use one set of frequencies for
all lengths. Both are therefore evaluated at `max_model_len`, the longest sequence that will be served: exact for a
sequence of that length, and for every sequence when `max_model_len` does not exceed the original length. A token's key
never depends on what comes after it or shares its batch.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_engine.models.fields import Fields, boolean, group, integer, listing, number, text

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# Names that older checkpoints use for the same thing.
_ALIASES = {"su": "longrope"}
# The types that mean nothing without a factor; YaRN and LongRoPE checkpoints may leave it to the ratio of the lengths.
_STATE_FACTOR = ("linear", "dynamic", "llama3")
_NUMBERS = (
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
)


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Everything that determines the frequencies; read from `rope_parameters` or the older `rope_scaling`.

    `rotary_dim` leading elements of each head are rotated, the rest pass through (`partial_rotary_factor`).
    `factor` is the ratio of extended to original length, both in tokens. `attention_factor`, when given, multiplies
    cosine and sine (YaRN and LongRoPE); when absent it follows from the method's paper.
    """

    rotary_dim: int
    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r}; supported: {', '.join(ROPE_TYPES)}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"head_dim * partial_rotary_factor is {self.rotary_dim}; it must be an even number of at least 2"
            )
        if not self.theta > 1:
            raise ValueError(f"rope_theta is {self.theta}; it must be greater than 1")
        if not self.factor >= 1:
            raise ValueError(f"the factor of rope_type {self.rope_type!r} is {self.factor}; it must be at least 1")
        if self.rope_type == "dynamic" and self.rotary_dim == 2:
            raise ValueError("rope_type 'dynamic' needs head_dim * partial_rotary_factor of at least 4")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})"
            )
        for name, factors in (("short_factor", self.short_factor), ("long_factor", self.long_factor)):
            if self.rope_type == "longrope" and len(factors) != self.rotary_dim // 2:
                raise ValueError(f"{name} has {len(factors)} numbers; it must have one a pair, {self.rotary_dim // 2}")

    @classmethod
    def from_hf(cls, hf: Fields, *, head_dim: int, max_position_embeddings: int) -> "RopeConfig":
        """Read a `config.json`: its `rope_parameters`, or the older `rope_scaling` and `rope_theta`."""
        scaling = {**group(hf, "rope_parameters"), **group(hf, "rope_scaling")}
        nested = [name for name, value in scaling.items() if isinstance(value, Mapping)]
        if nested:
            raise ValueError(
                f"rope_parameters holds sets for {', '.join(nested)}; only one set for all layers is supported"
            )
        rope_type = text(scaling, "rope_type", default=text(scaling, "type", default="default"))
        rope_type = _ALIASES.get(rope_type, rope_type)
        if rope_type in _STATE_FACTOR and scaling.get("factor") is None:
            raise ValueError(f"factor is missing; rope_type {rope_type!r} needs a factor of at least 1")
        # Some checkpoints state it beside the settings; then that one counts.
        original = integer(scaling, "original_max_position_embeddings", default=max_position_embeddings)
        original = integer(hf, "original_max_position_embeddings", default=original)
        partial = number(hf, "partial_rotary_factor", default=1.0)
        return cls(
            rotary_dim=int(head_dim * number(scaling, "partial_rotary_factor", default=partial)),
            theta=number(scaling, "rope_theta", default=number(hf, "rope_theta", default=10000.0)),
            rope_type=rope_type,
            factor=number(scaling, "factor", default=max(max_position_embeddings / original, 1.0)),
            original_max_position_embeddings=original,
            truncate=boolean(scaling, "truncate", default=True),
            short_factor=listing(scaling, "short_factor", float),
            long_factor=listing(scaling, "long_factor", float),
            **{name: number(scaling, name, default=0.0) for name in _NUMBERS if scaling.get(name) is not None},
        )


def inverse_frequencies(
    rope: RopeConfig, *, max_position_embeddings: int, max_model_len: int
) -> tuple[np.ndarray, float]:
    """Radians a token of each rotated pair, float32 [rotary_dim / 2], and the factor on cosine and sine.

    `max_model_len` matters to `dynamic` and `longrope` only; see the head of this file.
    """
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    theta = rope.theta
    if rope.rope_type == "dynamic":
        # Base of NTK-aware scaling, grown with the length beyond the original one.
        excess = max(max_model_len / max_position_embeddings, 1.0) - 1
        theta *= (1 + rope.factor * excess) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    wavelengths = np.float32(theta) ** exponents
    if rope.rope_type == "linear":
        return 1 / wavelengths / np.float32(rope.factor), 1.0
    if rope.rope_type == "llama3":
        return _llama3(rope, 1 / wavelengths), 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, wavelengths), _yarn_attention_factor(rope)
    if rope.rope_type == "longrope":
        extended = max_model_len > rope.original_max_position_embeddings
        factors = np.asarray(rope.long_factor if extended else rope.short_factor, dtype=np.float32)
        return 1 / (factors * wavelengths), _longrope_attention_factor(rope)
    return 1 / wavelengths, 1.0


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Llama 3.1: slow pairs are slowed by `factor`, fast ones kept, with a linear blend between the two bounds."""
    turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)  # over the original length
    blend = (turns - rope.low_freq_factor) / np.float32(rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1).astype(np.float32)
    return (1 - blend) * frequencies / np.float32(rope.factor) + blend * frequencies


def _yarn(rope: RopeConfig, wavelengths: np.ndarray) -> np.ndarray:
    """YaRN (arXiv 2309.00071), "NTK by parts": a ramp over pairs from kept to slowed by `factor`."""

    def pair_that_turns(turns: float) -> float:
        """The (fractional) pair that makes this many turns over the original length."""
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # an empty ramp is a step
    pairs = np.arange(rope.rotary_dim // 2, dtype=np.float32)
    slowed = np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    return slowed / (np.float32(rope.factor) * wavelengths) + (1 - slowed) / wavelengths


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    """LongRoPE (arXiv 2402.13753)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of each token's angles, float32, R = rotary_dim / 2; made once a step, used by every layer."""

    cos: Float[Array, "T R"]
    sin: Float[Array, "T R"]

    def __call__(self, heads: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        """Rotate the leading 2 R elements of each head in float32; element i pairs with i + R. Keeps the dtype."""
        half = self.cos.shape[-1]
        cos, sin = self.cos[:, None, :], self.sin[:, None, :]
        first = heads[..., :half].astype(jnp.float32)
        second = heads[..., half : 2 * half].astype(jnp.float32)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(heads.dtype)
        if heads.shape[-1] == 2 * half:
            return rotated
        return jnp.concatenate([rotated, heads[..., 2 * half :]], axis=-1)


def rotation(positions: Int[Array, " T"], frequencies: np.ndarray, attention_factor: float) -> Rotation:
    """The rotation of tokens at `positions`, by `frequencies` (see `inverse_frequencies`)."""
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return Rotation(jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor)
