"""How far down the k likeliest tokens of a row reach, without sorting the vocabulary."""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jax_engine.sampling.token_blocks import SMALLEST_BLOCK

# On a CPU, of which `lax.top_k` finds the k-th: it takes four times as long for 256 as for 64.
CANDIDATES = (64, 256)
LOWEST = float(np.finfo(np.float32).min)  # tokens that are masked are below
# What a difference of two logits is multiplied by so that `exp` makes 0 of it if it is negative. Smaller ones than
# 2**-93 are none: they make no difference to any weight.
STEEP = 2.0**100
_SIGN = np.uint32(1 << 31)


def kth_logits(blocks: Float[Array, "B N S"], top_k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The logit of each row's `top_k`-th likeliest token; `LOWEST` for a `top_k` of 0, or beyond what masks leave."""
    most = jnp.max(top_k)

    def by_candidates(blocks: Float[Array, "B N S"], top_k: Int[Array, " B"]) -> Float[Array, " B"]:
        find: Callable[..., Float[Array, " B"]] = bisect_kth
        for size in reversed(CANDIDATES):
            find = partial(lax.cond, most > size, find, partial(kth_of_candidates, num_candidates=size))
        return find(blocks, top_k)

    def find(blocks: Float[Array, "B N S"], top_k: Int[Array, " B"]) -> Float[Array, " B"]:
        kth = lax.platform_dependent(blocks, top_k, cpu=by_candidates, default=bisect_kth)
        return jnp.where((top_k > 0) & (kth > LOWEST), kth, LOWEST)

    return lax.cond(most > 0, find, lambda _, top_k: jnp.full(top_k.shape, LOWEST), blocks, top_k)


def kth_of_candidates(
    blocks: Float[Array, "B N S"], top_k: Int[Array, " B"], *, num_candidates: int
) -> Float[Array, " B"]:
    """The `top_k`-th highest logit of each row that wants no more than `num_candidates`: those lie in as many blocks of
    `SMALLEST_BLOCK` tokens, the ones with the highest maxima.
    """
    num_rows, _, size = blocks.shape
    size = min(size, SMALLEST_BLOCK)
    blocks = blocks.reshape(num_rows, -1, size)
    if blocks.shape[1] > num_candidates:
        # Fused with what follows, XLA sorts whole rows on a CPU: 5 s instead of 50 ms for 64 rows of 131,072.
        best = lax.optimization_barrier(lax.top_k(jnp.max(blocks, axis=-1), num_candidates)[1])
        blocks = jnp.take_along_axis(blocks, best[:, :, None], axis=1)
    candidates = blocks.reshape(num_rows, -1)
    values = lax.optimization_barrier(lax.top_k(candidates, min(num_candidates, candidates.shape[1]))[0])
    return jnp.take_along_axis(values, jnp.clip(top_k, 1, values.shape[1])[:, None] - 1, axis=1)[:, 0]


def num_from(blocks: Float[Array, "B N S"], lowest: Float[Array, " B"]) -> Float[Array, " B"]:
    """How many logits of each row are no lower, without a comparison, which takes a CPU several times as long."""
    counts = jnp.sum(jnp.exp(jnp.minimum((blocks - lowest[:, None, None]) * STEEP, 0)), axis=-1)
    return jnp.sum(lax.optimization_barrier(counts), axis=-1)  # block by block, which is the quicker way


def bisect_kth(blocks: Float[Array, "B N S"], top_k: Int[Array, " B"]) -> Float[Array, " B"]:
    """The highest number that at least `top_k` logits of the row reach, or a lower one that no more reach.

    By bisection over the numbers that a float32 can be, in 32 passes over the logits; on a CPU, where it need not be
    said before the loop how often it runs, in as many as it takes.
    """
    Limits = tuple[UInt[Array, " B"], UInt[Array, " B"], Bool[Array, " B"]]

    def narrow(limits: Limits) -> Limits:
        low, high, is_found = limits
        middle = low + (high - low) // 2
        count = num_from(blocks, _at_rank(middle))
        takes = ~is_found & (count >= top_k)
        return jnp.where(takes, middle, low), jnp.where(takes | is_found, high, middle), is_found | (count == top_k)

    def is_wide(limits: Limits) -> Bool[Array, ""]:
        low, high, is_found = limits
        return jnp.any(~is_found & (high - low > 1))

    first, last = (jnp.full(top_k.shape, _rank(value), jnp.uint32) for value in (LOWEST, np.inf))
    low, _, _ = lax.platform_dependent(
        (first, last, top_k < 1),
        cpu=lambda start: lax.while_loop(is_wide, narrow, start),
        default=lambda start: lax.fori_loop(0, 32, lambda _, limits: narrow(limits), start),
    )
    return _at_rank(low)


def _rank(value: float) -> int:
    """The place of a float32 among all of them, in their order."""
    bits = int(np.float32(value).view(np.uint32))
    return bits ^ 0xFFFFFFFF if bits >> 31 else bits | 1 << 31


def _at_rank(rank: UInt[Array, " B"]) -> Float[Array, " B"]:
    """The float32 of a `_rank`."""
    return lax.bitcast_convert_type(jnp.where(rank >= _SIGN, rank ^ _SIGN, ~rank), jnp.float32)
