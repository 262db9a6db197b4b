"""Whose part of a list an entry lies in, and lists of ranges' tiles."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


def rows_of(entries: Int[Array, " W"], ends: Int[Array, " B"]) -> Int[Array, " W"]:
    """The row of each entry, where row b's entries end before `ends[b]`, ascending; B for those past the last end.

    By bisection, which on a GPU would be a loop of some launches a trip: there, by comparing all with all.
    """

    def bisect(entries: Array, ends: Array) -> Array:
        return jnp.searchsorted(ends, entries, side="right", method="scan").astype(jnp.int32)

    def compare(entries: Array, ends: Array) -> Array:
        return jnp.sum(ends <= entries[:, None], axis=1, dtype=jnp.int32)

    return lax.platform_dependent(entries, ends, cuda=compare, rocm=compare, default=bisect)


def cut_ranges(
    query_starts: Int[Array, " boundaries"], chosen: Bool[Array, " B"], rows: int, num_tokens: int
) -> tuple[Int[Array, " W"], Int[Array, " W"], Int[Array, ""]]:
    """Cut the `chosen` ranges into tiles: (sequence, first token row) of each, and how many are real."""
    num_sequences = query_starts.shape[0] - 1
    lengths = query_starts[1:] - query_starts[:-1]
    tiles = jnp.where(chosen, (lengths + rows - 1) // rows, 0)
    ends = jnp.cumsum(tiles)
    work = jnp.arange(num_tokens // rows + min(num_sequences, num_tokens))
    sequences = jnp.minimum(rows_of(work, ends), num_sequences - 1)
    starts = query_starts[sequences] + (work - (ends - tiles)[sequences]) * rows
    return sequences, starts.astype(jnp.int32), ends[-1]
