"""Pages of one segment after another, on their way from HBM to VMEM while the block before them is worked on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Scalar = jax.Array  # int32, shape ()


@dataclass(frozen=True)
class View:
    """A part of a one-dimensional ref, indexed from 0."""

    ref: jax.Ref
    offset: int
    size: int

    @property
    def shape(self) -> tuple[int]:
        return (self.size,)

    def __getitem__(self, index: jax.Array | int) -> jax.Array:
        return self.ref[self.offset + index]


class Copy(Protocol):
    """An asynchronous copy; JAX's own type for it has no public name."""

    def start(self) -> None: ...

    def wait(self) -> None: ...


COPIES_AT_ONCE = 4  # started side by side: their addresses are computed in each other's shadow
TABLE_SLOTS = 3  # the block at work, the one on its way, and the one whose page numbers are


@dataclass(frozen=True)
class Item:
    """One block of one segment, the `index`-th of a run."""

    segment: Scalar
    block: Scalar
    index: Scalar

    @property
    def slot(self) -> Scalar:
        """Where its pages lie in the buffer."""
        return lax.rem(self.index, 2)

    @property
    def table_slot(self) -> Scalar:
        """Where its page numbers lie in the table buffer."""
        return lax.rem(self.index, TABLE_SLOTS)


@dataclass(frozen=True)
class PageStream:
    """The blocks of a list of segments, double-buffered across segment boundaries.

    A segment reads tokens `first..last` of one sequence; a block is `block_pages` pages at a multiple of that size.
    Page numbers come to SMEM one block ahead of the pages, and pages one block ahead of the work.
    """

    page_size: int
    layer: Scalar
    sequences: View  # [X] SMEM: the sequence of each segment
    firsts: View  # [X] SMEM: the first token that a segment reads
    lasts: View  # [X] SMEM: the last one
    tables: jax.Ref  # [B, blocks, 1, block_pages] HBM
    pages: jax.Ref  # [L, P, planes, K, S, W] HBM
    table_buffer: jax.Ref  # [TABLE_SLOTS, 1, block_pages] SMEM
    buffer: jax.Ref  # [2, block_pages, planes, K, S, W] VMEM
    table_semaphores: jax.Ref  # [TABLE_SLOTS]
    semaphores: jax.Ref  # [2]

    @property
    def block_pages(self) -> int:
        return self.buffer.shape[1]

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_size

    def run(self, first_segment: Scalar | int, num_items: Scalar, work: Callable[[Item], None]) -> None:
        """Call `work(item)` for `num_items` blocks, from the first one of `first_segment` on, each with its pages in
        the buffer.
        """
        start = jnp.asarray(first_segment, jnp.int32)
        first = Item(start, self._first_block(start), jnp.int32(0))
        second = self._next(first)

        @pl.when(num_items > 0)
        def _() -> None:
            self._table_copy(first).start()
            self._fetch(first)

        @pl.when(num_items > 1)
        def _() -> None:
            self._table_copy(second).start()

        def step(index: Scalar, carry: tuple[Scalar, Scalar, Scalar, Scalar]) -> tuple[Scalar, Scalar, Scalar, Scalar]:
            now, after = Item(carry[0], carry[1], index), Item(carry[2], carry[3], index + 1)
            third = self._next(after)

            @pl.when(after.index < num_items)
            def _() -> None:
                self._fetch(after)

            @pl.when(third.index < num_items)
            def _() -> None:
                self._table_copy(third).start()

            self._wait(now)
            work(now)
            return after.segment, after.block, third.segment, third.block

        lax.fori_loop(0, num_items, step, (first.segment, first.block, second.segment, second.block))

    def clear_values(self, item: Item, begin: Scalar, end: Scalar, chunk: int) -> None:
        """Zero the values beside tokens `begin..end - 1` in the chunks these touch: a weight of zero does not undo what
        a page holds past its sequence's end, or what the buffer held, if that is NaN.
        """
        size = self.page_size
        first, last = begin // chunk * chunk // size, (end + chunk - 1) // chunk * chunk // size
        # Pages before the one that holds `begin`, this one too if begin lies within it; the same at the end.
        before, after = (begin + size - 1) // size - first, last - end // size
        plane = self.buffer.shape[2] - 1

        def clear(index: Scalar, _: None) -> None:
            page = jnp.where(index < before, first + index, end // size + index - before)
            for head in range(self.buffer.shape[3]):
                values = self.buffer[item.slot, page, plane, head]
                self.buffer[item.slot, page, plane, head] = _keep_rows(values, begin - page * size, end - page * size)

        lax.fori_loop(0, before + after, clear, None)

    def is_last(self, item: Item) -> Scalar:
        """Whether the item is its segment's last."""
        return item.block == self.lasts[item.segment] // self.block_tokens

    def is_first(self, item: Item) -> Scalar:
        """Whether the item is its segment's first."""
        return item.block == self._first_block(item.segment)

    def _first_block(self, segment: Scalar) -> Scalar:
        return self.firsts[segment] // self.block_tokens

    def _next(self, item: Item) -> Item:
        ends = self.is_last(item)
        # Past the last segment anything will do: it is not fetched.
        segment = jnp.minimum(item.segment + ends.astype(jnp.int32), self.firsts.shape[0] - 1)
        return Item(segment, jnp.where(ends, self._first_block(segment), item.block + 1), item.index + 1)

    def _page_range(self, item: Item) -> tuple[Scalar, Scalar]:
        """First page of the block to be read, and how many."""
        base = item.block * self.block_tokens
        begin = jnp.maximum(self.firsts[item.segment] - base, 0) // self.page_size
        end = jnp.minimum(self.lasts[item.segment] - base, self.block_tokens - 1) // self.page_size + 1
        return begin, end - begin

    def page_number(self, item: Item, page: Scalar) -> Scalar:
        """The number in the pool of the block's `page`-th page."""
        return self.table_buffer[item.table_slot, 0, page]

    def _table_copy(self, item: Item) -> Copy:
        return pltpu.make_async_copy(
            self.tables.at[self.sequences[item.segment], item.block],
            self.table_buffer.at[item.table_slot],
            self.table_semaphores.at[item.table_slot],
        )

    def _fetch(self, item: Item) -> None:
        """Wait for the item's page numbers and start a copy for each of its pages."""
        self._table_copy(item).wait()
        begin, count = self._page_range(item)

        slot, table_slot = item.slot, item.table_slot
        pages, semaphore = self.pages.at[self.layer], self.semaphores.at[slot]

        def start(page: Scalar) -> None:
            source = pages.at[self.table_buffer[table_slot, 0, page]]
            pltpu.make_async_copy(source, self.buffer.at[slot, page], semaphore).start()

        def several(index: Scalar, _: None) -> None:
            for offset in range(COPIES_AT_ONCE):
                start(begin + index * COPIES_AT_ONCE + offset)

        runs = count // COPIES_AT_ONCE
        lax.fori_loop(0, runs, several, None)
        lax.fori_loop(begin + runs * COPIES_AT_ONCE, begin + count, lambda page, _: start(page), None)

    def _wait(self, item: Item) -> None:
        """Wait until the item's pages are there: a semaphore counts bytes, so one wait serves many pages."""
        _, count = self._page_range(item)
        power = 1
        while power <= self.block_pages:
            pages = self.buffer.at[item.slot, pl.ds(0, power)]

            @pl.when((count & power) != 0)
            def _(pages: jax.Ref = pages) -> None:
                pltpu.make_async_copy(pages, pages, self.semaphores.at[item.slot]).wait()

            power *= 2


def _keep_rows(rows: jax.Array, begin: Scalar, end: Scalar) -> jax.Array:
    """Rows `begin..end - 1` of [S, W], zero elsewhere; without arithmetic in the type of the rows, of which some chips
    have none.
    """
    per_word = 4 // rows.dtype.itemsize  # rows that share the words of a register
    words = pltpu.bitcast(rows, jnp.int32)
    first = lax.broadcasted_iota(jnp.int32, words.shape, 0) * per_word
    bits = 32 // per_word

    def below(row: Scalar) -> jax.Array:
        """Ones in the bits of rows below `row`."""
        count = jnp.clip(row - first, 0, per_word)
        return jnp.where(count == per_word, -1, (1 << (count * bits)) - 1)

    return pltpu.bitcast(words & below(end) & ~below(begin), rows.dtype)
