"""Attention of one query a sequence, where much should go at once: the keys of all sequences as one flat list.

Each sequence's tokens are cut into items of equally many. A trip of the loop takes the list's next items, whichever
sequences they are of, so that none is padded to another's length and a long one alone fills the device; then it merges
what it finds into the sequences' running softmaxes (Flash-Decoding's split, arXiv 2311.01282, in XLA operations). A
trip's items are in the order of their sequences, so those it meets are neighbours: a slice of the running softmaxes.

Reductions are written as the sums of several heads at once, for XLA then reads a cached token's head once for all of
its query heads, from its page. As a dot product it would gather pages to memory first: three times the traffic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

# Scores of so many query heads are one reduction. Of weighted values, XLA has shared memory for two; where a head is
# shared by more than twice as many, reading it for each two takes longer than gathering it for a dot product.
MAX_SCORE_SUMS, MAX_VALUE_SUMS, MAX_VALUE_HEADS = 8, 2, 4
MIN_ITEMS, MAX_ITEMS = 16, 256  # in a trip
ITEMS_A_SEQUENCE = 4


class Softmaxes(NamedTuple):
    """Running softmaxes, as in `paged_attention.Partial`: of sequences, or of one item each."""

    maximum: Float[Array, "R N"]
    total: Float[Array, "R N"]
    values: Float[Array, "R N H"]


class Items(NamedTuple):
    """The next items of the list, and which tokens they are."""

    rows: Int[Array, " W"]  # the sequence of each, ascending
    real: Bool[Array, " W"]  # False past the end of the list
    pages: Int[Array, "W J"]  # of each token
    slots: Int[Array, " J"]  # of each token within its page
    seen: Bool[Array, "W J"]  # which of them there are and are to be seen


def attend_items(
    queries: Float[Array, "W N H"],
    pages: Num[Array, "L P 2 K S H"],
    items: Items,
    *,
    layer: int | Int[Array, ""],
    scale: float,
    soft_cap: float | None,
    bits_of: DTypeLike | None = None,
) -> Softmaxes:
    """Each item's query over the item's tokens."""
    num_items, num_heads, head_dim = queries.shape
    num_kv_heads = pages.shape[3]
    heads = jnp.arange(num_kv_heads)[:, None]

    def cached(plane: int) -> Num[Array, "W K J H"]:
        place = pages.at[layer, items.pages[:, None], plane, heads, items.slots]
        found = place.get(mode="promise_in_bounds", wrap_negative_indices=False)
        return found if bits_of is None else lax.bitcast_convert_type(found, jnp.dtype(bits_of))

    grouped = queries.reshape(num_items, num_kv_heads, -1, head_dim)
    scores = _scores(grouped, cached(0)) * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    seen = items.seen[:, None, None]
    scores = jnp.where(seen, scores, -1e30)
    maximum = jnp.max(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - maximum[..., None]), 0)
    # Tokens that are not seen may hold anything, NaN included: a zero weight must not multiply them.
    values = jnp.where(items.seen[:, None, :, None], cached(1), 0)
    sums = _weighted_values(weights, values, queries.dtype)
    return Softmaxes(
        maximum.reshape(num_items, num_heads),
        jnp.sum(weights, axis=-1).reshape(num_items, num_heads),
        sums.reshape(num_items, num_heads, head_dim),
    )


def _scores(queries: Float[Array, "W K G H"], keys: Num[Array, "W K J H"]) -> Float[Array, "W K G J"]:
    """Products of each query with its item's keys, in float32."""
    heads = range(queries.shape[2])
    if len(heads) > MAX_SCORE_SUMS:
        return jnp.einsum("wkgh,wkjh->wkgj", queries, keys.astype(queries.dtype), preferred_element_type=jnp.float32)
    wide, keys = queries.astype(jnp.float32)[:, :, :, None], keys.astype(jnp.float32)
    return jnp.stack(_sums([keys * wide[:, :, head] for head in heads], axis=3), axis=2)


def _weighted_values(
    weights: Float[Array, "W K G J"], values: Num[Array, "W K J H"], dtype: jnp.dtype
) -> Float[Array, "W K G H"]:
    """The items' values, weighted and summed, in float32; as a dot product, of factors in `dtype`."""
    count = weights.shape[2]
    if count > MAX_VALUE_HEADS:
        factors = weights.astype(dtype), values.astype(dtype)
        return jnp.einsum("wkgj,wkjh->wkgh", *factors, preferred_element_type=jnp.float32)
    values = values.astype(jnp.float32)
    found: list[Array] = []
    for first in range(0, count - count % MAX_VALUE_SUMS, MAX_VALUE_SUMS):
        some = range(first, first + MAX_VALUE_SUMS)
        found += _sums([values * weights[:, :, head, :, None] for head in some], axis=2)
    if count % MAX_VALUE_SUMS:
        # One sum alone XLA would make a dot product of, and lay the values out anew for it.
        halves = jnp.split(values * weights[:, :, -1, :, None], 2, axis=2)
        left, right = _sums(halves, axis=2)
        found.append(left + right)
    return jnp.stack(found, axis=2)


def _sums(terms: Sequence[Array], *, axis: int) -> list[Array]:
    """The sums of arrays of one shape over an axis, in one reduction."""

    def add(left: tuple[Array, ...], right: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a + b for a, b in zip(left, right, strict=True))

    return list(lax.reduce(tuple(terms), (jnp.float32(0),) * len(terms), add, (axis,)))


def merge_items(running: Softmaxes, fresh: Softmaxes, items: Items, num_rows: int) -> Softmaxes:
    """The sequences' softmaxes with those of items merged in, which are of `num_rows` neighbours at most."""
    first = items.rows[0]
    here = Softmaxes(*(lax.dynamic_slice_in_dim(part, first, num_rows) for part in running))
    is_own = (items.rows - first == jnp.arange(num_rows)[:, None]) & items.real  # [X, W]
    maximum = jnp.maximum(here.maximum, jnp.max(jnp.where(is_own[:, :, None], fresh.maximum, -1e30), axis=1))
    factors = jnp.where(is_own[:, :, None], jnp.exp(fresh.maximum - maximum[:, None]), 0)  # [X, W, N]
    shrink = jnp.exp(here.maximum - maximum)
    total = here.total * shrink + jnp.sum(factors * fresh.total, axis=1)
    added = jnp.einsum("xwn,wnh->xnh", factors, fresh.values, precision="highest")
    merged = maximum, total, here.values * shrink[..., None] + added
    return Softmaxes(
        *(lax.dynamic_update_slice_in_dim(old, new, first, 0) for old, new in zip(running, merged, strict=True))
    )


def items_a_trip(num_sequences: int) -> int:
    """How many items go through one trip: a power of two, and several of each sequence where there are few."""
    return min(MAX_ITEMS, max(MIN_ITEMS, 1 << (ITEMS_A_SEQUENCE * num_sequences - 1).bit_length()))
