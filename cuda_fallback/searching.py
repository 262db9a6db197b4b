"""Whose part of a list an entry lies in."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def rows_of(entries: Int[Array, " W"], ends: Int[Array, " B"]) -> Int[Array, " W"]:
    """The row of each entry, where row b's entries end before `ends[b]`, ascending; B for those past the last end.

    By bisection, which on a GPU would be a loop of some launches a trip: there, by comparing all with all.
    """

    def bisect(entries: Array, ends: Array) -> Array:
        return jnp.searchsorted(ends, entries, side="right", method="scan").astype(jnp.int32)

    def compare(entries: Array, ends: Array) -> Array:
        return jnp.sum(ends <= entries[:, None], axis=1, dtype=jnp.int32)

    return lax.platform_dependent(entries, ends, cuda=compare, rocm=compare, default=bisect)
