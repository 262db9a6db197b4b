"""The kernel: a persistent grid over work items, one warpgroup that copies and two that compute.

    pages in HBM ── bulk tensor copies, one a page ──> ring of chunks [stages] in shared memory
                                                         │ full            ▲ empty
    queries by kv head ──> 64 rows a warpgroup ────> q · Kᵀ ─> running softmax in registers ─> · V
                                                         └──> tile and log-sum-exp ──> HBM

A wide item has more rows than a warpgroup takes: each of the two has its half of them and every chunk, so that keys and
values cross from the second-level cache once for 128 rows of queries. A narrow one, such as a decode, has all its rows
in both, and each takes every other chunk: two results, which are merged like those of parts. One warpgroup would spend
on a chunk about as long as the memory needs to bring it. The structure is that of FlashAttention-3 (Shah et al. 2024,
arXiv 2407.08608), without its exchange of turns between the warpgroups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import e, log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_engine.pallas_kernels.gpu.lanes import COLUMNS, Lanes, Ref, across
from jax_engine.pallas_kernels.gpu.work_list import (
    ALIGNMENT,
    CHUNK,
    END_KEY,
    FIRST_KEY,
    FIRST_POSITION,
    FIRST_ROW,
    GROUP_ROWS,
    NUM_TOKENS,
    OUTPUT,
    ROWS,
    SEQUENCE,
    SKIPPED,
)

LOG2_E = log2(e)
NUM_GROUPS = ROWS // GROUP_ROWS  # that compute
LOWEST = -1e30  # finite, so that a row that has seen nothing stays free of inf - inf
COMPUTING_REGISTERS, COPYING_REGISTERS = 232, 40  # a thread


@dataclass(frozen=True)
class Call:
    """The static facts of one call."""

    num_tokens: int  # rows of tokens for each kv head
    num_kv_heads: int
    rows_a_token: int
    head_dim: int
    page_size: int
    num_pages: int
    num_items: int  # room for them
    dtype: Any
    stored: Any  # type of the pages: `dtype`, or of 8 bits
    scale: float
    window: int | None
    soft_cap: float | None
    stages: int  # chunks in shared memory
    num_programs: int  # of the grid
    num_stripes: int = 1  # that sequences' pages are dealt out to, of which one is here
    interpret: Any = None  # None, or parameters of the interpreter

    @property
    def decode_rows(self) -> int:
        """That are copied for a single token: whole tiles of shared memory's arrangement."""
        return min(max(self.rows_a_token, ALIGNMENT), GROUP_ROWS)

    @property
    def rows_a_copy(self) -> int:
        return min(self.page_size, CHUNK)

    @property
    def copies_a_chunk(self) -> int:
        return CHUNK // self.rows_a_copy

    @property
    def widens(self) -> bool:
        """Whether keys and values have 8 bits, which the matrix unit does not take beside queries of 16."""
        return bool(self.stored != self.dtype)

    def tiles(self, *shape: int, dtype: Any = None) -> Any:
        """Tiles of rows in shared memory, as the copies and the matrix unit want them."""
        dtype = jnp.dtype(dtype or self.dtype)
        tiling = plgpu.TilingTransform((ALIGNMENT, COLUMNS))  # type: ignore[abstract, unused-ignore]  # typed in jax 0.11
        swizzle = plgpu.SwizzleTransform(COLUMNS * dtype.itemsize)  # type: ignore[abstract, unused-ignore]
        return plgpu.SMEM((*shape, self.head_dim), dtype, transforms=(tiling, swizzle))


class Inputs(NamedTuple):
    """In HBM."""

    queries: Ref  # [K * T * rows a token + ROWS, H]
    pages: Ref  # [L * P * 2 * K * S, H]
    block_tables: Ref  # [B, M]
    items: Ref  # [W, C]
    num_items: Ref  # [1]
    layer: Ref  # [2], and which stripe of pages is here


class Scratch(NamedTuple):
    """In shared memory, and barriers."""

    tiles: Ref  # [groups, 64, H] queries, and then their results
    keys: Ref  # [stages, chunk, H]
    values: Ref
    sums: Ref  # [groups, 64]
    tile_is_here: Ref  # [groups]
    full: Ref  # [stages]
    empty: Ref
    groups_meet: Ref
    widened: Ref | None = None  # [groups, chunk, H] keys, and then values, of 8 bits


class Item(NamedTuple):
    """One work item of one kv head, as scalars."""

    sequence: jax.Array
    head: jax.Array
    first_row: jax.Array
    num_tokens: jax.Array
    num_rows: jax.Array
    first_position: jax.Array  # of the first row, also if it is skipped
    own_position: jax.Array  # of the first that is not
    first_key: jax.Array
    end_key: jax.Array
    output: jax.Array

    @property
    def end_position(self) -> jax.Array:
        return self.first_position + self.num_tokens

    @property
    def chunks(self) -> tuple[jax.Array, jax.Array]:
        return lax.div(self.first_key, CHUNK), lax.div(self.end_key + CHUNK - 1, CHUNK)

    @property
    def is_narrow(self) -> jax.Array:
        return self.num_rows <= GROUP_ROWS


class Turn(NamedTuple):
    """What one warpgroup does of an item."""

    group: jax.Array
    first_row: jax.Array  # of the item's, that is the first in this warpgroup's tile
    offset: jax.Array  # of the first chunk that it takes, and from one to the next
    stride: jax.Array

    @classmethod
    def of(cls, item: Item, group: jax.Array) -> "Turn":
        narrow = item.is_narrow
        return cls(
            group,
            jnp.where(narrow, 0, group * GROUP_ROWS),
            jnp.where(narrow, lax.rem(item.chunks[0] + group, NUM_GROUPS), 0),  # by the chunk's place in its sequence
            jnp.where(narrow, NUM_GROUPS, 1),
        )


@dataclass(frozen=True)
class _Program:
    """One program of the grid, in which three warpgroups run beside each other."""

    call: Call
    inputs: Inputs
    outputs: tuple[Ref, Ref]
    scratch: Scratch

    def run(self) -> None:
        group = lax.axis_index("group")
        pl.when(group == NUM_GROUPS)(self._copy_all)
        pl.when(group < NUM_GROUPS)(lambda: self._compute_all(group))

    def _each_item(self, work: Callable[[Item, jax.Array], jax.Array]) -> jax.Array:
        """Run `work` on every item that is this program's; it takes and gives the number of chunks before it."""
        heads, programs = self.call.num_kv_heads, self.call.num_programs
        program = lax.axis_index("program")
        count = lax.div(self.inputs.num_items[0] * heads - program + programs - 1, programs)

        def run(index: jax.Array, step: jax.Array) -> jax.Array:
            number = program + index * programs
            row = lax.div(number, heads)

            def column(place: int) -> jax.Array:
                return self.inputs.items[row, place]

            item = Item(
                column(SEQUENCE),
                lax.rem(number, heads),
                column(FIRST_ROW),
                column(NUM_TOKENS),
                column(NUM_TOKENS) * self.call.rows_a_token,
                column(FIRST_POSITION),
                column(FIRST_POSITION) + column(SKIPPED),
                column(FIRST_KEY),
                column(END_KEY),
                column(OUTPUT),
            )
            return work(item, step)

        return lax.fori_loop(0, count, run, jnp.int32(0))

    def _copy_all(self) -> None:
        """Bring every chunk of every item, as slots of the ring become empty."""
        plgpu.set_max_registers(COPYING_REGISTERS, action="decrease")
        stages = self.call.stages

        def copy_item(item: Item, step: jax.Array) -> jax.Array:
            def copy(chunk: jax.Array, step: jax.Array) -> jax.Array:
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(self.scratch.empty.at[slot]))
                self._copy_chunk(item, chunk, slot)
                return step + 1

            return lax.fori_loop(*item.chunks, copy, step)

        total = self._each_item(copy_item)
        for slot in range(stages):  # let go of it with every barrier's phase seen
            pl.when(slot < total)(partial(plgpu.barrier_wait, self.scratch.empty.at[slot]))

    def _copy_chunk(self, item: Item, chunk: jax.Array, slot: jax.Array) -> None:
        call, (keys, values), full = self.call, self.scratch[1:3], self.scratch.full.at[slot]
        size, rows = call.page_size, call.rows_a_copy
        last = lax.div(item.end_key - 1, size)  # the table has no more pages than the sequence needs

        def first_key(index: int) -> jax.Array:
            place = chunk * CHUNK + index * rows
            page = self.inputs.block_tables[item.sequence, jnp.minimum(lax.div(place, size), last)]
            number = (self.inputs.layer[0] * call.num_pages + page) * 2 * call.num_kv_heads + item.head
            return number * size + lax.rem(place, size)

        # All before the first copy, behind which none of these loads would be moved up.
        starts = [first_key(index) for index in range(call.copies_a_chunk)]
        for index, first in enumerate(starts):
            part = pl.ds(index * rows, rows)
            for target, start in ((keys, first), (values, first + call.num_kv_heads * size)):
                plgpu.copy_gmem_to_smem(self.inputs.pages.at[pl.ds(start, rows)], target.at[slot, part], full)

    def _compute_all(self, group: jax.Array) -> None:
        plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")
        self._each_item(lambda item, step: self._attend(item, step, Turn.of(item, group)))
        plgpu.wait_smem_to_gmem(0)

    def _let_pass(self, step: jax.Array, end: jax.Array) -> None:
        """Give back chunks that are not this warpgroup's."""

        def read(index: jax.Array, _: None) -> None:
            slot = lax.rem(index, self.call.stages)
            plgpu.barrier_wait(self.scratch.full.at[slot])
            plgpu.barrier_arrive(self.scratch.empty.at[slot])

        lax.fori_loop(step, end, read, None)

    def _position(self, key: jax.Array) -> jax.Array:
        """Of a key, in its sequence."""
        if self.call.num_stripes == 1:
            return key
        size = jnp.full_like(key, self.call.page_size)
        page = lax.div(key, size) * self.call.num_stripes + self.inputs.layer[1]
        return page * self.call.page_size + lax.rem(key, size)

    def _is_masked(self, item: Item, chunk: jax.Array) -> jax.Array:
        """Whether some row of the tile does not see all of a chunk."""
        masked = self._position(chunk * CHUNK + CHUNK - 1) > item.own_position
        if self.call.window is not None:
            last = item.first_position + lax.div(item.num_rows - 1, self.call.rows_a_token)
            masked |= self._position(chunk * CHUNK) < last - self.call.window + 1
        return masked

    def _attend(self, item: Item, step: jax.Array, turn: Turn) -> jax.Array:
        """The warpgroup's part of an item, from the chunk number `step` of the program on; the number after its last.

        A narrow item of one chunk leaves nothing to the second warpgroup, whose result then has no weight.
        """
        call, scratch, lanes = self.call, self.scratch, Lanes(self.call.interpret is not None)
        tile, sums = scratch.tiles.at[turn.group], scratch.sums.at[turn.group]
        first, end = item.chunks
        plgpu.wait_smem_to_gmem(0)  # the results before it have left
        self._fetch_queries(item, turn)

        def attend(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            chunk = first + turn.offset + index * turn.stride
            return self._attend_chunk(item, chunk, step + chunk - first, turn, carry, lanes)

        start = lanes.tile(GROUP_ROWS, call.head_dim), lanes.rows(GROUP_ROWS, LOWEST), lanes.rows(GROUP_ROWS, 0.0), step
        count = lax.div(end - first - turn.offset + turn.stride - 1, turn.stride)
        out, highest, total, seen = lax.fori_loop(0, count, attend, start)
        self._let_pass(seen, step + end - first)
        total = jnp.maximum(total, 1e-30)  # of a row that has seen nothing
        tile[...] = (out / across(total, out.shape)).astype(call.dtype)
        sums[...] = highest + jnp.log2(total)
        plgpu.commit_smem()
        place = (item.output * call.num_kv_heads + item.head) * NUM_GROUPS + turn.group

        def send(rows: int) -> None:
            part = self.outputs[0].at[pl.ds(place * GROUP_ROWS, rows)]
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, rows)], part)

        self._of_its_rows(item, send)
        plgpu.copy_smem_to_gmem(sums, self.outputs[1].at[place])
        return step + end - first

    def _fetch_queries(self, item: Item, turn: Turn) -> None:
        tile, is_here = self.scratch.tiles.at[turn.group], self.scratch.tile_is_here.at[turn.group]
        row = (item.head * self.call.num_tokens + item.first_row) * self.call.rows_a_token + turn.first_row
        row = Lanes(self.call.interpret is not None).aligned(row)

        def fetch(rows: int) -> None:
            plgpu.copy_gmem_to_smem(self.inputs.queries.at[pl.ds(row, rows)], tile.at[pl.ds(0, rows)], is_here)

        self._of_its_rows(item, fetch)
        plgpu.barrier_wait(is_here)

    def _of_its_rows(self, item: Item, copy: Callable[[int], None]) -> None:
        """Copy few rows for a single token; what is in the others, other rows do not see."""
        few = self.call.decode_rows
        if few == GROUP_ROWS:
            copy(GROUP_ROWS)
            return
        is_few = item.num_rows <= few
        pl.when(is_few)(lambda: copy(few))
        pl.when(jnp.logical_not(is_few))(lambda: copy(GROUP_ROWS))

    def _attend_chunk(
        self, item: Item, chunk: jax.Array, step: jax.Array, turn: Turn, carry: tuple[jax.Array, ...], lanes: Lanes
    ) -> tuple[jax.Array, ...]:
        call, scratch = self.call, self.scratch
        out, highest, total, seen = carry
        self._let_pass(seen, step)
        slot = lax.rem(step, call.stages)
        plgpu.barrier_wait(scratch.full.at[slot])
        is_masked = self._is_masked(item, chunk)
        keys = scratch.keys.at[slot]
        if scratch.widened is not None:
            keys = scratch.widened.at[turn.group]
            lanes.widen(scratch.keys.at[slot], keys)
        else:  # of a wide item, the first warpgroup clears for both
            pl.when(is_masked & (item.is_narrow | (turn.group == 0)))(
                lambda: self._clear_unseen(item, chunk, scratch.values.at[slot], lanes)
            )
        scores = lanes.scores(scratch.tiles.at[turn.group], keys)
        if call.soft_cap is None:
            scores = scores * (call.scale * LOG2_E)
        else:
            scores = jnp.tanh(scores * (call.scale / call.soft_cap)) * (call.soft_cap * LOG2_E)
        scores = lax.cond(
            is_masked,
            lambda scores: self._masked(item, chunk, turn.first_row, scores, lanes),
            lambda scores: scores,
            scores,
        )

        new = jnp.maximum(highest, jnp.max(scores, axis=1))
        shrink = jnp.exp2(highest - new)
        weights = jnp.exp2(scores - across(new, scores.shape))
        total = total * shrink + jnp.sum(weights, axis=1)
        weights = weights.astype(call.dtype)  # half the registers, before others are needed
        values = self._values(item, chunk, slot, turn, is_masked, lanes)
        out = lanes.add_product(out * across(shrink, out.shape), weights, values)
        if not call.widens:
            plgpu.barrier_arrive(scratch.empty.at[slot])
        return out, new, total, step + 1

    def _values(
        self, item: Item, chunk: jax.Array, slot: jax.Array, turn: Turn, is_masked: jax.Array, lanes: Lanes
    ) -> Ref:
        """The values of a chunk in shared memory, zeros where no row of the tile sees them."""
        scratch, values = self.scratch, self.scratch.values.at[slot]
        if scratch.widened is not None:
            widened = scratch.widened.at[turn.group]
            lanes.widen(values, widened)
            plgpu.barrier_arrive(scratch.empty.at[slot])
            pl.when(is_masked)(lambda: self._clear_unseen(item, chunk, widened, lanes))
            return widened

        @pl.when(is_masked & jnp.logical_not(item.is_narrow))
        def meet() -> None:
            plgpu.barrier_arrive(scratch.groups_meet)
            plgpu.barrier_wait(scratch.groups_meet)

        return values

    def _masked(self, item: Item, chunk: jax.Array, first_row: jax.Array, scores: jax.Array, lanes: Lanes) -> jax.Array:
        """Scores of what a row does not see, out of the way."""
        rows = lanes.iota(scores.shape, 0) + first_row
        place = self._position(lanes.iota(scores.shape, 1) + chunk * CHUNK)
        position = lax.div(rows, jnp.full_like(rows, self.call.rows_a_token)) + item.first_position
        visible = place <= position
        if self.call.window is not None:
            visible &= place > position - self.call.window
        return jnp.where(visible, scores, -jnp.inf)

    def _clear_unseen(self, item: Item, chunk: jax.Array, values: Ref, lanes: Lanes) -> None:
        """Zero the values that no row of the tile sees: a weight of zero does not undo a NaN."""
        place = self._position(lanes.iota((CHUNK, COLUMNS), 0) + chunk * CHUNK)
        seen = place < item.end_position
        if self.call.window is not None:
            seen &= place > item.own_position - self.call.window
        for first in range(0, self.call.head_dim, COLUMNS):  # few registers at a time
            columns = slice(None), pl.ds(first, COLUMNS)
            here = lanes.laid_out(values[columns])
            values[columns] = jnp.where(seen, here, jnp.zeros_like(here))
        plgpu.commit_smem()


# So that equal layers are traced and lowered once: building the kernel takes longer than the rest of a layer.
@partial(jax.jit, static_argnames="call")
def attend_items(
    queries: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    items: jax.Array,
    num_items: jax.Array,
    layer: jax.Array,
    call: Call,
) -> tuple[jax.Array, jax.Array]:
    """Every item's tile [W * K, ROWS, H], divided by its own sum, and the base-2 logarithm of that sum [W * K, ROWS].

    `queries` are [K * T * rows a token + ROWS, H], rows of zeros at the end; `pages` [L * P * 2 * K * S, H]. The rows
    of a narrow item are there twice, from row `GROUP_ROWS` on a second time, each over a part of the keys. Tiles of
    rows beyond an item's own, and of items beyond `num_items`, are anything.
    """

    def body(*refs: Any) -> None:
        inputs, outputs, scratch = Inputs(*refs[:6]), refs[6:8], Scratch(*refs[8:])
        _Program(call, inputs, outputs, scratch).run()

    places = call.num_items * call.num_kv_heads * NUM_GROUPS
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((places * GROUP_ROWS, call.head_dim), call.dtype),
            jax.ShapeDtypeStruct((places, GROUP_ROWS), jnp.float32),
        ],
        scratch_types=[
            call.tiles(NUM_GROUPS, GROUP_ROWS),
            call.tiles(call.stages, CHUNK, dtype=call.stored),
            call.tiles(call.stages, CHUNK, dtype=call.stored),
            plgpu.SMEM((NUM_GROUPS, GROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=NUM_GROUPS),
            plgpu.Barrier(num_arrivals=2 * call.copies_a_chunk, num_barriers=call.stages),
            plgpu.Barrier(num_arrivals=NUM_GROUPS, num_barriers=call.stages),
            plgpu.Barrier(num_arrivals=NUM_GROUPS),
            *([call.tiles(NUM_GROUPS, CHUNK)] if call.widens else []),
        ],
        grid=(call.num_programs,),
        grid_names=("program",),
        num_threads=NUM_GROUPS + 1,
        thread_name="group",
        # Layouts are said in here, where JAX 0.11 would else infer them.
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=call.interpret,
    )
    out, sums = kernel(queries, pages, block_tables, items, num_items, layer)
    return out.reshape(-1, ROWS, call.head_dim), sums.reshape(-1, ROWS)
