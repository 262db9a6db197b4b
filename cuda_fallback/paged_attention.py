"""Ragged paged attention in XLA operations: what CUDA devices without a Pallas kernel run, and what a CPU runs.

The rows are cut into tiles of queries, and a group of tiles walks its sequences' pages chunk by chunk with a running
softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Loop bounds are the real lengths, so no context length is
baked into the program: decode rows are taken `DECODE_ROWS` at a time, each group only as far as its own longest row;
longer ranges are cut into `Tiles` of queries of one sequence. A row's arithmetic does not depend on the rows beside it:
chunks lie at fixed positions, and those past its end contribute exact zeros. It differs between the two kinds of range;
without decodes, and with `SMALL_TILES`, all ranges are of one kind.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num


class Stripe(NamedTuple):
    """Which pages of every sequence are here: page `rank`, and every `num`-th one after it."""

    rank: int | Int[Array, ""] = 0
    num: int = 1


class Partial(NamedTuple):
    """Attention over some of a sequence's tokens, in float32, to be merged with that over the others.

    Of softmax weights `exp(score - maximum)`: the sum of the values times them, and their own sum. The whole is the sum
    of `values` over all parts, each times `exp(maximum - the largest maximum)`, divided by the like sum of `total`.
    Padding rows are zero; a row that sees nothing here has a maximum of -1e30.
    """

    values: Float[Array, "T N H"]
    maximum: Float[Array, "T N"]
    total: Float[Array, "T N"]


class Tiles(NamedTuple):
    """How ranges are cut: `rows` queries of one sequence are a tile, and `at_once` tiles share one loop over chunks."""

    at_once: int
    rows: int


LARGE_TILES = Tiles(at_once=1, rows=32)  # for ranges of many tokens
SMALL_TILES = Tiles(at_once=8, rows=4)  # for ranges of any length, one token included
DECODE_ROWS = 16  # sequences that share one loop over chunks
CHUNK_TOKENS = 64  # cached tokens read per iteration


def ragged_paged_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Num[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "L 2 K"] | None = None,
    tiles: Tiles = LARGE_TILES,
) -> tuple[Float[Array, "T N H"], Num[Array, "L P 2 K S H"]]:
    """Specified by `pallas_kernels.reference`; products in the queries' type, accumulated in float32.

    `tiles` is how the ranges past the decodes are cut.
    """
    heads_a_group = queries.shape[1] // keys.shape[1]
    if kv_scales is not None:
        keys, values = keys / kv_scales[layer, 0, :, None], values / kv_scales[layer, 1, :, None]
        queries = (queries * jnp.repeat(kv_scales[layer, 0], heads_a_group)[:, None]).astype(queries.dtype)
    pages = _write(keys, values, pages, block_tables, token_sequences, positions, layer, Stripe())
    groups = _Groups(queries, pages, block_tables, positions, layer, scale, window, soft_cap, sinks, Stripe())
    out = _attend_all(groups, query_starts, num_decodes, tiles, partial(_whole, dtype=queries.dtype))
    if kv_scales is not None:
        out = (out * jnp.repeat(kv_scales[layer, 1], heads_a_group)[:, None]).astype(out.dtype)
    return out, pages


def striped_paged_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Num[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    stripe: Stripe,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[Partial, Num[Array, "L P 2 K S H"]]:
    """`ragged_paged_attention` where only a stripe of every sequence's pages is here: it writes and sees those alone.

    `block_tables` hold the pages of the stripe, side by side: column m is page `rank + m * num` of a sequence.
    """
    pages = _write(keys, values, pages, block_tables, token_sequences, positions, layer, stripe)
    groups = _Groups(queries, pages, block_tables, positions, layer, scale, window, soft_cap, None, stripe)
    out = _attend_all(groups, query_starts, num_decodes, LARGE_TILES, _side_by_side_parts)
    return Partial(out[..., :-2], out[..., -2], out[..., -1]), pages


# What becomes of a running softmax: its maximum, its sum, and the values summed.
_Finish = Callable[[Float[Array, "*tile"], Float[Array, "*tile"], Float[Array, "*tile H"]], Float[Array, "*tile W"]]


def _whole(maximum: Array, total: Array, values: Array, *, dtype: jnp.dtype) -> Array:
    return (values / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)


def _side_by_side_parts(maximum: Array, total: Array, values: Array) -> Array:
    return jnp.concatenate([values, maximum[..., None], total[..., None]], axis=-1)


def _attend_all(
    groups: "_Groups",
    query_starts: Int[Array, " boundaries"],
    num_decodes: Int[Array, ""],
    tiles: Tiles,
    finish: _Finish,
) -> Float[Array, "T N W"]:
    """Decode rows first, a group of sequences at a time, then longer ranges, a group of tiles at a time."""
    queries, block_tables = groups.queries, groups.block_tables
    num_tokens, num_sequences = queries.shape[0], block_tables.shape[0]

    rows = min(DECODE_ROWS, num_sequences, num_tokens)
    num_groups = (num_decodes + rows - 1) // rows

    def attend(rows: Array, sequences: Array, real: Array) -> Array:
        return groups.attend(rows, sequences, real, finish)

    shape = jax.eval_shape(attend, *(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), bool)))
    out = jnp.zeros((num_tokens, *shape.shape[2:]), shape.dtype)

    def decode(group: Int[Array, ""], out: Float[Array, "T N W"]) -> Float[Array, "T N W"]:
        first = jnp.minimum(group * rows, min(num_sequences, num_tokens) - rows)
        index = first + jnp.arange(rows)
        tile = attend(index[:, None], index, (index < num_decodes)[:, None])
        # Rows that the clamped last group shares with the one before are computed twice, to the same values; a longer
        # range's are kept.
        kept = lax.dynamic_slice_in_dim(out, first, rows)
        return lax.dynamic_update_slice_in_dim(
            out, jnp.where((index < num_decodes)[:, None, None], tile[:, 0], kept), first, axis=0
        )

    out = lax.fori_loop(0, num_groups, decode, out)
    if num_tokens == 1:
        return out

    rows = min(tiles.rows, num_tokens)
    tile_sequences, tile_starts, num_tiles = _cut_ranges(query_starts, num_decodes, rows, num_tokens)

    def longer(group: Int[Array, ""], out: Float[Array, "T N W"]) -> Float[Array, "T N W"]:
        tile = group * tiles.at_once + jnp.arange(tiles.at_once)
        sequences, starts = tile_sequences[tile], tile_starts[tile]
        index = starts[:, None] + jnp.arange(rows)
        mine = (index < query_starts[sequences + 1][:, None]) & (tile < num_tiles)[:, None]
        fresh = attend(jnp.minimum(index, num_tokens - 1), sequences, mine)
        return out.at[jnp.where(mine, index, num_tokens)].set(fresh, mode="drop")

    return lax.fori_loop(0, (num_tiles + tiles.at_once - 1) // tiles.at_once, longer, out)


def _write(
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Num[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    layer: int | Int[Array, ""],
    stripe: Stripe,
) -> Num[Array, "L P 2 K S H"]:
    """Scatter the step's keys and values into their pages, in place where `pages` is donated, without padding rows and
    those of other stripes.
    """
    num_sequences = block_tables.shape[0]
    num_pages, page_size = pages.shape[1], pages.shape[4]
    owner, index = jnp.minimum(token_sequences, num_sequences - 1), positions // page_size
    is_here = (token_sequences < num_sequences) & (index % stripe.num == stripe.rank)
    page = jnp.where(is_here, block_tables[owner, index // stripe.num], num_pages)
    new = jnp.stack([keys, values], axis=1)
    if jnp.issubdtype(pages.dtype, jnp.integer):
        new = jnp.round(new)
    if pages.dtype.itemsize == 1:
        limits = jnp.iinfo(pages.dtype) if jnp.issubdtype(pages.dtype, jnp.integer) else jnp.finfo(pages.dtype)
        new = jnp.clip(new.astype(jnp.float32), float(limits.min), float(limits.max))
    new = new.astype(pages.dtype)
    return pages.at[layer, page, :, :, positions % page_size].set(new, mode="drop")


def _cut_ranges(
    query_starts: Int[Array, " boundaries"], num_decodes: Int[Array, ""], rows: int, num_tokens: int
) -> tuple[Int[Array, " W"], Int[Array, " W"], Int[Array, ""]]:
    """Cut every range past the decodes into tiles: (sequence, first token row) of each, and how many are real."""
    num_sequences = query_starts.shape[0] - 1
    lengths = query_starts[1:] - query_starts[:-1]
    tiles = jnp.where(jnp.arange(num_sequences) >= num_decodes, (lengths + rows - 1) // rows, 0)
    ends = jnp.cumsum(tiles)
    work = jnp.arange(num_tokens // rows + min(num_sequences, num_tokens))
    sequences = jnp.minimum(jnp.searchsorted(ends, work, side="right"), num_sequences - 1)
    starts = query_starts[sequences] + (work - (ends - tiles)[sequences]) * rows
    return sequences.astype(jnp.int32), starts.astype(jnp.int32), ends[-1]


class _Groups:
    """One layer's queries and pages, and the loop over chunks that a group of query tiles runs over them."""

    def __init__(
        self,
        queries: Float[Array, "T N H"],
        pages: Num[Array, "L P 2 K S H"],
        block_tables: Int[Array, "B M"],
        positions: Int[Array, " T"],
        layer: int | Int[Array, ""],
        scale: float,
        window: int | None,
        soft_cap: float | None,
        sinks: Float[Array, " N"] | None,
        stripe: Stripe,
    ) -> None:
        self.stripe = stripe
        self.queries, self.pages, self.positions = queries, pages, positions
        self.layer, self.scale, self.window, self.soft_cap, self.sinks = layer, scale, window, soft_cap, sinks
        self.chunk_pages = max(1, CHUNK_TOKENS // pages.shape[4])
        # Whole chunks, so that a chunk's slice of the table never has to be clamped.
        self.block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % self.chunk_pages)))

    def attend(
        self, rows: Int[Array, "R Q"], sequences: Int[Array, " R"], real: Bool[Array, "R Q"], finish: _Finish
    ) -> Float[Array, "R Q N W"]:
        """Attention of `R` tiles of `Q` rows each, a tile within one sequence; rows that are not `real` are garbage."""
        num_kv_heads, page_size, head_dim = self.pages.shape[3:]
        num_tiles, num_rows = rows.shape
        queries = self.queries[rows].reshape(num_tiles, num_rows, num_kv_heads, -1, head_dim).transpose(0, 2, 1, 3, 4)
        queries = queries * jnp.asarray(self.scale, queries.dtype)
        positions = self.positions[rows]
        rank, count = self.stripe
        lasts = jnp.max(jnp.where(real, positions, -1), axis=1)
        last, firsts = jnp.max(lasts), jnp.zeros_like(lasts)
        if self.window is not None:
            firsts = jnp.min(jnp.where(real, jnp.maximum(positions - self.window + 1, 0), last), axis=1)
        # Chunks of the stripe's pages.
        first = (jnp.min(firsts) // page_size - rank + count - 1) // count // self.chunk_pages
        end = (last // page_size - rank) // count // self.chunk_pages + 1
        tables = self.block_tables[sequences]

        def seen(places: Int[Array, " CS"]) -> Bool[Array, "R CS"]:
            # Others may hold anything, NaN included: a zero weight must not multiply them.
            return (places >= firsts[:, None]) & (places <= lasts[:, None])

        def step(index: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, out = carry
            table = lax.dynamic_slice_in_dim(tables, index * self.chunk_pages, self.chunk_pages, axis=1)
            # Gathered apart: one gather of both would be copied again when it is split.
            keys, values = self.pages[self.layer, table, 0], self.pages[self.layer, table, 1]  # [R, C, K, S, H] each
            if keys.dtype.itemsize == 1:
                keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
            scores = _scores(queries, keys)
            if self.soft_cap is not None:
                scores = self.soft_cap * jnp.tanh(scores / self.soft_cap)
            pages = rank + count * (index * self.chunk_pages + jnp.arange(self.chunk_pages))
            places = (pages[:, None] * page_size + jnp.arange(page_size)).reshape(-1)
            distance = positions[:, :, None] - places[None, None, :]
            visible = distance >= 0
            if self.window is not None:
                visible &= distance < self.window
            values = jnp.where(seen(places).reshape(num_tiles, self.chunk_pages, 1, page_size, 1), values, 0)
            visible = visible[:, None, :, None, :]
            scores = jnp.where(visible, scores, -jnp.inf)
            # A finite floor keeps a row that sees nothing in this chunk free of inf - inf.
            new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_maximum[..., None])
            shrink = jnp.exp(maximum - new_maximum)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_maximum, total, out * shrink[..., None] + _weighted_sum(weights, values)

        shape = queries.shape[:-1]
        start = (*self._seen_first(shape), jnp.zeros(queries.shape, jnp.float32))
        out = finish(*lax.fori_loop(first, end, step, start))
        return out.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_rows, -1, out.shape[-1])

    def _seen_first(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Maximum and sum of the running softmax before the first token: nothing, or each head's sink."""
        if self.sinks is None:
            return jnp.full(shape, -1e30, jnp.float32), jnp.zeros(shape, jnp.float32)
        sinks = self.sinks.astype(jnp.float32).reshape(1, shape[1], 1, shape[3])
        return jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)


# With one query a tile (decode), a handful of heads makes no matrix product worth the name. With scores multiplied and
# summed, and keys and values gathered apart, a step of 64 rows took 7.0 ms on 2 cores, where dots took 8.8.


def _scores(queries: Float[Array, "R K Q G H"], keys: Float[Array, "R C K S H"]) -> Float[Array, "R K Q G CS"]:
    """Products of each query with each key of its tile's chunk, in float32."""
    if queries.shape[2] > 1:
        return jnp.einsum("rkqgh,rksh->rkqgs", queries, _side_by_side(keys), preferred_element_type=jnp.float32)
    num_tiles, _, num_kv_heads, _, head_dim = keys.shape
    keys = keys.transpose(0, 2, 4, 1, 3).reshape(num_tiles, num_kv_heads, 1, head_dim, -1).astype(jnp.float32)
    return jnp.sum(queries[:, :, 0, :, :, None].astype(jnp.float32) * keys, axis=3)[:, :, None]


def _weighted_sum(weights: Float[Array, "R K Q G CS"], values: Float[Array, "R C K S H"]) -> Float[Array, "R K Q G H"]:
    """The chunk's values, weighted and summed, in float32."""
    values = _side_by_side(values)
    if weights.shape[2] > 1:
        weights = weights.astype(values.dtype)
        return jnp.einsum("rkqgs,rksh->rkqgh", weights, values, preferred_element_type=jnp.float32)
    values = values[:, :, None].astype(jnp.float32)
    return jnp.sum(weights[:, :, 0, :, :, None] * values, axis=3)[:, :, None]


def _side_by_side(pages: Float[Array, "R C K S H"]) -> Float[Array, "R K CS H"]:
    """The tokens of a chunk's pages in one dimension."""
    num_tiles, _, num_kv_heads, _, head_dim = pages.shape
    return pages.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_kv_heads, -1, head_dim)
