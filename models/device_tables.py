"""A step's tables as each device has them where pages are divided between devices, and what merges their results.

The devices of a mesh axis hold the pages of a pool in as many equal parts, one after another. Striped, page k of every
sequence is on device k modulo their number: all attend for all queries, each over its own pages, and partial softmaxes
are merged (Milakov and Gimelshein 2018, arXiv 1805.02867). Owned, all pages of a sequence are on one device, and that
one alone attends for it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_engine.cuda_fallback.paged_attention import Partial
from jax_engine.models.kv_pages import DeviceTables, SequenceTable

Axes = Sequence[str] | str  # of a mesh


def striped_tables(sequences: SequenceTable, rank: Int[Array, ""], *, num_devices: int, num_pages: int) -> DeviceTables:
    """The tables of device `rank`, which has `num_pages` pages: every `num_devices`-th column of the block tables."""
    tables = sequences.block_tables
    columns = jnp.pad(tables, [(0, 0)] * (tables.ndim - 1) + [(0, -tables.shape[-1] % num_devices)])
    columns = columns.reshape(*tables.shape[:-1], -1, num_devices)
    return DeviceTables(
        _own_numbers(lax.dynamic_index_in_dim(columns, rank, axis=-1, keepdims=False), rank, num_pages),
        sequences.query_starts,
        sequences.kv_lengths,
        sequences.num_decodes,
        sequences.token_sequences,
        sequences.positions,
        jnp.arange(sequences.positions.shape[0]),
    )


def owned_tables(sequences: SequenceTable, rank: Int[Array, ""], *, num_pages: int, page_size: int) -> DeviceTables:
    """The tables of device `rank`, which has `num_pages` pages: its own sequences and their rows come first, in their
    order, and all others are padding.
    """
    num_sequences, num_tokens = sequences.kv_lengths.shape[0], sequences.positions.shape[0]
    lengths = sequences.query_starts[1:] - sequences.query_starts[:-1]
    # In any cache group, a sequence holds the page that its last token is in.
    tables = sequences.block_tables.reshape(-1, *sequences.block_tables.shape[-2:])[0]
    last = tables[jnp.arange(num_sequences), jnp.maximum(sequences.kv_lengths - 1, 0) // page_size]
    is_own = (lengths > 0) & (last // num_pages == rank)
    order = jnp.argsort(~is_own, stable=True)
    starts = jnp.append(0, jnp.cumsum(jnp.where(is_own, lengths, 0)[order])).astype(jnp.int32)
    own = SequenceTable.build(
        _own_numbers(sequences.block_tables[..., order, :], rank, num_pages),
        starts,
        jnp.where(is_own, sequences.kv_lengths, 0)[order],
        jnp.sum(is_own & (jnp.arange(num_sequences) < sequences.num_decodes)).astype(jnp.int32),
        num_tokens=num_tokens,
    )
    sequence = jnp.minimum(own.token_sequences, num_sequences - 1)
    rows = jnp.arange(num_tokens) - starts[sequence] + sequences.query_starts[order[sequence]]
    return DeviceTables(
        own.block_tables,
        own.query_starts,
        own.kv_lengths,
        own.num_decodes,
        own.token_sequences,
        own.positions,
        jnp.where(own.token_sequences < num_sequences, rows, num_tokens),
    )


def merge_partial(partial: Partial, axes: Axes) -> Float[Array, "T N H"]:
    """Attention over all pages from that over each device's own, on every device: one maximum and one sum over devices,
    in float32.
    """
    maximum = lax.pmax(partial.maximum, axes)
    weight = jnp.exp(partial.maximum - maximum)
    parts = jnp.concatenate([partial.values * weight[..., None], (partial.total * weight)[..., None]], axis=-1)
    sums = lax.psum(parts, axes)
    return sums[..., :-1] / jnp.maximum(sums[..., -1:], 1e-30)


def take_rows(array: Float[Array, "T ..."], tables: DeviceTables) -> Float[Array, "T ..."]:
    """The step's rows in the order of a device's own, zeros in padding."""
    return array.at[tables.rows].get(mode="fill", fill_value=0)


def put_rows(array: Float[Array, "T ..."], tables: DeviceTables) -> Float[Array, "T ..."]:
    """A device's own rows where the step has them, zeros elsewhere."""
    return jnp.zeros_like(array).at[tables.rows].set(array, mode="drop")


def _own_numbers(pages: Int[Array, "*tables"], rank: Int[Array, ""], num_pages: int) -> Int[Array, "*tables"]:
    """A device's numbers of its pages; entries that are ignored may be others', or anything."""
    return jnp.clip(pages - rank * num_pages, 0, num_pages - 1)
