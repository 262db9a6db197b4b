"""Drawing the next token on the device, each row by its own parameters.

A token at position `p` of a request is drawn with `fold_in(request key, p)` (counter-based, threefry: Salmon et al.,
SC 2011): it depends on the request and its position only, not on the batch around it. One uniform number a row is
compared with the cumulative distribution, so that the random bits cost nothing beside the logits. Thresholds for
top-k and top-p are found by bisection over the bits of a float32: 32 passes of compare-and-sum, exact, without
sorting the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt


class SamplingMode(StrEnum):
    """Which sampling a step program contains; each mode can do all that the modes before it can."""

    GREEDY = "greedy"  # every row takes the likeliest token
    SAMPLE = "sample"  # temperature, top-k, top-p, min-p, min_tokens
    FULL = "full"  # masks, and all that reads or changes logits row by row (`full_sampling.py`); one token a step


LOOPING_MODES = (SamplingMode.GREEDY, SamplingMode.SAMPLE)  # those whose steps may draw several tokens a row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The parameters of each row (sequence) of a step."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_k: Int[Array, " B"]  # 0 is all
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    keys: UInt[Array, "B 2"]
    positions: Int[Array, " B"]  # of the token to draw
    hold_until: Int[Array, " B"]  # tokens of `held_back` are not drawn at positions before this one
    held_back: Int[Array, "B 32"]  # those that end the sequence, padded with an id past the vocabulary


def sample(logits: Float[Array, "B V"], rows: SamplingRows, mode: SamplingMode) -> Int[Array, " B"]:
    """The next token of each row; `full_sampling.sample_full` does what FULL has beyond SAMPLE."""
    if mode is SamplingMode.GREEDY:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    holds = rows.positions < rows.hold_until
    index = jnp.arange(logits.shape[0])[:, None]
    held = logits.at[index, jnp.where(holds[:, None], rows.held_back, logits.shape[1])].set(-jnp.inf, mode="drop")
    greedy = jnp.argmax(held, axis=-1)
    is_drawn = rows.temperature > 0
    # Asked together: rows that are spread over devices take one sum over them.
    asked = jnp.any(jnp.stack([is_drawn, is_drawn & (rows.top_k > 0), is_drawn & (rows.top_p < 1)]), axis=1)
    drawn = lax.cond(asked[0], _draw, lambda *_: jnp.zeros_like(greedy), held, rows, asked[1], asked[2])
    return jnp.where(is_drawn, drawn, greedy).astype(jnp.int32)


def _draw(
    logits: Float[Array, "B V"], rows: SamplingRows, any_top_k: Bool[Array, ""], any_top_p: Bool[Array, ""]
) -> Int[Array, " B"]:
    """The drawn token of each row; anything where the temperature is 0."""
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))  # relative to the likeliest token, which has 1
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0)
    weights = _skip_unless(any_top_k, keep_top_k, weights, rows.top_k)
    weights = _skip_unless(any_top_p, keep_top_p, weights, rows.top_p)
    return _invert(weights, rows)


def ends_sequence(tokens: Int[Array, " B"], positions: Int[Array, " B"], rows: SamplingRows) -> Bool[Array, " B"]:
    """Whether each row's token, at its position, is one to stop at: what `Request.append` decides on the host."""
    return jnp.any(tokens[:, None] == rows.held_back, axis=-1) & (positions + 1 >= rows.hold_until)


def keep_top_k(weights: Float[Array, "B V"], top_k: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Zero what is lighter than the k-th heaviest; ties with it stay. `top_k` of 0 keeps all."""
    wanted = jnp.where(top_k > 0, top_k, weights.shape[1])
    threshold = _largest_threshold(lambda low: jnp.sum(weights >= low, axis=-1) >= wanted, weights.shape[0])
    return jnp.where(weights >= threshold, weights, 0)


def keep_top_p(weights: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Keep the heaviest whose share of the sum reaches `top_p`, zero the rest; ties with the lightest kept stay."""
    wanted = top_p * jnp.sum(weights, axis=-1)
    threshold = _largest_threshold(lambda low: _sum_where(weights >= low, weights) >= wanted, weights.shape[0])
    return jnp.where((weights >= threshold) | (top_p >= 1)[:, None], weights, 0)


def _skip_unless(
    needed: Bool[Array, ""],
    keep: Callable[[Float[Array, "B V"], Array], Float[Array, "B V"]],
    weights: Float[Array, "B V"],
    limits: Array,
) -> Float[Array, "B V"]:
    return lax.cond(needed, keep, lambda weights, _: weights, weights, limits)


def _sum_where(condition: Bool[Array, "B V"], weights: Float[Array, "B V"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.where(condition, weights, 0), axis=-1)


def _bisect(holds: Callable[[Int[Array, " B"]], Bool[Array, " B"]], bound: int, num_rows: int) -> Int[Array, " B"]:
    """For each row the largest number in `[0, bound)` at which `holds` is true; it is true at 0, and false from some
    number on.
    """

    def narrow(_: int, limits: tuple[Int[Array, " B"], Int[Array, " B"]]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        low, high = limits
        middle = low + (high - low) // 2
        inside = holds(middle)
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    start = (jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, bound, jnp.int32))
    return lax.fori_loop(0, bound.bit_length(), narrow, start)[0]


def _largest_threshold(
    enough: Callable[[Float[Array, "B 1"]], Bool[Array, " B"]], num_rows: int
) -> Float[Array, "B 1"]:
    """The largest weight in [0, 1] at which `enough` still holds, exactly: non-negative floats order as their bits
    do.
    """

    def as_float(bits: Int[Array, " B"]) -> Float[Array, "B 1"]:
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    one = int(np.float32(1).view(np.int32))
    return as_float(_bisect(lambda bits: enough(as_float(bits)), one + 1, num_rows))


def _invert(weights: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Invert the cumulative distribution of each row at its own uniform number.

    Bisection over the vocabulary: a cumulative sum over it would be a larger program and a second array of its size.
    """

    def uniform(key: UInt[Array, " 2"], position: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))

    num_rows, vocab_size = weights.shape
    tokens = jnp.arange(vocab_size)
    target = jax.vmap(uniform)(rows.keys, rows.positions) * jnp.sum(weights, axis=-1)
    # The largest token before which at most `target` lies. It has weight itself, unless rounding brings the target up
    # to the whole sum: then it is past the last token that has.
    index = _bisect(lambda token: _sum_where(tokens < token[:, None], weights) <= target, vocab_size, num_rows)
    last = vocab_size - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.minimum(index, last)
