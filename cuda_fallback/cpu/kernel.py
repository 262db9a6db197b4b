"""Ragged paged attention on a CPU, compiled by Numba.

A range is cut into tiles of queries, and a tile goes with one head of keys over its sequence's pages, in blocks of
`KEYS` that lie at fixed positions, with a running softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). A block's
keys are transposed once for all queries of the tile, so that neighbours in a vector are scores of neighbouring keys,
and no sum runs across a vector but those of the softmax. What a row goes through is the same, instruction by
instruction, whatever tile it lies in: its result depends neither on the rows beside it nor on the range it came in.
"""

from collections.abc import Callable
from typing import NamedTuple, no_type_check

import numpy as np
from numba import njit
from numpy.typing import NDArray

from jax_engine.cuda_fallback.cpu.call_frame import (
    ARGUMENTS,
    ATTRIBUTES,
    EXTENSION,
    RESULTS,
    answer_question,
    dimension,
    elements,
    scalar,
)
from jax_engine.cuda_fallback.cpu.sharing import (
    FRAME,
    NEXT_ITEM,
    NUM_DONE,
    NUM_ITEMS,
    add,
    address_of,
    ask_for_help,
    call,
    leave_block,
    look,
    num_threads,
    open_block,
    wait,
)
from jax_engine.cuda_fallback.cpu.vectors import (
    KEYS,
    add_values,
    read,
    set_word,
    transpose,
    weigh_scores,
    word,
    write,
    write_scores,
)

TILE_ROWS = 32  # query rows of a tile, at most: a query counts once for each head that shares its keys
WIDE, NARROW = 32, 8  # dimensions of a head that are summed at once, as long as there are so many left
WORK_OF_A_THREAD = 4096  # keys, each for a tile and a head: what pays for waking another thread
NOTHING = np.float32(-1e30)


class Step(NamedTuple):
    """One call: the arrays of `pallas_kernels.reference`, its sizes and its options (0: without)."""

    queries: NDArray
    keys: NDArray
    values: NDArray
    pages: NDArray
    tables: NDArray[np.int32]
    starts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    sinks: NDArray[np.float32]  # empty: none
    out: NDArray
    first_page: int  # where the layer's begin
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_sequences: int
    max_pages: int
    scale: np.float32
    soft_cap: np.float32
    window: int


class Scratch(NamedTuple):
    """What a tile works in, for `TILE_ROWS` rows or one query's."""

    queries: NDArray[np.float32]
    keys: NDArray[np.float32]  # of a block, [head_dim, KEYS]
    scores: NDArray[np.float32]  # and then the weights, [rows, KEYS]
    sums: NDArray[np.float32]  # of values, [rows, head_dim]
    largest: NDArray[np.float32]
    total: NDArray[np.float32]


class Tile(NamedTuple):
    """Queries of one sequence, and the head of keys that they go with."""

    sequence: int
    first_row: int
    position: int  # of the first query
    num_queries: int
    head: int


def make_task(dtype: type) -> Callable[[int], int]:
    """What every thread does that has part in a call, for Numba to compile: it takes a block, and returns nothing. The
    first one is the caller's.

    `dtype` is that of queries and pages, uint16 for bfloat16.
    """

    @no_type_check  # nor shapes, under pytest: Numba takes functions as they are
    def task(block: int) -> int:
        is_first = look(block, NUM_ITEMS) < 0
        item = -1 if is_first else add(block, NEXT_ITEM, 1)
        if is_first or item < look(block, NUM_ITEMS):  # else the call may have ended
            step = read_step(word(block, FRAME), dtype)
            if is_first:
                write_pages(step)
                share(step, block)
                item = add(block, NEXT_ITEM, 1)
            attend(step, block, item)
        if is_first:
            wait(block)
        leave_block(block)
        return 0

    return task


def make_handler(task_name: str) -> Callable[[int], int]:
    """The function that XLA calls, for Numba to compile: from the address of a call frame to an error, of which it has
    none. The C function of `make_task` is known by a name.
    """

    @no_type_check
    def handler(frame: int) -> int:
        extension = word(frame, EXTENSION)
        if extension:
            answer_question(extension)
        else:
            task = address_of(task_name)
            call(task, open_block(frame, task))
        return 0

    return handler


@njit(inline="always")
@no_type_check
def read_step(frame, dtype):
    """A call's arrays and numbers, as `attention.py` gives them; scalar attributes are in the order of their names."""
    arguments, results, attributes = word(frame, ARGUMENTS), word(frame, RESULTS), word(frame, ATTRIBUTES)
    queries, pages, tables = word(arguments, 0), word(arguments, 3), word(arguments, 4)
    num_tokens, num_heads, head_dim = dimension(queries, 0), dimension(queries, 1), dimension(queries, 2)
    num_layers, num_pages = dimension(pages, 0), dimension(pages, 1)
    num_kv_heads, page_size = dimension(pages, 3), dimension(pages, 4)
    num_sequences, max_pages = dimension(tables, 0), dimension(tables, 1)
    fresh, page = num_tokens * num_kv_heads * head_dim, 2 * num_kv_heads * page_size * head_dim
    return Step(
        elements(queries, num_tokens * num_heads * head_dim, dtype),
        elements(word(arguments, 1), fresh, dtype),
        elements(word(arguments, 2), fresh, dtype),
        elements(word(results, 1), num_layers * num_pages * page, dtype),
        elements(tables, num_sequences * max_pages, np.int32),
        elements(word(arguments, 5), num_sequences + 1, np.int32),
        elements(word(arguments, 6), num_sequences, np.int32),
        elements(word(arguments, 8), dimension(word(arguments, 8), 0), np.float32),
        elements(word(results, 0), num_tokens * num_heads * head_dim, dtype),
        np.int64(elements(word(arguments, 7), 1, np.int32)[0]) * num_pages * page,
        num_tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        page_size,
        num_sequences,
        max_pages,
        scalar(word(attributes, 0), np.float32),
        scalar(word(attributes, 1), np.float32),
        np.int64(scalar(word(attributes, 2), np.int32)),
    )


@njit(inline="always")
@no_type_check
def write_pages(step):
    """Copy the step's keys and values into their pages, and zeros into padding rows of the output."""
    width = step.num_heads * step.head_dim
    for place in range(np.int64(step.starts[step.num_sequences]) * width, step.num_tokens * width):
        step.out[place] = 0
    head_dim, page_size = step.head_dim, step.page_size
    plane = step.num_kv_heads * page_size * head_dim
    for sequence in range(step.num_sequences):
        first, end = np.int64(step.starts[sequence]), np.int64(step.starts[sequence + 1])
        position = np.int64(step.lengths[sequence]) - (end - first)
        for row in range(first, end):
            page = np.int64(step.tables[sequence * step.max_pages + position // page_size])
            to = step.first_page + page * 2 * plane + position % page_size * head_dim
            source = row * step.num_kv_heads * head_dim
            for _ in range(step.num_kv_heads):
                for h in range(head_dim):
                    step.pages[to + h] = step.keys[source + h]
                    step.pages[to + plane + h] = step.values[source + h]
                to += page_size * head_dim
                source += head_dim
            position += 1


@njit(inline="always")
@no_type_check
def share(step, block):
    """Say how many items there are, tiles of all ranges, and ask as many threads for help as there is work for: keys
    that are read, once for each tile and head.
    """
    num_queries = queries_a_tile(step)
    items = work = 0
    for sequence in range(step.num_sequences):
        tiles = (np.int64(step.starts[sequence + 1] - step.starts[sequence]) + num_queries - 1) // num_queries
        items += tiles * step.num_kv_heads
        work += tiles * step.num_kv_heads * step.lengths[sequence]
    set_word(block, NUM_ITEMS, items)
    if work >= 2 * WORK_OF_A_THREAD:
        for _ in range(min(num_threads(block), items, work // WORK_OF_A_THREAD) - 1):
            ask_for_help(block)


@njit(inline="always")
@no_type_check
def queries_a_tile(step):
    return max(1, TILE_ROWS * step.num_kv_heads // step.num_heads)


@njit(inline="always")
@no_type_check
def attend(step, block, item):
    """Tiles of all ranges, from the given one on, each the next that nobody has taken yet. Items of a sequence lie side
    by side, by heads and then by queries.
    """
    num_queries = queries_a_tile(step)
    rows = num_queries * (step.num_heads // step.num_kv_heads)
    scratch = Scratch(
        np.empty(rows * step.head_dim, np.float32),
        np.empty(step.head_dim * KEYS, np.float32),
        np.empty(rows * KEYS, np.float32),
        np.empty(rows * step.head_dim, np.float32),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
    )
    before, num_items = 0, look(block, NUM_ITEMS)
    for sequence in range(step.num_sequences):
        if item >= num_items:  # without an item of its own, a thread may not look at the call: it may have ended
            break
        first, end = np.int64(step.starts[sequence]), np.int64(step.starts[sequence + 1])
        tiles = (end - first + num_queries - 1) // num_queries
        behind = before + tiles * step.num_kv_heads
        while item < behind:
            head = (item - before) // tiles
            row = first + (item - before - head * tiles) * num_queries
            position = np.int64(step.lengths[sequence]) - (end - row)
            attend_tile(step, scratch, Tile(sequence, row, position, min(num_queries, end - row), head))
            add(block, NUM_DONE, 1)
            item = add(block, NEXT_ITEM, 1)
        before = behind


@njit
@no_type_check
def attend_tile(step, scratch, tile):
    """One tile, over all that it sees."""
    group = step.num_heads // step.num_kv_heads
    rows = tile.num_queries * group
    take_queries(step, scratch, tile)
    end = tile.position + tile.num_queries
    begin = max(0, tile.position - step.window + 1) if step.window > 0 else 0
    for block in range(begin // KEYS, (end + KEYS - 1) // KEYS):
        start = block * KEYS
        low, high = max(start, begin), min(start + KEYS, end)
        transpose_keys(step, scratch, tile, low, high)
        for row in range(0, rows - 1, 2):
            write_scores(
                scratch.queries, row * step.head_dim, step.head_dim, scratch.keys, scratch.scores, row * KEYS, 2
            )
        if rows % 2:
            row = rows - 1
            write_scores(
                scratch.queries, row * step.head_dim, step.head_dim, scratch.keys, scratch.scores, row * KEYS, 1
            )
        for row in range(rows):
            behind = tile.position + row // group + 1 - start
            ahead = behind - step.window if step.window > 0 else 0
            weigh_row(step, scratch, row, ahead, behind)
        sum_values(step, scratch, tile, rows, low, high)
    for row in range(rows):
        to = ((tile.first_row + row // group) * step.num_heads + tile.head * group + row % group) * step.head_dim
        share = np.float32(1) / max(scratch.total[row], np.float32(1e-30))
        for h in range(step.head_dim):
            write(step.out, to + h, scratch.sums[row * step.head_dim + h] * share)


@njit(inline="always")
@no_type_check
def take_queries(step, scratch, tile):
    """The tile's queries, scaled, and the softmax before the first key: nothing, or each head's sink."""
    group = step.num_heads // step.num_kv_heads
    for row in range(tile.num_queries * group):
        head = tile.head * group + row % group
        source = ((tile.first_row + row // group) * step.num_heads + head) * step.head_dim
        to = row * step.head_dim
        for h in range(step.head_dim):
            scratch.queries[to + h] = read(step.queries, source + h) * step.scale
            scratch.sums[to + h] = 0
        has_sink = step.sinks.size > 0
        scratch.largest[row] = step.sinks[head] if has_sink else NOTHING
        scratch.total[row] = 1 if has_sink else 0


@njit(inline="always")
@no_type_check
def transpose_keys(step, scratch, tile, low, high):
    """The keys at positions `low` to `high` of one block, and what lies with them in eights."""
    plane = step.num_kv_heads * step.page_size * step.head_dim
    head = step.first_page + tile.head * step.page_size * step.head_dim
    column = low // step.page_size
    within = (low - column * step.page_size) & ~7
    place = low & ~7
    while place < high:
        page = head + np.int64(step.tables[tile.sequence * step.max_pages + column]) * 2 * plane
        count = min(step.page_size - within, high - place)
        for ahead in range(0, count, 8):
            source = page + (within + ahead) * step.head_dim
            to = (place + ahead) & (KEYS - 1)
            for h in range(0, step.head_dim, 8):
                transpose(step.pages, source + h, step.head_dim, scratch.keys, h * KEYS + to, KEYS)
        place += count
        column += 1
        within = 0


@njit(inline="always")
@no_type_check
def weigh_row(step, scratch, row, first, end):
    """A row's weights of a block's keys `first` to `end`, counted from the block's start, and its sums so far."""
    at = row * KEYS
    scores, largest, total = scratch.scores, scratch.largest, scratch.total
    if step.soft_cap > 0:
        shrink = weigh_scores(scores, at, first, end, step.soft_cap, largest, total, row, 1)
    else:
        shrink = weigh_scores(scores, at, first, end, step.soft_cap, largest, total, row, 0)
    if shrink != 1:
        for place in range(row * step.head_dim, (row + 1) * step.head_dim):
            scratch.sums[place] *= shrink


@njit(inline="always")
@no_type_check
def sum_values(step, scratch, tile, rows, low, high):
    """Add the values at positions `low` to `high` of one block by their weights."""
    plane = step.num_kv_heads * step.page_size * step.head_dim
    head = step.first_page + plane + tile.head * step.page_size * step.head_dim
    scores, sums, width = scratch.scores, scratch.sums, step.head_dim
    wide = width // WIDE * WIDE
    column = low // step.page_size
    within = low - column * step.page_size
    place = low
    while place < high:
        page = head + np.int64(step.tables[tile.sequence * step.max_pages + column]) * 2 * plane
        count = min(step.page_size - within, high - place)
        source, key = page + within * step.head_dim, place & (KEYS - 1)
        for row in range(0, rows - 1, 2):
            at, to = row * KEYS + key, row * width
            for h in range(0, wide, WIDE):
                add_values(scores, at, step.pages, source + h, width, count, sums, to + h, width, 2, WIDE)
            for h in range(wide, width, NARROW):
                add_values(scores, at, step.pages, source + h, width, count, sums, to + h, width, 2, NARROW)
        if rows % 2:
            at, to = (rows - 1) * KEYS + key, (rows - 1) * width
            for h in range(0, wide, WIDE):
                add_values(scores, at, step.pages, source + h, width, count, sums, to + h, width, 1, WIDE)
            for h in range(wide, width, NARROW):
                add_values(scores, at, step.pages, source + h, width, count, sums, to + h, width, 1, NARROW)
        place += count
        column += 1
        within = 0
