"""Ragged paged attention in XLA operations: what CUDA devices without a Pallas kernel run, and what a CPU runs.

The rows are cut into tiles of queries, and a group of tiles walks its sequences' pages chunk by chunk with a running
softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). Loop bounds are the real lengths, so no context length is
baked into the program: decode rows are taken some at a time, each group only as far as its own longest row; longer
ranges are cut into `Tiles` of queries of one sequence. A row's arithmetic does not depend on the rows beside it: chunks
lie at fixed positions, and those past its end contribute exact zeros. It differs between the two kinds of range;
without decodes, and with small tiles, all ranges are of one kind. On a GPU, decode rows go another way, by the items of
a flat list (`decode_items.py`): there, how a row's sum is grouped depends on where it stands in the list.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from jax_engine.cuda_fallback.chunk_products import chunk_scores, weighted_values
from jax_engine.cuda_fallback.decode_items import Items, Softmaxes, attend_items, items_a_trip, merge_items
from jax_engine.cuda_fallback.searching import cut_ranges, rows_of
from jax_engine.cuda_fallback.stored_pages import divided_by_scales, narrow, scale_heads, widened
from jax_engine.cuda_fallback.whole_prompts import Implementation, attend_whole, begins_here, check_cudnn


class Stripe(NamedTuple):
    """Which pages of every sequence are here: page `rank`, and every `num`-th one after it."""

    rank: int | Int[Array, ""] = 0
    num: int = 1


ALL_PAGES = Stripe()


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


class Sizes(NamedTuple):
    """How much the loops do at once."""

    tiles: Tiles  # of the ranges past the decodes, of many tokens
    small_tiles: Tiles  # of ranges of any length, one token included
    chunk_tokens: int  # cached tokens that are read in an iteration
    decode_rows: int | None  # sequences that share one loop over chunks; None: all go by items of so many tokens


CPU_SIZES = Sizes(Tiles(at_once=1, rows=32), Tiles(at_once=8, rows=4), chunk_tokens=64, decode_rows=16)
# Launches cost more than work that is in vain: few of them, each with enough for all multiprocessors.
GPU_SIZES = Sizes(Tiles(at_once=8, rows=128), Tiles(at_once=64, rows=4), chunk_tokens=256, decode_rows=None)


def sizes_for(platform: str, *, deterministic: bool = False) -> Sizes:
    """Those for "cpu", "gpu" or "tpu"; of `deterministic` ones, a row's result does not depend on its range's length,
    if all ranges are past the decodes.
    """
    sizes = GPU_SIZES if platform == "gpu" else CPU_SIZES
    return sizes._replace(tiles=sizes.small_tiles) if deterministic else sizes


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
    kv_scales: Float[Array, "2 K"] | None = None,
    bits_of: DTypeLike | None = None,
    sizes: Sizes = CPU_SIZES,
    whole_prompts: Implementation | None = None,
) -> tuple[Float[Array, "T N H"], Num[Array, "L P 2 K S H"]]:
    """Specified by `pallas_kernels.reference`; products in the queries' type, accumulated in float32.

    Pages of uint8 hold the bits of the 8-bit float `bits_of`. With `whole_prompts`, ranges of several tokens that begin
    their sequence are left to that dense attention.

    Raises:
        ValueError: cuDNN's has no place for these types or options.
    """
    if whole_prompts == "cudnn":
        check_cudnn(queries.shape[2], queries.dtype, pages.dtype, soft_cap=soft_cap, has_sinks=sinks is not None)
    prompts = None if whole_prompts is None else begins_here(query_starts, kv_lengths, num_decodes)
    fresh = queries, keys, values
    queries, keys, values = divided_by_scales(queries, keys, values, kv_scales)
    tables, seen = (block_tables, token_sequences, positions), (scale, window, soft_cap, sinks)
    pages = write_pages(keys, values, pages, *tables, layer, bits_of=bits_of)
    groups = _Groups(queries, pages, block_tables, positions, layer, *seen, ALL_PAGES, sizes, bits_of)
    out = _attend_all(groups, query_starts, num_decodes, partial(_whole, dtype=queries.dtype), elsewhere=prompts)
    if kv_scales is not None:
        out = scale_heads(out, kv_scales[1])
    if prompts is not None and whole_prompts is not None:
        out = attend_whole(out, *fresh, query_starts, prompts, scale=scale, window=window, implementation=whole_prompts)
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
    kv_scales: Float[Array, "2 K"] | None = None,
    bits_of: DTypeLike | None = None,
    sizes: Sizes = CPU_SIZES,
) -> tuple[Partial, Num[Array, "L P 2 K S H"]]:
    """`ragged_paged_attention` where only a stripe of every sequence's pages is here: it writes and sees those alone.

    `block_tables` hold the pages of the stripe, side by side: column m is page `rank + m * num` of a sequence.
    """
    queries, keys, values = divided_by_scales(queries, keys, values, kv_scales)
    tables, seen = (block_tables, token_sequences, positions), (scale, window, soft_cap, None)
    pages = write_pages(keys, values, pages, *tables, layer, stripe, bits_of=bits_of)
    groups = _Groups(queries, pages, block_tables, positions, layer, *seen, stripe, sizes, bits_of)
    out = _attend_all(groups, query_starts, num_decodes, _side_by_side_parts)
    values = out[..., :-2] if kv_scales is None else scale_heads(out[..., :-2], kv_scales[1])
    return Partial(values, out[..., -2], out[..., -1]), pages


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
    finish: _Finish,
    *,
    elsewhere: Bool[Array, " B"] | None = None,
) -> Float[Array, "T N W"]:
    """Decode rows first, then longer ranges, a group of tiles at a time, without those that are seen to `elsewhere`."""
    num_tokens, tiles = groups.queries.shape[0], groups.sizes.tiles
    if groups.sizes.decode_rows is None:
        out = _attend_by_items(groups, num_decodes, finish)
    else:
        out = _attend_by_groups(groups, num_decodes, finish)
    if num_tokens == 1:
        return out

    rows = min(tiles.rows, num_tokens)
    cut = jnp.arange(query_starts.shape[0] - 1) >= num_decodes
    cut = cut if elsewhere is None else cut & ~elsewhere
    tile_sequences, tile_starts, num_tiles = cut_ranges(query_starts, cut, rows, num_tokens)

    def longer(group: Int[Array, ""], out: Float[Array, "T N W"]) -> Float[Array, "T N W"]:
        tile = group * tiles.at_once + jnp.arange(tiles.at_once)
        sequences, starts = tile_sequences[tile], tile_starts[tile]
        index = starts[:, None] + jnp.arange(rows)
        mine = (index < query_starts[sequences + 1][:, None]) & (tile < num_tiles)[:, None]
        fresh = groups.attend(jnp.minimum(index, num_tokens - 1), sequences, mine, finish)
        return out.at[jnp.where(mine, index, num_tokens)].set(fresh, mode="drop")

    return lax.fori_loop(0, (num_tiles + tiles.at_once - 1) // tiles.at_once, longer, out)


def _attend_by_groups(groups: "_Groups", num_decodes: Int[Array, ""], finish: _Finish) -> Float[Array, "T N W"]:
    """The decode rows, some sequences at a time; the others are zero."""
    num_tokens, num_sequences = groups.queries.shape[0], groups.block_tables.shape[0]
    rows = min(groups.sizes.decode_rows or 1, num_sequences, num_tokens)

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

    return lax.fori_loop(0, (num_decodes + rows - 1) // rows, decode, out)


def _attend_by_items(groups: "_Groups", num_decodes: Int[Array, ""], finish: _Finish) -> Float[Array, "T N W"]:
    """The decode rows, by the items of one list of all their chunks; the others are zero."""
    num_tokens, num_heads, head_dim = groups.queries.shape
    num_rows = min(groups.block_tables.shape[0], num_tokens)
    at_once = items_a_trip(num_rows)
    met = min(at_once, num_rows)  # sequences in a trip, at most
    positions = groups.positions[:num_rows]
    first, end = groups.chunks(groups.first_seen(positions), positions)
    # One at least, also where a stripe has none of a sequence's pages, so that a trip's sequences are neighbours.
    counts = jnp.where(jnp.arange(num_rows) < num_decodes, jnp.maximum(end - first, 1), 0)
    ends = jnp.cumsum(counts)

    def trip(index: Int[Array, ""], running: Softmaxes) -> Softmaxes:
        number = index * at_once + jnp.arange(at_once)
        row = jnp.minimum(rows_of(number, ends), num_rows - 1)
        real = number < ends[-1]
        chunk = first[row] + number - (ends - counts)[row]
        items = groups.items(row, real, chunk)
        fresh = attend_items(
            groups.queries[row],
            groups.pages,
            items,
            layer=groups.layer,
            scale=groups.scale,
            soft_cap=groups.soft_cap,
            bits_of=groups.bits_of,
        )
        return merge_items(running, fresh, items, met)

    # Room for a slice of as many as a trip meets, wherever it begins.
    num_kv_heads = groups.pages.shape[3]
    start = groups.seen_first((num_rows + met, num_kv_heads, 1, num_heads // num_kv_heads))
    maximum, total = (part.reshape(-1, num_heads) for part in start)
    running = Softmaxes(maximum, total, jnp.zeros((num_rows + met, num_heads, head_dim), jnp.float32))
    running = lax.fori_loop(0, (ends[-1] + at_once - 1) // at_once, trip, running)
    out = finish(*(part[:num_rows] for part in running))
    out = jnp.where((jnp.arange(num_rows) < num_decodes)[:, None, None], out, 0)
    return jnp.pad(out, ((0, num_tokens - num_rows), (0, 0), (0, 0)))


def write_pages(
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Num[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    layer: int | Int[Array, ""],
    stripe: Stripe = ALL_PAGES,
    *,
    bits_of: DTypeLike | None = None,
) -> Num[Array, "L P 2 K S H"]:
    """Scatter the step's keys and values into their pages, in place where `pages` is donated, without padding rows and
    those of other stripes.
    """
    num_sequences = block_tables.shape[0]
    num_pages, page_size = pages.shape[1], pages.shape[4]
    owner, index = jnp.minimum(token_sequences, num_sequences - 1), positions // page_size
    is_here = (token_sequences < num_sequences) & (index % stripe.num == stripe.rank)
    page = jnp.where(is_here, block_tables[owner, index // stripe.num], num_pages)
    new = narrow(jnp.stack([keys, values], axis=1), pages.dtype, bits_of)
    return pages.at[layer, page, :, :, positions % page_size].set(new, mode="drop")


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
        sizes: Sizes,
        bits_of: DTypeLike | None,
    ) -> None:
        self.stripe, self.sizes, self.bits_of = stripe, sizes, bits_of
        self.queries, self.pages, self.positions = queries, pages, positions
        self.layer, self.scale, self.window, self.soft_cap, self.sinks = layer, scale, window, soft_cap, sinks
        self.chunk_pages = max(1, sizes.chunk_tokens // pages.shape[4])
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
            firsts = jnp.min(jnp.where(real, self.first_seen(positions), last), axis=1)
        first, end = self.chunks(jnp.min(firsts), last)
        tables = self.block_tables[sequences]

        def seen(places: Int[Array, " CS"]) -> Bool[Array, "R CS"]:
            # Others may hold anything, NaN included: a zero weight must not multiply them.
            return (places >= firsts[:, None]) & (places <= lasts[:, None])

        def step(index: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, out = carry
            table = lax.dynamic_slice_in_dim(tables, index * self.chunk_pages, self.chunk_pages, axis=1)
            # Gathered apart: one gather of both would be copied again when it is split.
            keys, values = self.pages[self.layer, table, 0], self.pages[self.layer, table, 1]  # [R, C, K, S, H] each
            keys, values = (widened(part, queries.dtype, self.bits_of) for part in (keys, values))
            scores = chunk_scores(queries, keys)
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
            return new_maximum, total, out * shrink[..., None] + weighted_values(weights, values)

        shape = queries.shape[:-1]
        start = (*self.seen_first(shape), jnp.zeros(queries.shape, jnp.float32))
        out = finish(*lax.fori_loop(first, end, step, start))
        return out.transpose(0, 2, 1, 3, 4).reshape(num_tiles, num_rows, -1, out.shape[-1])

    def first_seen(self, positions: Int[Array, "..."]) -> Int[Array, "..."]:
        """The first position that each query sees."""
        return jnp.zeros_like(positions) if self.window is None else jnp.maximum(positions - self.window + 1, 0)

    def chunks(self, first: Int[Array, "..."], last: Int[Array, "..."]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
        """The chunks of the stripe's pages with positions `first` to `last`: the first, and the one behind them."""
        (rank, count), page_size = self.stripe, self.pages.shape[4]
        begin = (first // page_size - rank + count - 1) // count // self.chunk_pages
        return begin, (last // page_size - rank) // count // self.chunk_pages + 1

    def items(self, rows: Int[Array, " W"], real: Bool[Array, " W"], chunks: Int[Array, " W"]) -> Items:
        """A chunk of each of these sequences, which have one query."""
        (rank, count), page_size = self.stripe, self.pages.shape[4]
        within = jnp.arange(self.chunk_pages * page_size)
        column = chunks[:, None] * self.chunk_pages + within // page_size
        place = (rank + count * column) * page_size + within % page_size
        position = self.positions[rows][:, None]
        seen = real[:, None] & (place >= self.first_seen(position)) & (place <= position)
        # What is not seen is read from page 0, whichever it is: it stays in the GPU's cache.
        pages = jnp.where(seen, self.block_tables[rows[:, None], jnp.where(seen, column, 0)], 0)
        return Items(rows, real, pages, within % page_size, seen)

    def seen_first(self, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Maximum and sum of the running softmax before the first token: nothing, or each head's sink."""
        if self.sinks is None:
            return jnp.full(shape, -1e30, jnp.float32), jnp.zeros(shape, jnp.float32)
        sinks = self.sinks.astype(jnp.float32).reshape(1, shape[1], 1, shape[3])
        return jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32)
