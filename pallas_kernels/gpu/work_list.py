"""A step's attention as a flat list of work items, built once a step and shared by its layers.

A tile is up to `ROWS` rows of queries: tokens of one sequence, each with all query heads of a kv head. Its keys are cut
into parts, so that few sequences keep all multiprocessors busy too (split-K, as in Flash-Decoding, Dao et al. 2023). An
item is one part of one tile; every kv head does it by itself.

A tile begins where a bulk tensor copy can: that moves whole tiles of shared memory's arrangement, `ALIGNMENT` rows
each, and where one begins within such a tile, zeros come instead of the rows behind its edge. So a token's query heads
are padded to fill them, and a range's first tile may begin with tokens before the range, whose results nobody sees.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

GROUP_ROWS = 64  # of the matrix unit, which a warpgroup drives
ROWS = 2 * GROUP_ROWS  # of a tile: two warpgroups' worth
CHUNK = 64  # tokens of keys and values that are read at a time
LEAST_PART = 4 * CHUNK  # shorter parts are not worth a merge
FIXED_PARTS = 8  # of the longest sequence, where parts are fixed
ALIGNMENT = 8  # rows: copies of queries begin at multiples

# Columns of an item. The first row and position and the number of tokens count `SKIPPED` tokens before the range in.
SEQUENCE, FIRST_ROW, NUM_TOKENS, FIRST_POSITION, FIRST_KEY, END_KEY, OUTPUT, SKIPPED = range(8)


def rows_a_token(heads_a_group: int) -> int:
    """Rows that a token takes of a tile: a divisor or a multiple of `ALIGNMENT`."""
    if heads_a_group >= ALIGNMENT:
        return -(-heads_a_group // ALIGNMENT) * ALIGNMENT
    return 1 << (heads_a_group - 1).bit_length()


class Stripe(NamedTuple):
    """Which pages of every sequence are here: page `rank`, and every `num`-th one after it; keys are then counted
    without the others.
    """

    rank: int | Int[Array, ""]
    num: int
    page_size: int

    def first_key(self, position: Int[Array, " N"]) -> Int[Array, " N"]:
        """The first key here of the page that a position is in, and of those behind it."""
        page = position // self.page_size - self.rank
        return jnp.maximum(-(-page // self.num), 0) * self.page_size

    def end_key(self, position: Int[Array, " N"]) -> Int[Array, " N"]:
        """The one behind the last key here of the pages up to that which a position is in."""
        page = position // self.page_size - self.rank
        return jnp.maximum(page // self.num + 1, 0) * self.page_size


@dataclass(frozen=True)
class WorkShape:
    """The static sizes of a step's list, for `num_tokens` rows of `num_sequences` sequences at most."""

    num_tokens: int
    num_sequences: int
    tile_tokens: int
    aligned_tokens: int  # tiles begin at multiples
    most_tiles: int
    max_parts: int  # of one tile
    num_items: int  # room for them
    fixed_part: int | None = None  # chunks in a part, which then begins at a multiple; None: what suits the step

    @classmethod
    def of(
        cls,
        num_tokens: int,
        num_sequences: int,
        num_heads: int,
        num_kv_heads: int,
        multiprocessors: int,
        fixed_tokens: int | None = None,
    ) -> "WorkShape":
        """With `fixed_tokens`, what a sequence may have at most, how its keys are cut is fixed, and all tiles are
        narrow: then a row's sums have one order, whatever else is in its step or its range.
        """
        rows = rows_a_token(num_heads // num_kv_heads)
        tile_tokens, aligned_tokens = (ROWS if fixed_tokens is None else GROUP_ROWS) // rows, max(1, ALIGNMENT // rows)
        skipped = (aligned_tokens - 1) * num_sequences  # at most
        most_tiles = min(num_tokens, (num_tokens + skipped) // tile_tokens + num_sequences)
        if fixed_tokens is not None:
            num_chunks = -(-fixed_tokens // CHUNK)
            part = max(LEAST_PART // CHUNK, -(-num_chunks // FIXED_PARTS))
            parts = -(-num_chunks // part)
            sizes = most_tiles, parts, most_tiles * parts
            return cls(num_tokens, num_sequences, tile_tokens, aligned_tokens, *sizes, fixed_part=part)
        # Two items for each multiprocessor even out their lengths. Large steps fill the chip without parts.
        wanted = -(-2 * multiprocessors // num_kv_heads)
        max_parts = min(16, max(2, -(-2 * wanted // most_tiles)))
        num_items = most_tiles + min(wanted, most_tiles * max_parts)
        return cls(num_tokens, num_sequences, tile_tokens, aligned_tokens, most_tiles, max_parts, num_items)


class Work(NamedTuple):
    """A step's items, and where each token row finds its results."""

    items: Int[Array, "W C"]  # the longest first
    num_items: Int[Array, " one"]
    first_items: Int[Array, " T"]  # the output of the first part of each token row's tile; the others follow
    num_parts: Int[Array, " T"]  # 0 for padding rows
    num_tokens: Int[Array, " T"]  # of each token row's tile, those skipped included
    places: Int[Array, " T"]  # of the token in its tile


def build_work(
    query_starts: Int[Array, " boundaries"],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    shape: WorkShape,
    window: int | None,
    stripe: Stripe | None = None,
) -> Work:
    """The items of a step whose sequences' ranges are `query_starts`; of a `stripe` of its pages, or all."""
    tokens = shape.tile_tokens
    starts, ends = query_starts[:-1], query_starts[1:]
    aligned = starts - starts % shape.aligned_tokens
    tiles_of = jnp.where(ends > starts, -(-(ends - aligned) // tokens), 0)
    tile_ends = jnp.cumsum(tiles_of)
    tile = jnp.arange(shape.most_tiles)
    sequence = jnp.minimum(
        jnp.searchsorted(tile_ends, tile, side="right", method="compare_all"), shape.num_sequences - 1
    )
    is_tile = tile < tile_ends[-1]
    first_row = jnp.where(is_tile, aligned[sequence] + (tile - (tile_ends - tiles_of)[sequence]) * tokens, 0)
    num_tokens = jnp.where(is_tile, jnp.minimum(tokens, ends[sequence] - first_row), 0)
    skipped = jnp.where(is_tile, jnp.maximum(starts[sequence] - first_row, 0), 0)
    own_position = positions[first_row + skipped]
    first_position = own_position - skipped
    end_key = first_position + num_tokens
    first_key = jnp.zeros_like(end_key) if window is None else jnp.maximum(own_position - window + 1, 0)
    if stripe is not None:
        first_key, end_key = stripe.first_key(first_key), stripe.end_key(end_key - 1)
    first_chunk = first_key // CHUNK
    num_chunks = jnp.where(is_tile & (end_key > first_key), -(-end_key // CHUNK) - first_chunk, 0)
    part, base = _parts(first_chunk, num_chunks, shape)
    parts_of = jnp.where(num_chunks > 0, -(-(first_chunk + num_chunks - base) // part), 0)
    item_ends = jnp.cumsum(parts_of)
    item = jnp.arange(shape.num_items)
    own = jnp.minimum(jnp.searchsorted(item_ends, item, side="right", method="compare_all"), tile.shape[0] - 1)
    own_base = base[own] + (item - (item_ends - parts_of)[own]) * part[own]
    begin = jnp.maximum(own_base, first_chunk[own]) * CHUNK
    end = jnp.minimum((own_base + part[own]) * CHUNK, end_key[own])
    is_item = item < item_ends[-1]
    columns = (sequence[own], first_row[own], num_tokens[own], first_position[own], begin, end, item, skipped[own])
    items = jnp.stack(columns, axis=1)
    order = jnp.argsort(jnp.where(is_item, begin - end, 1))
    owner = jnp.minimum(token_sequences, shape.num_sequences - 1)
    in_range = jnp.arange(shape.num_tokens) - aligned[owner]
    tile_of = jnp.clip((tile_ends - tiles_of)[owner] + in_range // tokens, 0, tile.shape[0] - 1)
    is_real = token_sequences < shape.num_sequences
    return Work(
        items[order].astype(jnp.int32),
        item_ends[-1:].astype(jnp.int32),
        (item_ends - parts_of)[tile_of].astype(jnp.int32),
        jnp.where(is_real, parts_of[tile_of], 0).astype(jnp.int32),
        num_tokens[tile_of].astype(jnp.int32),
        (in_range % tokens).astype(jnp.int32),
    )


def _parts(
    first_chunk: Int[Array, " N"], num_chunks: Int[Array, " N"], shape: WorkShape
) -> tuple[Int[Array, " N"], Int[Array, " N"]]:
    """How many chunks each tile's parts have, and where the first would begin."""
    if shape.fixed_part is not None:
        part = jnp.full_like(num_chunks, shape.fixed_part)
        return part, first_chunk - first_chunk % shape.fixed_part
    room = shape.num_items - num_chunks.shape[0]
    part = jnp.maximum(LEAST_PART // CHUNK, -(-jnp.sum(num_chunks) // max(room, 1)))
    return jnp.maximum(part, -(-num_chunks // shape.max_parts)), first_chunk
