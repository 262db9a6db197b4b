"""Attention of ranges of one token: matrix-vector work at the speed of memory, the cache write fused into it.

The new token's row is merged into its page while that page lies in VMEM, and only the merged tile of rows goes back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_engine.pallas_kernels.tpu.blocks import RING
from jax_engine.pallas_kernels.tpu.geometry import Geometry
from jax_engine.pallas_kernels.tpu.online_softmax import HIDDEN, SoftmaxState, product, score_transform
from jax_engine.pallas_kernels.tpu.page_stream import Copy, Item, PageStream, Scalar


@dataclass(frozen=True)
class DecodePhase:
    """One call's decode work. A segment of its stream is a sequence: row, sequence and segment have one number."""

    geometry: Geometry
    chunk: int  # tokens a pass of the main loop takes
    tail_chunk: int  # tokens a pass over masked tokens takes; divides `chunk`
    soft_cap: float | None
    stream: PageStream
    queries: jax.Ref  # [B, groups, rows, W] HBM, scaled
    new: jax.Ref  # [B, planes, K, W] HBM, float32: the step's own keys and values
    sinks: jax.Ref | None  # [groups, rows, 128] VMEM
    out: jax.Ref  # [B, groups, rows, W] HBM
    query_buffer: jax.Ref  # [2, groups, rows, W]
    new_buffer: jax.Ref  # [2, planes, K, W]
    out_buffer: jax.Ref  # [RING, groups, rows, W]
    tile_buffer: jax.Ref  # [RING, planes, K, tile rows, W]
    state: SoftmaxState
    input_semaphores: jax.Ref  # [2]
    out_semaphores: jax.Ref  # [RING]
    tile_semaphores: jax.Ref  # [RING]

    def run(self, first: Scalar, stop: Scalar, num_items: Scalar) -> None:
        """Attend for sequences `first..stop - 1`, which take `num_items` blocks."""

        @pl.when(stop > first)
        def _() -> None:
            self._start_inputs(first)

        self.stream.run(first, num_items, partial(self._work, first, stop))
        for ago in range(RING):

            @pl.when(stop - first > ago)
            def _(ago: int = ago) -> None:
                self._wait_outputs(stop - 1 - ago)

    def _work(self, first: Scalar, stop: Scalar, item: Item) -> None:
        sequence, stream = item.segment, self.stream
        position = stream.lasts[sequence]
        base = item.block * stream.block_tokens
        begin = jnp.maximum(stream.firsts[sequence] - base, 0)
        end = jnp.minimum(position - base + 1, stream.block_tokens)

        @pl.when(stream.is_first(item))
        def _() -> None:
            self.state.reset(self.sinks)
            for copy in self._input_copies(sequence):
                copy.wait()

            @pl.when(sequence + 1 < stop)
            def _() -> None:
                self._start_inputs(sequence + 1)

        @pl.when(stream.is_last(item))
        def _() -> None:
            # The ring's entry may still be on its way out.
            @pl.when(sequence - first >= RING)
            def _() -> None:
                self._wait_outputs(sequence - RING)

            self._write(item, position - base)

        stream.clear_values(item, begin, end, self.tail_chunk)
        self._attend(item.slot, lax.rem(sequence, 2), begin, end)

        @pl.when(stream.is_last(item))
        def _() -> None:
            for group in range(self.geometry.num_groups):
                result = self.state.result(group).astype(self.out_buffer.dtype)
                self.out_buffer[lax.rem(sequence, RING), group] = result
            self._out_copy(sequence).start()

    def _input_copies(self, sequence: Scalar) -> tuple[Copy, ...]:
        slot = lax.rem(sequence, 2)
        semaphore = self.input_semaphores.at[slot]
        return (
            pltpu.make_async_copy(self.queries.at[sequence], self.query_buffer.at[slot], semaphore),
            pltpu.make_async_copy(self.new.at[sequence], self.new_buffer.at[slot], semaphore),
        )

    def _start_inputs(self, sequence: Scalar) -> None:
        for copy in self._input_copies(sequence):
            copy.start()

    def _out_copy(self, sequence: Scalar) -> Copy:
        entry = lax.rem(sequence, RING)
        return pltpu.make_async_copy(self.out_buffer.at[entry], self.out.at[sequence], self.out_semaphores.at[entry])

    def _tile_copy(self, sequence: Scalar, page: Scalar, row: Scalar) -> Copy:
        entry, rows = lax.rem(sequence, RING), self.geometry.tile_rows
        target = self.stream.pages.at[self.stream.layer, page, :, :, pl.ds(pl.multiple_of(row, rows), rows), :]
        return pltpu.make_async_copy(self.tile_buffer.at[entry], target, self.tile_semaphores.at[entry])

    def _wait_outputs(self, sequence: Scalar) -> None:
        self._out_copy(sequence).wait()
        self._tile_copy(sequence, jnp.int32(0), jnp.int32(0)).wait()  # any page: only the size counts

    def _write(self, item: Item, offset: Scalar) -> None:
        """Merge the new token, at token `offset` of the block, into the page in VMEM, and send its tile back."""
        geometry, sequence = self.geometry, item.segment
        page, row = offset // geometry.page_size, lax.rem(offset, geometry.page_size)
        rows = geometry.tile_rows
        first = pl.multiple_of(row // rows * rows, rows)
        entry, parity = lax.rem(sequence, RING), lax.rem(sequence, 2)
        is_new = lax.broadcasted_iota(jnp.int32, (rows, geometry.width), 0) == row - first
        for plane in range(geometry.planes):
            for head in range(geometry.num_kv_heads):
                tile = self.stream.buffer[item.slot, page, plane, head, pl.ds(first, rows), :]
                new = self.new_buffer[parity, plane, pl.ds(head, 1), :]
                merged = jnp.where(is_new, new, tile.astype(jnp.float32)).astype(tile.dtype)
                self.stream.buffer[item.slot, page, plane, head, pl.ds(first, rows), :] = merged
                self.tile_buffer[entry, plane, head] = merged
        self._tile_copy(sequence, self.stream.page_number(item, page), first).start()

    def _attend(self, slot: Scalar, parity: Scalar, begin: Scalar, end: Scalar) -> None:
        """Tokens `begin..end - 1` of the block in `slot`: whole chunks without masks, then what lies before and after
        them, in smaller ones, so that a short context costs what it is long.
        """
        per_chunk = self.chunk // self.tail_chunk
        first_whole, last_whole = (begin + self.chunk - 1) // self.chunk, end // self.chunk
        whole = jnp.maximum(last_whole - first_whole, 0)

        def main(index: Scalar, _: None) -> None:
            self._chunk(slot, parity, (first_whole + index) * self.chunk, self.chunk, None)

        lax.fori_loop(0, whole, main, None)
        first = begin // self.tail_chunk
        stop = (end + self.tail_chunk - 1) // self.tail_chunk
        # Without a whole chunk there is one run of small ones; otherwise one before the whole ones and one after.
        before = jnp.where(whole > 0, first_whole * per_chunk - first, stop - first)
        after = jnp.where(whole > 0, stop - last_whole * per_chunk, 0)

        def edge(index: Scalar, _: None) -> None:
            small = jnp.where(index < before, first + index, last_whole * per_chunk + index - before)
            self._chunk(slot, parity, small * self.tail_chunk, self.tail_chunk, (begin, end))

        lax.fori_loop(0, before + after, edge, None)

    def _chunk(
        self, slot: Scalar, parity: Scalar, start: Scalar, tokens: int, visible: tuple[Scalar, Scalar] | None
    ) -> None:
        """All heads' attention over `tokens` tokens from `start`; scores outside `visible` do not count."""
        geometry = self.geometry
        at_once = geometry.groups_at_once
        load = partial(self._load, slot, start, tokens)
        hide = self._hide(start, tokens, visible)
        if at_once == geometry.num_groups:
            self._groups(range(at_once), parity, load, hide)
            return

        def batch(index: Scalar, _: None) -> None:
            self._groups([index * at_once + offset for offset in range(at_once)], parity, load, hide)

        lax.fori_loop(0, geometry.num_groups // at_once, batch, None)

    def _groups(
        self,
        groups: Sequence[Scalar | int],
        parity: Scalar,
        load: Callable[[Scalar | int, Scalar | int], jax.Array],
        hide: Callable[[jax.Array], jax.Array],
    ) -> None:
        """The products of one group are issued before the values of the group before it, to keep the matrix unit busy
        while its scores are weighed.
        """
        geometry = self.geometry
        in_group = range(geometry.heads_per_group)
        own = lax.broadcasted_iota(jnp.int32, (geometry.group_rows, 1), 0) // geometry.queries_per_head
        transform = score_transform(self.soft_cap)

        def own_parts(part: Callable[[int], jax.Array]) -> jax.Array:
            """Of each row the part of its own kv head; padding rows are of any."""
            out = part(0)
            for head in in_group[1:]:
                out = jnp.where(own == head, part(head), out)
            return out

        def scores(group: Scalar | int) -> jax.Array:
            queries, first = self.query_buffer[parity, group], group * geometry.heads_per_group
            return hide(transform(own_parts(lambda head: product(queries, load(0, first + head), 1))))

        def values(group: Scalar | int, weights: jax.Array) -> jax.Array:
            first = group * geometry.heads_per_group
            # Where keys and values share rows, a plane that only the running program knows to be 0 keeps the compiler
            # from holding all rows in registers from the one use to the other.
            plane = 1 if geometry.planes == 2 else jnp.minimum(parity, 0)
            return own_parts(lambda head: product(weights, load(plane, first + head), 0))

        ahead = scores(groups[0])
        for position, group in enumerate(groups):
            weights, shrink = self.state.weigh(group, ahead)
            weights = weights.astype(geometry.compute_dtype)
            if position + 1 < len(groups):
                ahead = scores(groups[position + 1])
            self.state.add(group, shrink, values(group, weights))

    def _load(self, slot: Scalar, start: Scalar, tokens: int, plane: Scalar | int, head: Scalar | int) -> jax.Array:
        """Keys or values [tokens, W] of one head."""
        geometry = self.geometry
        pages = pl.ds(start // geometry.page_size, tokens // geometry.page_size)
        return self.stream.buffer[slot, pages, plane, head].reshape(tokens, geometry.width)

    def _hide(
        self, start: Scalar, tokens: int, visible: tuple[Scalar, Scalar] | None
    ) -> Callable[[jax.Array], jax.Array]:
        if visible is None:
            return lambda scores: scores
        token = start + lax.broadcasted_iota(jnp.int32, (self.geometry.group_rows, tokens), 1)
        seen = (token >= visible[0]) & (token < visible[1])
        return lambda scores: jnp.where(seen, scores, HIDDEN)
