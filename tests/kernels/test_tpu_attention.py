"""The TPU kernel, interpreted on a CPU with race detection and NaN in all memory not yet written, against the float32
specification: output, and every byte of the cache.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from jax_engine.pallas_kernels import reference, tpu

# Small enough that a few pages take several blocks, chunks, tails, query blocks and strips.
BLOCKS = tpu.Blocks(block=256, chunk=256, tail=128, query=16, prefill_chunk=128, strip=16)
MIXED = [(1, 33), (64, 0), (1, 5), (5, 130), (1, 290), (17, 0)]
OPTIONS = {"layer": 1, "scale": 0.3}


def to_tpu(pages, head_dim):
    """The specification's pages in the kernel's layout."""
    shape = tpu.page_shape(*pages.shape[3:])
    if shape[0] == 2:
        return jnp.pad(pages, ((0, 0),) * 5 + ((0, shape[3] - head_dim),))
    shared = jnp.zeros((*pages.shape[:2], *shape), pages.dtype)
    shared = shared.at[:, :, 0, :, :, :head_dim].set(pages[:, :, 0])
    return shared.at[:, :, 0, :, :, 64 : 64 + head_dim].set(pages[:, :, 1])


def from_tpu(pages, head_dim):
    if pages.shape[2] == 2:
        return pages[..., :head_dim]
    return jnp.stack([pages[:, :, 0, :, :, :head_dim], pages[:, :, 0, :, :, 64 : 64 + head_dim]], axis=2)


@lru_cache
def compiled(head_dim, dma_mode, blocks, window, soft_cap, num_cores=1):
    # Cores write longer ranges twice, the same bytes: not a race that harms.
    interpret = pltpu.InterpretParams(
        dma_execution_mode=dma_mode,
        detect_races=num_cores == 1,
        uninitialized_memory="nan",
        num_cores_or_threads=num_cores,
    )

    def attend(case, options):
        case = dict(case, pages=to_tpu(case["pages"], head_dim))
        out, pages = tpu.ragged_paged_attention(
            **case,
            **OPTIONS,
            **options,
            window=window,
            soft_cap=soft_cap,
            num_cores=num_cores,
            blocks=blocks,
            interpret=interpret,
        )
        return out, from_tpu(pages, head_dim)

    return jax.jit(attend)


def check(case, *, mode="on_wait", blocks=BLOCKS, window=None, soft_cap=None, cores=1, tolerance=3e-5, **options):
    expected, expected_pages = reference.ragged_paged_attention(
        **case, **OPTIONS, **options, window=window, soft_cap=soft_cap
    )
    out, pages = compiled(case["queries"].shape[2], mode, blocks, window, soft_cap, cores)(case, options)
    real = int(case["query_starts"][-1])
    expected = np.asarray(expected, np.float32)
    difference = np.abs(np.asarray(out, np.float32) - expected)
    assert difference[:real].max() <= tolerance * max(1, np.abs(expected).max())
    np.testing.assert_array_equal(out[real:], 0)
    np.testing.assert_array_equal(np.asarray(pages, np.float32), np.asarray(expected_pages, np.float32))
    assert cores > 1 or not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("mode", ["eager", "on_wait"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-5), (jnp.bfloat16, 0.02)], ids=["float32", "bf16"])
def test_matches_the_specification_in_both_dma_modes(ragged_case, mode, dtype, tolerance):
    case = ragged_case(MIXED, seed=0, head_dim=128, dtype=dtype, num_tokens=100, num_sequences=8)
    check(case, mode=mode, tolerance=tolerance)


# Cases of one shape, and so one program a window.
SHAPE = {"num_tokens": 100, "num_sequences": 44, "num_pages": 140, "max_pages": 24, "head_dim": 128}


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize(
    "ranges",
    [
        [(1, 0)],
        [(1, 15), (1, 16), (1, 255), (1, 256)],
        [(16, 0), (16, 16), (48, 240)],
        [(2, 14), (3, 126), (1, 127), (30, 97)],
        [(1, n) for n in range(40)],
        [(100, 0)],
    ],
    ids=["one token", "page boundaries", "whole strips", "across boundaries", "many sequences", "one prompt"],
)
def test_every_kind_of_range(ragged_case, ranges, window):
    check(ragged_case(ranges, seed=0, **SHAPE), window=window)


def test_a_row_is_the_same_in_any_range(ragged_case):
    """Bitwise, where no range counts as a decode: each sequence's last row in its range, and as a range of its own."""
    case = ragged_case([(9, 200), (40, 130), (3, 0), (30, 255)], seed=7, **SHAPE)
    program = compiled(128, "on_wait", BLOCKS, None, None)
    together, case["pages"] = program(case, {})
    last = case["query_starts"][1:5] - 1
    for name in ("queries", "keys", "values", "positions"):
        case[name] = jnp.zeros_like(case[name]).at[:4].set(case[name][last])
    case["query_starts"] = jnp.minimum(jnp.arange(SHAPE["num_sequences"] + 1), 4)
    case["token_sequences"] = jnp.full(SHAPE["num_tokens"], SHAPE["num_sequences"]).at[:4].set(jnp.arange(4))
    apart, _ = program(case, {})
    np.testing.assert_array_equal(apart[:4], together[last])


def test_an_empty_step_writes_nothing(ragged_case):
    case = ragged_case([(1, 0)], seed=0, **SHAPE)
    empty = {name: jnp.zeros_like(case[name]) for name in ("query_starts", "kv_lengths", "num_decodes")}
    before = case["pages"]
    case = dict(case, **empty, token_sequences=jnp.full_like(case["token_sequences"], SHAPE["num_sequences"]))
    out, pages = compiled(128, "on_wait", BLOCKS, None, None)(case, {})
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(pages, before)


@settings(max_examples=15, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.sampled_from([1, 1, 2, 7, 16, 20]), st.integers(0, 300)), min_size=1, max_size=5),
    seed=st.integers(0, 9),
    window=st.sampled_from([None, 5, 100]),
)
def test_random_batches(ragged_case, ranges, seed, window):
    check(ragged_case(ranges, seed=seed, **SHAPE), window=window)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(8, 8, 64), (6, 2, 80), (4, 2, 96), (16, 1, 192), (2, 1, 256), (12, 4, 128)],
    ids=str,
)
def test_head_layouts(ragged_case, num_heads, num_kv_heads, head_dim):
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(ragged_case([(1, 140), (20, 9)], seed=1, **heads))


@pytest.mark.parametrize("page_size", [64, 256])
def test_page_sizes(ragged_case, page_size):
    blocks = tpu.Blocks(block=256, chunk=256, tail=256, query=16, prefill_chunk=256, strip=64)
    check(ragged_case([(1, 140), (70, 59)], seed=1, head_dim=128, page_size=page_size), blocks=blocks)


@pytest.mark.parametrize("stored", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8], ids=str)
def test_eight_bit_pages_with_scales(ragged_case, stored):
    case = ragged_case([(1, 140), (20, 9)], seed=2, head_dim=128)
    scales = jnp.asarray([[0.5, 2.0], [1.0, 0.25]]) * (0.05 if stored == jnp.int8 else 1.0)
    rows = case["pages"].swapaxes(3, 4)  # [L, P, 2, S, K, H]
    pages = reference.to_storage(rows.reshape(-1, *rows.shape[4:]), stored, jnp.ones(2) * 0.05)
    pages = pages.reshape(rows.shape).swapaxes(3, 4)
    check(dict(case, pages=pages), kv_scales=scales)


def test_soft_cap_and_sinks(ragged_case):
    case = ragged_case(MIXED, seed=3, head_dim=128)
    check(case, soft_cap=2.0, sinks=jnp.asarray([0.5, -3.0, 8.0, 0.0]))


@pytest.mark.parametrize(
    "ranges",
    [
        [(1, 33), (30, 0), (1, 5), (5, 130), (1, 290), (17, 0)],
        [(1, n) for n in range(0, 200, 9)],
        [(100, 200)],
        [(1, 3)],
    ],
    ids=["mixed", "decode", "prefill", "one"],
)
def test_two_cores_share_the_work(ragged_case, ranges):
    check(ragged_case(ranges, seed=6, **SHAPE), window=100, cores=2)


def test_nan_in_other_tokens_places_does_not_spread(ragged_case):
    """What a page holds past its sequence's end is another's, and may be anything."""
    case = ragged_case([(1, 20), (20, 9)], seed=4, **SHAPE)
    clean, _ = compiled(128, "on_wait", BLOCKS, None, None)(case, {})
    used = [int(page) for row, count in ((0, 2), (1, 2)) for page in case["block_tables"][row, :count]]
    dirty = case["pages"].at[:, [page for page in range(140) if page not in used]].set(jnp.nan)
    for row, length in ((0, 21), (1, 29)):
        dirty = dirty.at[:, int(case["block_tables"][row, 1]), :, :, length - 16 :].set(jnp.nan)
    out, _ = compiled(128, "on_wait", BLOCKS, None, None)(dict(case, pages=dirty), {})
    np.testing.assert_array_equal(out, clean)


def test_nan_in_pages_before_the_window_does_not_spread(ragged_case):
    """Pages that a window has passed are another sequence's, and may hold anything."""
    case = ragged_case([(1, 300), (1, 190), (20, 150)], seed=8, **SHAPE)
    attend = compiled(128, "on_wait", BLOCKS, 50, None)
    clean, _ = attend(case, {})
    used = [
        int(page)
        for row, (new, cached) in enumerate([(1, 300), (1, 190), (20, 150)])
        for page in case["block_tables"][row, (cached - 50 + 1) // 16 : -(-(cached + new) // 16)]
    ]
    out, _ = attend(dict(case, pages=case["pages"].at[:, [p for p in range(140) if p not in used]].set(jnp.nan)), {})
    np.testing.assert_array_equal(out, clean)


def test_the_layer_may_be_traced(ragged_case):
    case = ragged_case([(1, 20), (20, 9)], seed=5, head_dim=128)
    expected, _ = reference.ragged_paged_attention(**case, layer=1, scale=0.3)
    case["pages"] = to_tpu(case["pages"], 128)

    @jax.jit
    def attend(case, layer):
        return tpu.ragged_paged_attention(**case, layer=layer, scale=0.3, blocks=BLOCKS, interpret=True)

    np.testing.assert_allclose(attend(case, jnp.int32(1))[0], expected, atol=3e-5)


def test_a_work_list_made_once_serves_every_layer(ragged_case):
    case = ragged_case([(1, 20), (20, 9), (1, 300)], seed=7, head_dim=128)
    expected = [reference.ragged_paged_attention(**case, layer=layer, scale=0.3, window=50)[0] for layer in (0, 1)]
    pages = to_tpu(case.pop("pages"), 128)
    rows = {name: case.pop(name) for name in ("queries", "keys", "values")}
    geometry = tpu.Geometry.of(4, 2, 128, 16, jnp.float32, jnp.float32)
    work = tpu.step_work(**case, geometry=geometry, window=50, blocks=BLOCKS, interpret=True)
    spoilt = {name: jnp.zeros_like(case[name]) for name in ("kv_lengths", "query_starts")}  # all is in the work list

    @jax.jit
    def attend(layer, work):
        return tpu.ragged_paged_attention(
            **rows,
            **{**case, **spoilt},
            pages=pages,
            layer=layer,
            scale=0.3,
            window=50,
            work=work,
            blocks=BLOCKS,
            interpret=True,
        )

    for layer in (0, 1):
        np.testing.assert_allclose(attend(jnp.int32(layer), work)[0], expected[layer], atol=3e-5)


CHIPS = [chip.device_kind for chip in tpu.chips()]


@pytest.mark.parametrize("device_kind", CHIPS)
@pytest.mark.parametrize(
    "heads", [(8, 4, 128), (1, 8, 128), (32, 1, 128), (8, 2, 256), (8, 8, 64), (8, 16, 128)], ids=str
)
@pytest.mark.parametrize("page_size", [16, 64, 128, 256])
def test_block_sizes_fit_every_chip(device_kind, heads, page_size):
    chip = tpu.find_chip(device_kind)
    geometry = tpu.Geometry(*heads, page_size, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
    blocks = tpu.block_sizes(geometry, device_kind)
    assert blocks.vmem_bytes(geometry) < chip.vmem_bytes
    assert blocks.block % blocks.chunk == blocks.chunk % blocks.tail == blocks.block % blocks.prefill_chunk == 0
    assert blocks.tail % page_size == page_size % blocks.strip == 0
    assert blocks.query * geometry.queries_per_head % 16 == 0


def test_errors_name_the_remedy():
    geometry = tpu.Geometry(8, 4, 128, 64, jnp.dtype(jnp.int8), jnp.dtype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"int8 is not served on TPU v4, .* use a bfloat16 cache"):
        tpu.block_sizes(geometry, "TPU v4")
    with pytest.raises(ValueError, match=r"device_kind 'TPU v99' is unknown .* attention_backend='xla'"):
        tpu.block_sizes(geometry, "TPU v99")
    huge = tpu.Geometry(64, 1, 256, 256, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))
    with pytest.raises(
        ValueError, match=r"block_size=256 need .* MiB of VMEM, and TPU v4 has 14.0 .* lower block_size"
    ):
        tpu.block_sizes(huge, "TPU v4")


def test_float16_is_refused(ragged_case):
    case = ragged_case([(1, 20)], seed=0, head_dim=128, dtype=jnp.float16)
    with pytest.raises(ValueError, match="float16, which TPUs do not compute in; use dtype bfloat16 or float32"):
        tpu.ragged_paged_attention(**case, **OPTIONS, interpret=True)
