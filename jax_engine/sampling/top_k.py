"""What a row's limits keep of its tokens, by the lowest logit: the k likeliest, without sorting the vocabulary."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

from jax_engine.sampling.token_blocks import SMALLEST_BLOCK

# On a CPU, of which `lax.top_k` finds the k-th: it takes four times as long for 256 as for 64.
CANDIDATES = (64, 256)
LOWEST = float(np.finfo(np.float32).min)  # tokens that are masked are below
STEEP = 2.0**100  # what a difference of two logits is multiplied by so that `exp` makes 0 of it where it is negative
CLOSE = 2.0**-80  # logits that differ by less count as equal, where zero is near: no weight tells them apart
_SIGN = np.uint32(1 << 31)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What of each row's distribution a token is drawn from."""

    highest: Float[Array, " B"]  # logit of the row
    lowest: Float[Array, " B"]  # logit that is kept
    rate: Float[Array, " B"]  # one over the temperature

    def weigh(self, logits: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """The weight of each logit, 1 for the highest, 0 below the lowest.

        Said without a comparison: what that chooses, XLA stores for the whole vocabulary before it is summed on a CPU,
        where all this takes one pass.
        """
        highest, lowest, rate = (
            column.reshape(-1, *[1] * (logits.ndim - 1)) for column in (self.highest, self.lowest, self.rate)
        )
        return jnp.exp(jnp.minimum((logits - highest) * rate, (logits - lowest) * STEEP))

    def above(self, logits: Float[Array, " B"]) -> "Kept":
        """Of that, what is above one logit of each row."""
        return replace(self, lowest=jnp.maximum(jnp.nextafter(logits, jnp.inf), logits + CLOSE))


def keep_top_k(
    blocks: Float[Array, "B N S"], kept: Kept, top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> tuple[Kept, Bool[Array, " B"]]:
    """What `top_k` keeps of that, 0 being all; and whether `top_p` is in it already, which depends on the row alone."""
    most = jnp.max(top_k)

    def by_candidates(*given: Array) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        find: Callable[..., tuple[Float[Array, " B"], Bool[Array, " B"]]] = by_both
        for sizes in (CANDIDATES, CANDIDATES[:1]):
            find = partial(lax.cond, most > sizes[-1], find, partial(_among_candidates, kept, sizes=sizes))
        return find(*given)

    def by_both(
        blocks: Float[Array, "B N S"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
    ) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        has_few = top_k <= CANDIDATES[-1]
        lowest, is_settled = _among_candidates(kept, blocks, top_k, top_p, sizes=CANDIDATES)
        return jnp.where(has_few, lowest, bisect_kth(blocks, jnp.where(has_few, 0, top_k))), is_settled & has_few

    def by_bisection(
        blocks: Float[Array, "B N S"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
    ) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        return bisect_kth(blocks, top_k), jnp.zeros(top_k.shape, bool)

    def find(*given: Array) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        return lax.platform_dependent(*given, cpu=by_candidates, default=by_bisection)

    def find_none(*_: Array) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
        return jnp.full(top_k.shape, LOWEST), jnp.zeros(top_k.shape, bool)

    lowest, is_settled = lax.cond(most > 0, find, find_none, blocks, top_k, top_p)
    # Not of a row of minus infinities, nor of numbers that are none.
    lowest = jnp.where((top_k > 0) & (lowest > kept.lowest), lowest, kept.lowest)
    return replace(kept, lowest=lowest), is_settled & (top_k > 0)


def _among_candidates(
    kept: Kept,
    blocks: Float[Array, "B N S"],
    top_k: Int[Array, " B"],
    top_p: Float[Array, " B"],
    *,
    sizes: tuple[int, ...],
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """The lowest logit that each row keeps, and whether `top_p` is in that; of rows with a `top_k` of at most the last
    of the `sizes`. A row looks at one candidate more than the first of them that holds it, whatever others need.
    """
    values = candidates(blocks, sizes[-1] + 1)
    found = [_cut(values[:, : size + 1], kept, top_k, top_p, whole=size >= blocks[0].size) for size in sizes]
    lowest, is_settled = found[-1]
    for size, (low, settled) in reversed(tuple(zip(sizes[:-1], found, strict=False))):
        is_own = top_k <= size
        lowest, is_settled = jnp.where(is_own, low, lowest), jnp.where(is_own, settled, is_settled)
    return lowest, is_settled


def _cut(
    values: Float[Array, "B K"], kept: Kept, top_k: Int[Array, " B"], top_p: Float[Array, " B"], *, whole: bool
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """`_among_candidates`, of the highest logits in order, the `whole` row or not."""
    kth = jnp.take_along_axis(values, jnp.clip(top_k, 1, values.shape[1])[:, None] - 1, axis=1)[:, 0]
    kth = jnp.maximum(kth, kept.lowest)
    is_settled = jnp.full(top_k.shape, True) if whole else values[:, -1] < kth  # or there may be equals elsewhere
    weights = replace(kept, lowest=kth).weigh(values)
    cumulative = jnp.cumsum(weights, axis=-1)
    is_kept = (weights > 0) & (cumulative - weights < (top_p * cumulative[:, -1])[:, None])
    at_top_p = jnp.min(jnp.where(is_kept, values, kept.highest[:, None]), axis=-1)
    return jnp.where(is_settled & (top_p < 1), at_top_p, kth), is_settled


def candidates(blocks: Float[Array, "B N S"], num_candidates: int) -> Float[Array, "B K"]:
    """The highest logits of each row, in order, as many as are asked for or there are. They lie in as many blocks of
    `SMALLEST_BLOCK` tokens, the ones with the highest maxima.
    """
    num_rows, _, size = blocks.shape
    blocks = blocks.reshape(num_rows, -1, min(size, SMALLEST_BLOCK))
    if blocks.shape[1] > num_candidates:
        # Fused with what follows, XLA sorts whole rows on a CPU: 5 s instead of 50 ms for 64 rows of 131,072.
        best = lax.optimization_barrier(lax.top_k(jnp.max(blocks, axis=-1), num_candidates)[1])
        blocks = jnp.take_along_axis(blocks, best[:, :, None], axis=1)
    rows = blocks.reshape(num_rows, -1)
    return lax.optimization_barrier(lax.top_k(rows, min(num_candidates, rows.shape[1]))[0])


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
    found = _at_rank(low)
    return jnp.where(jnp.abs(found) < CLOSE, -CLOSE, found)


def _rank(value: float) -> int:
    """The place of a float32 among all of them, in their order."""
    bits = int(np.float32(value).view(np.uint32))
    return bits ^ 0xFFFFFFFF if bits >> 31 else bits | 1 << 31


def _at_rank(rank: UInt[Array, " B"]) -> Float[Array, " B"]:
    """The float32 of a `_rank`."""
    return lax.bitcast_convert_type(jnp.where(rank >= _SIGN, rank ^ _SIGN, ~rank), jnp.float32)
