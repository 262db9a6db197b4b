"""Attention of ranges longer than one token: blocks of query rows over the pages of each sequence they hold.

Blocks lie at fixed token rows, so a block may hold the end of one sequence and the beginning of others; a segment is
one such pair of block and sequence, and rows of other sequences are masked in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_engine.pallas_kernels.tpu.blocks import UNITS_A_TRIP
from jax_engine.pallas_kernels.tpu.geometry import LANES, Geometry
from jax_engine.pallas_kernels.tpu.online_softmax import HIDDEN, SoftmaxState, product, repeat_lanes, score_transform
from jax_engine.pallas_kernels.tpu.page_stream import Copy, Item, PageStream, Scalar, View

NOWHERE = -(2**30)  # the place of a row that belongs to another sequence
ROWS_WEIGHED = 32  # of a unit, side by side in registers


@dataclass(frozen=True)
class _Unit:
    """Some rows of one head, and a chunk."""

    head: Scalar
    row: Scalar  # first row
    token: Scalar  # the chunk's first token in the block


@dataclass(frozen=True)
class PrefillPhase:
    """One call's work on longer ranges. Rows are tokens times the query heads of one kv head."""

    geometry: Geometry
    block_tokens: int  # query tokens of a block
    rows_at_once: int  # rows of a unit
    chunk: int  # cached tokens of a unit
    window: int | None
    soft_cap: float | None
    stream: PageStream
    blocks: View  # [X] SMEM: the query block of each segment
    starts: View  # [X] SMEM: a segment's first token row
    stops: View  # [X] SMEM: one past its last
    queries: jax.Ref  # [K, T * G, W] HBM, scaled
    row_tokens: jax.Ref  # [block rows, 128] int32 VMEM: the token of a block that each row belongs to
    sinks: jax.Ref | None  # [K, block rows, 128] VMEM
    out: jax.Ref  # [K, T * G, W] HBM
    query_buffer: jax.Ref  # [2, K, block rows, W]
    out_buffer: jax.Ref  # [2, K, block rows, W]
    scores: tuple[jax.Ref, jax.Ref]  # [rows at once, chunk] float32
    weights: tuple[jax.Ref, jax.Ref]  # [rows at once, chunk]
    places: jax.Ref  # [block rows, 128] int32: see `_place_rows`
    shrinks: tuple[jax.Ref, jax.Ref]  # [rows at once, 128] float32
    state: SoftmaxState  # [K, block rows, ...]
    query_semaphores: jax.Ref  # [2]
    out_semaphores: jax.Ref  # [2]

    @property
    def block_rows(self) -> int:
        return self.block_tokens * self.geometry.queries_per_head

    def run(self, first_segment: Scalar, stop: Scalar, num_items: Scalar) -> None:
        """Attend for segments `first_segment..stop - 1`, which take `num_items` page blocks."""

        @pl.when(num_items > 0)
        def _() -> None:
            self._query_copy(self.blocks[first_segment]).start()

        self.stream.run(first_segment, num_items, partial(self._work, first_segment, stop))

        @pl.when(num_items > 0)
        def _() -> None:
            first, last = self.blocks[first_segment], self.blocks[stop - 1]
            self._out_copy(last).wait()

            @pl.when(last > first)
            def _() -> None:
                self._out_copy(last - 1).wait()

    def _copy(self, hbm: jax.Ref, vmem: jax.Ref, semaphores: jax.Ref, block: Scalar) -> tuple[jax.Ref, ...]:
        slot = lax.rem(block, 2)
        first = pl.multiple_of(block * self.block_rows, self.block_rows)
        return hbm.at[:, pl.ds(first, self.block_rows), :], vmem.at[slot], semaphores.at[slot]

    def _query_copy(self, block: Scalar) -> Copy:
        source, target, semaphore = self._copy(self.queries, self.query_buffer, self.query_semaphores, block)
        return pltpu.make_async_copy(source, target, semaphore)

    def _out_copy(self, block: Scalar) -> Copy:
        target, source, semaphore = self._copy(self.out, self.out_buffer, self.out_semaphores, block)
        return pltpu.make_async_copy(source, target, semaphore)

    def _work(self, first_segment: Scalar, stop: Scalar, item: Item) -> None:
        segment, stream = item.segment, self.stream
        block = self.blocks[segment]
        before = self.blocks[jnp.maximum(segment - 1, 0)]
        after = self.blocks[jnp.minimum(segment + 1, stop - 1)]
        opens = stream.is_first(item) & ((segment == first_segment) | (before != block))
        closes = stream.is_last(item) & ((segment == stop - 1) | (after != block))

        @pl.when(opens)
        def _() -> None:
            self.state.reset(self.sinks)
            self._query_copy(block).wait()

            @pl.when(block < self.blocks[stop - 1])
            def _() -> None:
                self._query_copy(block + 1).start()

        self._attend(item)

        @pl.when(closes)
        def _() -> None:
            @pl.when(block - 2 >= self.blocks[first_segment])
            def _() -> None:
                self._out_copy(block - 2).wait()

            def store(head: Scalar, _: None) -> None:
                self.out_buffer[lax.rem(block, 2), head] = self.state.result(head).astype(self.out_buffer.dtype)

            lax.fori_loop(0, self.geometry.num_kv_heads, store, None)
            self._out_copy(block).start()

    def _attend(self, item: Item) -> None:
        """The segment's rows over the chunks of the block: without masks where every row sees every token."""
        stream, segment = self.stream, item.segment
        base = item.block * stream.block_tokens
        begin = jnp.maximum(stream.firsts[segment] - base, 0)
        end = jnp.minimum(stream.lasts[segment] - base + 1, stream.block_tokens)
        start, stop = self.starts[segment], self.stops[segment]
        position = stream.lasts[segment] - (stop - 1 - start)  # of the segment's first row
        first, last = begin // self.chunk, (end + self.chunk - 1) // self.chunk
        # Every row sees tokens up to the first row's position, from the last row's window on.
        whole_begin = first
        if self.window is not None:
            whole_begin = (
                jnp.maximum(stream.lasts[segment] - self.window + 1 - base, 0) + self.chunk - 1
            ) // self.chunk
        whole_end = jnp.clip(position + 1 - base, 0, stream.block_tokens) // self.chunk
        whole = jnp.maximum(whole_end - whole_begin, 0)
        whole = jnp.where(stop - start == self.block_tokens, whole, 0)
        before = jnp.where(whole > 0, whole_begin - first, last - first)
        after = jnp.where(whole > 0, last - whole_end, 0)

        stream.clear_values(item, begin, end, self.chunk)
        self._chunks(item, whole, lambda index: whole_begin + index, masked=False)

        @pl.when(before + after > 0)
        def _() -> None:
            self._place_rows(segment, position - base)

        def edge(index: Scalar) -> Scalar:
            return jnp.where(index < before, first + index, whole_end + index - before)

        self._chunks(item, before + after, edge, masked=True)

    def _chunks(self, item: Item, count: Scalar, chunk_of: Callable[[Scalar], Scalar], *, masked: bool) -> None:
        """All rows' attention over `count` chunks of the block; masked by the places of the rows, or not.

        The work is cut into units of `rows_at_once` rows of one head and chunk, which go through three stages: products
        with keys, weights, products with values. Three units are under way at a time, one in each stage, so that the
        matrix unit works on two of them while the third is weighed.
        """
        tiles = self.block_rows // self.rows_at_once
        per_chunk = self.geometry.num_kv_heads * tiles
        units = count * per_chunk

        def unit_at(index: Scalar) -> _Unit:
            index = jnp.clip(index, 0, units - 1)
            inside = lax.rem(index, per_chunk)
            row = pl.multiple_of(lax.rem(inside, tiles) * self.rows_at_once, self.rows_at_once)
            return _Unit(inside // tiles, row, chunk_of(index // per_chunk) * self.chunk)

        @pl.when(units > 0)
        def _() -> None:
            self._score(item, unit_at(jnp.int32(0)), 0, masked=masked)
            # What the first pair finds in the third stage adds nothing.
            self.weights[1][...] = jnp.zeros(self.weights[1].shape, self.weights[1].dtype)
            self.shrinks[1][...] = jnp.ones(self.shrinks[1].shape, jnp.float32)

        def pair(index: Scalar, _: None) -> None:
            before, first, second, third = (unit_at(2 * index + offset) for offset in (-1, 0, 1, 2))
            self._add(item, before, 1)
            self._score(item, second, 1, masked=masked)
            self._weigh(first, 0)
            self._add(item, first, 0)
            self._score(item, third, 0, masked=masked)
            self._weigh(second, 1)

        lax.fori_loop(0, units // UNITS_A_TRIP, pair, None)

        @pl.when(units > 1)
        def _() -> None:
            self._add(item, unit_at(units // 2 * 2 - 1), 1)

        if per_chunk % 2:

            @pl.when(lax.rem(units, 2) == 1)
            def _() -> None:
                self._weigh(unit_at(units - 1), 0)
                self._add(item, unit_at(units - 1), 0)

    def _load(self, item: Item, unit: _Unit, plane: int) -> jax.Array:
        """Keys or values [chunk, W] of the unit's head and chunk."""
        size = self.geometry.page_size
        pages = pl.ds(unit.token // size, self.chunk // size)
        return self.stream.buffer[item.slot, pages, plane, unit.head].reshape(self.chunk, self.geometry.width)

    def _score(self, item: Item, unit: _Unit, buffer: int, *, masked: bool) -> None:
        """The unit's queries times its keys, into a score buffer."""
        parity = lax.rem(self.blocks[item.segment], 2)
        queries = self.query_buffer[parity, unit.head, pl.ds(unit.row, self.rows_at_once), :]
        scores = score_transform(self.soft_cap)(product(queries, self._load(item, unit, 0), 1))
        self.scores[buffer][...] = self._hide(unit, scores) if masked else scores

    def _weigh(self, unit: _Unit, buffer: int) -> None:
        """Take the unit's scores into the running softmax; leaves weights and the factor of what was summed before."""
        step = math.gcd(ROWS_WEIGHED, self.rows_at_once)
        for row in range(0, self.rows_at_once, step):
            rows = pl.ds(row, step)
            weights, shrink = self.state.weigh((unit.head, pl.ds(unit.row + row, step)), self.scores[buffer][rows, :])
            self.weights[buffer][rows, :] = weights.astype(self.geometry.compute_dtype)
            self.shrinks[buffer][rows, :] = shrink

    def _add(self, item: Item, unit: _Unit, buffer: int) -> None:
        """Add the unit's weighted values."""
        values = self._load(item, unit, self.geometry.planes - 1)
        weighted = product(self.weights[buffer][...], values, 0)
        self.state.add((unit.head, pl.ds(unit.row, self.rows_at_once)), self.shrinks[buffer][...], weighted)

    def _place_rows(self, segment: Scalar, position: Scalar) -> None:
        """Note the place of each row of the query block, counted from the page block that `position` counts from."""
        token = self.row_tokens[...] + self.blocks[segment] * self.block_tokens - self.starts[segment]
        inside = (token >= 0) & (token < self.stops[segment] - self.starts[segment])
        self.places[...] = jnp.where(inside, position + token, NOWHERE)

    def _hide(self, unit: _Unit, scores: jax.Array) -> jax.Array:
        """Hide from the unit's rows what they must not see."""
        place = self.places[pl.ds(unit.row, self.rows_at_once), :] - unit.token
        place = repeat_lanes(place, self.chunk // LANES)
        key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = key <= place
        if self.window is not None:
            seen &= key > place - self.window
        return jnp.where(seen, scores, HIDDEN)
