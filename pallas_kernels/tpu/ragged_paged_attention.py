"""Ragged paged attention on a TPU (Mosaic): one kernel for decode, prefill and mixed steps, the cache written in it."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jax_engine.pallas_kernels.reference import to_storage
from jax_engine.pallas_kernels.tpu.blocks import RING, Blocks, block_sizes
from jax_engine.pallas_kernels.tpu.cache_write import CacheWrite
from jax_engine.pallas_kernels.tpu.decode import DecodePhase
from jax_engine.pallas_kernels.tpu.geometry import HALF_LANES, LANES, SUBLANES, Geometry, round_up
from jax_engine.pallas_kernels.tpu.online_softmax import LOG2_E, SoftmaxState, query_factor
from jax_engine.pallas_kernels.tpu.page_stream import TABLE_SLOTS, PageStream, View
from jax_engine.pallas_kernels.tpu.prefill import PrefillPhase
from jax_engine.pallas_kernels.tpu.work_list import (
    DECODE_ITEMS,
    FIRST_DECODE,
    FIRST_SEGMENT,
    NUM_COUNTERS,
    NUM_STRIPS,
    PREFILL_ITEMS,
    STOP_DECODE,
    STOP_SEGMENT,
    WorkLayout,
    build_work,
)

INTERPRETED_CHIP = "TPU v6 lite"  # whose block sizes the interpreter uses unless told


@dataclass(frozen=True)
class _Call:
    """The static facts of one call."""

    geometry: Geometry
    blocks: Blocks
    layout: WorkLayout
    window: int | None
    soft_cap: float | None

    @property
    def has_prefill(self) -> bool:
        return self.layout.num_strips > 0


def ragged_paged_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Array,
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
    device_kind: str | None = None,
    num_cores: int | None = None,
    work: Int[Array, " work"] | None = None,
    blocks: Blocks | None = None,
    interpret: pltpu.InterpretParams | bool = False,
) -> tuple[Float[Array, "T N H"], Array]:
    """Specified by `pallas_kernels.reference`, but for the pages, which are `[L, P, *page_shape(K, S, H)]` and are
    updated in place. `layer` may be traced, so that layers can be scanned.

    `device_kind` is JAX's name of the chip that the program is for, and `num_cores` how many TensorCores JAX makes one
    device of (None: as the first device has them); sequences are shared between cores. `work` is the step's work list
    (see `step_work`), built here if there is none. `blocks` overrides the chip's block sizes, and `interpret` runs the
    kernel on a CPU, slowly.

    Raises:
        ValueError: a number type that TPUs do not compute in, a chip without an entry, or no block sizes that fit it.
    """
    for name, array in (("queries", queries), ("pages", pages)):
        if array.dtype == jnp.float16:
            raise ValueError(f"{name} are float16, which TPUs do not compute in; use dtype bfloat16 or float32")
    (num_tokens, num_heads, head_dim), num_kv_heads = queries.shape, keys.shape[1]
    geometry = Geometry.of(num_heads, num_kv_heads, head_dim, pages.shape[4], pages.dtype, queries.dtype)
    blocks, layout = _sizes(geometry, num_tokens, kv_lengths.shape[0], device_kind, num_cores, blocks, interpret)
    call = _Call(geometry, blocks, layout, window, soft_cap)
    if work is None:
        tables = (block_tables, query_starts, kv_lengths, num_decodes, token_sequences, positions)
        work = build_work(layout, *tables, blocks=blocks, page_size=geometry.page_size, window=window)
    key_scales, value_scales = (None, None) if kv_scales is None else kv_scales
    scaled = _scale_heads(queries.astype(jnp.float32) * query_factor(scale, soft_cap), key_scales)
    inputs = {
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "work": work,
        "tables": _blocked_tables(block_tables, blocks.block // geometry.page_size),
        **_query_inputs(call, scaled.astype(geometry.compute_dtype)),
        **_new_inputs(call, keys, values, key_scales, value_scales),
        **_sink_inputs(call, sinks),
        "pages": pages,
    }
    outputs = _pallas_call(call, inputs, queries.dtype, interpret)
    out = _combine(call, outputs, num_decodes, token_sequences)
    return _scale_heads(out, value_scales), outputs["pages"]


def _scale_heads(rows: Float[Array, "T N H"], scales: Float[Array, " K"] | None) -> Float[Array, "T N H"]:
    """Each query head's rows times the scale of its kv head."""
    if scales is None:
        return rows
    return rows * jnp.repeat(scales, rows.shape[1] // scales.shape[0])[:, None].astype(rows.dtype)


def step_work(
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    geometry: Geometry,
    window: int | None,
    device_kind: str | None = None,
    num_cores: int | None = None,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> Int[Array, " work"]:
    """The work list of one step for all layers of one window: give it to each layer's `ragged_paged_attention`, with
    the same chip and block sizes, so that it is not built again for each.
    """
    blocks, layout = _sizes(
        geometry, positions.shape[0], kv_lengths.shape[0], device_kind, num_cores, blocks, interpret
    )
    tables = (block_tables, query_starts, kv_lengths, num_decodes, token_sequences, positions)
    return build_work(layout, *tables, blocks=blocks, page_size=geometry.page_size, window=window)


def _sizes(
    geometry: Geometry,
    num_tokens: int,
    num_sequences: int,
    device_kind: str | None,
    num_cores: int | None,
    blocks: Blocks | None,
    interpret: pltpu.InterpretParams | bool,
) -> tuple[Blocks, WorkLayout]:
    """Block sizes and the work list's layout, for the first device here unless another is named."""
    if device_kind is None:
        device_kind = INTERPRETED_CHIP if interpret else jax.devices()[0].device_kind
    if num_cores is None:
        num_cores = 1 if interpret else jax.devices()[0].num_cores
    blocks = blocks or block_sizes(geometry, device_kind)
    return blocks, WorkLayout.of(num_tokens, num_sequences, blocks, num_cores=num_cores)


def _blocked_tables(block_tables: Int[Array, "B M"], block_pages: int) -> Int[Array, "B blocks 1 block_pages"]:
    num_sequences, max_pages = block_tables.shape
    padded = jnp.pad(block_tables, ((0, 0), (0, -max_pages % block_pages)))
    return padded.reshape(num_sequences, -1, 1, block_pages)


def _pad_lanes(rows: Array, width: int, *, before: int = 0) -> Array:
    return jnp.pad(rows, ((0, 0),) * (rows.ndim - 1) + ((before, width - before - rows.shape[-1]),))


def _query_inputs(call: _Call, queries: Float[Array, "T N H"]) -> dict[str, Array]:
    """The queries by sequence, grouped, for decode; by kv head for prefill."""
    geometry, num_tokens = call.geometry, queries.shape[0]
    queries = _pad_lanes(queries, geometry.width)
    decodes = min(call.layout.num_sequences, num_tokens)
    rows = geometry.heads_per_group * geometry.queries_per_head
    grouped = queries[:decodes].reshape(decodes, geometry.num_groups, rows, geometry.width)
    inputs = {"decode_queries": jnp.pad(grouped, ((0, 0), (0, 0), (0, geometry.group_rows - rows), (0, 0)))}
    if call.has_prefill:
        padded = jnp.pad(queries, ((0, -num_tokens % call.blocks.query), (0, 0), (0, 0)))
        by_head = padded.reshape(-1, geometry.num_kv_heads, geometry.queries_per_head, geometry.width)
        inputs["prefill_queries"] = by_head.transpose(1, 0, 2, 3).reshape(geometry.num_kv_heads, -1, geometry.width)
        row_tokens = jnp.arange(call.blocks.query, dtype=jnp.int32).repeat(geometry.queries_per_head)
        inputs["row_tokens"] = jnp.broadcast_to(row_tokens[:, None], (row_tokens.shape[0], LANES))
    return inputs


def _new_inputs(
    call: _Call,
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    key_scales: Float[Array, " K"] | None,
    value_scales: Float[Array, " K"] | None,
) -> dict[str, Array]:
    """The step's keys and values as the pages will hold them, in float32, by token for decode and by head for longer
    ranges.
    """
    geometry = call.geometry
    stored = [
        to_storage(rows, geometry.cache_dtype, scales).astype(jnp.float32)
        for rows, scales in ((keys, key_scales), (values, value_scales))
    ]
    if geometry.planes == 1:
        new = (_pad_lanes(stored[0], LANES) + _pad_lanes(stored[1], LANES, before=HALF_LANES))[:, None]
    else:
        new = jnp.stack([_pad_lanes(rows, geometry.width) for rows in stored], axis=1)
    inputs = {"decode_new": new[: min(call.layout.num_sequences, new.shape[0])]}
    if call.has_prefill:
        strip = call.blocks.strip
        end = round_up(new.shape[0], SUBLANES) - new.shape[0] + strip + SUBLANES
        columns = new.reshape(new.shape[0], geometry.planes, geometry.num_kv_heads, -1, LANES)
        columns = columns.transpose(1, 3, 2, 0, 4).reshape(-1, geometry.num_kv_heads, new.shape[0], LANES)
        inputs["prefill_new"] = jnp.pad(columns, ((0, 0), (0, 0), (strip, end), (0, 0)))
    return inputs


def _sink_inputs(call: _Call, sinks: Float[Array, " N"] | None) -> dict[str, Array]:
    if sinks is None:
        return {}
    geometry = call.geometry
    by_head = sinks.astype(jnp.float32).reshape(geometry.num_kv_heads, -1) * LOG2_E
    rows = by_head.reshape(geometry.num_groups, -1)
    rows = jnp.pad(rows, ((0, 0), (0, geometry.group_rows - rows.shape[1])))
    inputs = {"decode_sinks": jnp.broadcast_to(rows[..., None], (*rows.shape, LANES))}
    if call.has_prefill:
        rows = jnp.tile(by_head, (1, call.blocks.query))
        inputs["prefill_sinks"] = jnp.broadcast_to(rows[..., None], (*rows.shape, LANES))
    return inputs


def _combine(
    call: _Call,
    outputs: dict[str, Array],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
) -> Float[Array, "T N H"]:
    """Each token row's attention from the phase that computed it, zero in padding rows."""
    geometry, num_tokens = call.geometry, token_sequences.shape[0]
    lanes = slice(geometry.value_lane, geometry.value_lane + geometry.head_dim)
    num_heads = geometry.num_kv_heads * geometry.queries_per_head
    rows = geometry.heads_per_group * geometry.queries_per_head
    decoded = outputs["decode_out"][:, :, :rows, lanes].reshape(-1, num_heads, geometry.head_dim)
    decoded = jnp.pad(decoded, ((0, num_tokens - decoded.shape[0]), (0, 0), (0, 0)))
    row = jnp.arange(num_tokens)[:, None, None]
    real = (token_sequences < call.layout.num_sequences)[:, None, None]
    rest = jnp.zeros_like(decoded)
    if call.has_prefill:
        by_head = outputs["prefill_out"][:, :, lanes]
        by_head = by_head.reshape(geometry.num_kv_heads, -1, geometry.queries_per_head, geometry.head_dim)
        rest = by_head.transpose(1, 0, 2, 3).reshape(-1, num_heads, geometry.head_dim)[:num_tokens]
    return jnp.where(row < num_decodes, decoded, jnp.where(real, rest, jnp.zeros_like(rest)))


def _pallas_call(
    call: _Call,
    inputs: dict[str, Array],
    dtype: jnp.dtype,
    interpret: pltpu.InterpretParams | bool,
) -> dict[str, Array]:
    smem = ("layer", "work")
    vmem = ("row_tokens", "decode_sinks", "prefill_sinks")
    spaces = dict.fromkeys(smem, pltpu.SMEM) | dict.fromkeys(vmem, pltpu.VMEM)
    shapes = {"decode_out": jax.ShapeDtypeStruct(inputs["decode_queries"].shape, dtype)}
    if call.has_prefill:
        shapes["prefill_out"] = jax.ShapeDtypeStruct(inputs["prefill_queries"].shape, dtype)
    shapes["pages"] = jax.ShapeDtypeStruct(inputs["pages"].shape, inputs["pages"].dtype)
    geometry = call.geometry
    block_pages = call.blocks.block // geometry.page_size
    scratch = {
        "page_buffer": pltpu.VMEM((2, block_pages, *inputs["pages"].shape[2:]), inputs["pages"].dtype),
        "table_buffer": pltpu.SMEM((TABLE_SLOTS, 1, block_pages), jnp.int32),
        "page_semaphores": pltpu.SemaphoreType.DMA((2,)),
        "table_semaphores": pltpu.SemaphoreType.DMA((TABLE_SLOTS,)),
    }

    def kernel(*refs: jax.Ref) -> None:
        names = (*inputs, *(f"result_{name}" for name in shapes), *scratch)
        _kernel(call, dict(zip(names, refs, strict=True)))

    results = pl.pallas_call(
        kernel,
        grid=(call.layout.num_cores,),
        out_shape=tuple(shapes.values()),
        in_specs=[pl.BlockSpec(memory_space=spaces.get(name, pl.ANY)) for name in inputs],
        out_specs=tuple(pl.BlockSpec(memory_space=pl.ANY) for _ in shapes),
        scratch_shapes=tuple(scratch.values()),
        input_output_aliases={list(inputs).index("pages"): list(shapes).index("pages")},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=call.blocks.vmem_bytes(geometry),
            # Checks of every copy's bounds would double what it costs to start one: the interpreter does them.
            disable_bounds_checks=True,
        ),
        interpret=interpret,
        name="ragged_paged_attention",
    )(*inputs.values())
    return dict(zip(shapes, results, strict=True))


def _kernel(call: _Call, refs: dict[str, jax.Ref]) -> None:
    """Write longer ranges' keys and values, then attend: decodes first, longer ranges after them.

    A core attends to its share of the sequences and query blocks. Each writes all longer ranges, so that what it reads
    is there without waiting for another: they write the same bytes to the same places.
    """
    lists = call.layout.views(refs["work"])
    counters = [lists["counters"][pl.program_id(0) * NUM_COUNTERS + entry] for entry in range(NUM_COUNTERS)]
    layer = refs["layer"][0]
    stream = PageStream(
        page_size=call.geometry.page_size,
        layer=layer,
        sequences=lists["sequences"],
        firsts=lists["firsts"],
        lasts=lists["lasts"],
        tables=refs["tables"],
        pages=refs["result_pages"],
        table_buffer=refs["table_buffer"],
        buffer=refs["page_buffer"],
        table_semaphores=refs["table_semaphores"],
        semaphores=refs["page_semaphores"],
    )
    if call.has_prefill:
        _write_longer_ranges(call, refs, lists, layer, counters)
    _decode(call, refs, stream, counters)
    if call.has_prefill:
        _prefill(call, refs, stream, lists, counters)


def _write_longer_ranges(
    call: _Call, refs: dict[str, jax.Ref], lists: dict[str, View], layer: jax.Array, counters: list[jax.Array]
) -> None:
    geometry, strip = call.geometry, call.blocks.strip

    def body(new: jax.Ref, strips: jax.Ref, news: jax.Ref, olds: jax.Ref, outs: jax.Ref) -> None:
        CacheWrite(
            geometry=geometry,
            strip=strip,
            layer=layer,
            rows=lists["rows"],
            counts=lists["counts"],
            offsets=lists["offsets"],
            page_numbers=lists["page_numbers"],
            new=refs["prefill_new"],
            pages=refs["result_pages"],
            new_buffer=new,
            strip_buffer=strips,
            new_semaphores=news,
            old_semaphores=olds,
            out_semaphores=outs,
        ).run(counters[NUM_STRIPS])

    pl.run_scoped(
        body,
        pltpu.VMEM((2, *refs["prefill_new"].shape[:2], strip + SUBLANES, LANES), jnp.float32),
        pltpu.VMEM((2, geometry.planes, geometry.num_kv_heads, strip, geometry.width), geometry.cache_dtype),
        *(pltpu.SemaphoreType.DMA((2,)),) * 3,
    )


def _state_scratch(*rows: int, width: int) -> tuple[object, ...]:
    return tuple(pltpu.VMEM((*rows, lanes), jnp.float32) for lanes in (LANES, LANES, width))


def _decode(call: _Call, refs: dict[str, jax.Ref], stream: PageStream, counters: list[jax.Array]) -> None:
    geometry = call.geometry
    group = (geometry.num_groups, geometry.group_rows)
    new = (geometry.planes, geometry.num_kv_heads)

    def body(
        query: jax.Ref, token: jax.Ref, out: jax.Ref, tile: jax.Ref, inputs: jax.Ref, outs: jax.Ref, tiles: jax.Ref,
        *state: jax.Ref,
    ) -> None:  # fmt: skip
        DecodePhase(
            geometry=geometry,
            chunk=call.blocks.chunk,
            tail_chunk=call.blocks.tail,
            soft_cap=call.soft_cap,
            stream=stream,
            queries=refs["decode_queries"],
            new=refs["decode_new"],
            sinks=refs.get("decode_sinks"),
            out=refs["result_decode_out"],
            query_buffer=query,
            new_buffer=token,
            out_buffer=out,
            tile_buffer=tile,
            state=SoftmaxState(*state),
            input_semaphores=inputs,
            out_semaphores=outs,
            tile_semaphores=tiles,
        ).run(counters[FIRST_DECODE], counters[STOP_DECODE], counters[DECODE_ITEMS])

    pl.run_scoped(
        body,
        pltpu.VMEM((2, *group, geometry.width), geometry.compute_dtype),
        pltpu.VMEM((2, *new, geometry.width), jnp.float32),
        pltpu.VMEM((RING, *group, geometry.width), refs["result_decode_out"].dtype),
        pltpu.VMEM((RING, *new, geometry.tile_rows, geometry.width), geometry.cache_dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((RING,)),
        pltpu.SemaphoreType.DMA((RING,)),
        *_state_scratch(*group, width=geometry.width),
    )


def _prefill(
    call: _Call, refs: dict[str, jax.Ref], stream: PageStream, lists: dict[str, View], counters: list[jax.Array]
) -> None:
    geometry = call.geometry
    rows = call.blocks.query * geometry.queries_per_head

    at_once = call.blocks.rows_at_once(geometry)
    unit = (at_once, call.blocks.prefill_chunk)

    def body(query: jax.Ref, out: jax.Ref, query_semaphores: jax.Ref, out_semaphores: jax.Ref, *rest: jax.Ref) -> None:
        PrefillPhase(
            geometry=geometry,
            block_tokens=call.blocks.query,
            rows_at_once=at_once,
            chunk=call.blocks.prefill_chunk,
            window=call.window,
            soft_cap=call.soft_cap,
            stream=stream,
            blocks=lists["blocks"],
            starts=lists["starts"],
            stops=lists["stops"],
            queries=refs["prefill_queries"],
            row_tokens=refs["row_tokens"],
            sinks=refs.get("prefill_sinks"),
            out=refs["result_prefill_out"],
            query_buffer=query,
            out_buffer=out,
            scores=(rest[0], rest[1]),
            weights=(rest[2], rest[3]),
            shrinks=(rest[4], rest[5]),
            places=rest[6],
            state=SoftmaxState(*rest[7:]),
            query_semaphores=query_semaphores,
            out_semaphores=out_semaphores,
        ).run(counters[FIRST_SEGMENT], counters[STOP_SEGMENT], counters[PREFILL_ITEMS])

    pl.run_scoped(
        body,
        pltpu.VMEM((2, geometry.num_kv_heads, rows, geometry.width), geometry.compute_dtype),
        pltpu.VMEM((2, geometry.num_kv_heads, rows, geometry.width), refs["result_prefill_out"].dtype),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        *(pltpu.VMEM(unit, jnp.float32),) * 2,
        *(pltpu.VMEM(unit, geometry.compute_dtype),) * 2,
        *(pltpu.VMEM((at_once, LANES), jnp.float32),) * 2,
        pltpu.VMEM((rows, LANES), jnp.int32),
        *_state_scratch(geometry.num_kv_heads, rows, width=geometry.width),
    )
