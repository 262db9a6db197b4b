"""Pooling: the hidden states of a prompt's tokens, added up in its slot as its chunks are computed.

Each step adds, for each of its sequences, a range of its token rows: all of them for the mean, the first or the last
token's for the others. The host says which ranges (`pooling_results.pooled_rows`), so this knows nothing of the kinds.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def pool_rows(
    hidden: Float[Array, "T D"],
    vectors: Float[Array, "slots D"],
    slots: Int[Array, " B"],
    ranges: Int[Array, "B 2"],
    *,
    in_order: bool,
) -> tuple[Float[Array, "slots D"], Float[Array, "B D"]]:
    """The slots' sums with the hidden states of this step's rows in `ranges` (first, end), and that of each sequence.

    A sequence that does not pool has the range (-1, -1), and its sum is zeros. `in_order` (static) adds row after row,
    so that a sum does not depend on how its rows are spread over steps.
    """
    num_rows = hidden.shape[0]
    rows = jnp.arange(num_rows)
    is_pooled = ranges[:, 1] >= 0

    def inside(row: Int[Array, " R"]) -> Bool[Array, "B R"]:
        return (ranges[:, :1] <= row) & (row < ranges[:, 1:])

    def add() -> tuple[Float[Array, "slots D"], Float[Array, "B D"]]:
        # Rows of other sequences must not get into a sum, not even as zero times infinity.
        own = jnp.where(inside(rows).any(axis=0)[:, None], hidden.astype(jnp.float32), 0.0)
        sums = vectors.at[slots].get(mode="clip")
        if in_order:

            def add_row(row: Int[Array, ""], sums: Float[Array, "B D"]) -> Float[Array, "B D"]:
                return jnp.where(inside(row[None]), sums + own[row], sums)

            sums = lax.fori_loop(0, num_rows, add_row, sums)
        else:
            weights = inside(rows).astype(jnp.float32)
            sums = sums + jnp.matmul(weights, own, precision=lax.Precision.HIGHEST)
        kept = jnp.where(is_pooled, slots, vectors.shape[0])
        return vectors.at[kept].set(sums, mode="drop"), jnp.where(is_pooled[:, None], sums, 0.0)

    def skip() -> tuple[Float[Array, "slots D"], Float[Array, "B D"]]:
        return vectors, jnp.zeros((slots.shape[0], hidden.shape[1]), jnp.float32)

    pooled: tuple[Float[Array, "slots D"], Float[Array, "B D"]] = lax.cond(jnp.any(is_pooled), add, skip)
    return pooled
