"""Every implementation of ragged paged attention against the float32 specification and an independent dense
computation.
"""

import sys
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_engine.cuda_fallback import paged_attention as xla
from jax_engine.cuda_fallback.cpu import attention as cpu
from jax_engine.models.kv_pages import SequenceTable
from jax_engine.models.ops import KernelShapes, select_ops
from jax_engine.pallas_kernels import reference

# A GPU's way, in amounts of which a test's lists need several trips, and in its own.
SMALL_ITEMS = xla.Sizes(xla.Tiles(3, 8), xla.Tiles(3, 2), chunk_tokens=16, decode_rows=None)
IMPLEMENTATIONS = {
    "xla": xla.ragged_paged_attention,
    "xla by items": partial(xla.ragged_paged_attention, sizes=SMALL_ITEMS),
    "cpu": cpu.ragged_paged_attention,
}
OF_A_CPU = pytest.mark.parametrize(
    "implementation", [xla.ragged_paged_attention, cpu.ragged_paged_attention], ids=["xla", "cpu"]
)
RAGGED = [
    [(1, 0)],
    [(1, 16), (1, 15), (1, 300)],
    [(17, 0)],
    [(1, 33), (64, 0), (1, 5), (5, 130)],
    [(200, 0), (1, 1), (70, 64), (2, 0)],
    [(1, n) for n in range(40)],
]


# Cases of like page size share one shape, and so one program a window.
SHAPE = {"num_tokens": 300, "num_sequences": 44, "num_pages": 140, "max_pages": 24}


@lru_cache
def compiled(implementation, window):
    return jax.jit(partial(implementation, layer=1, scale=0.3, window=window))


def compare(implementation, case, *, window, tolerance=2e-5):
    expected, expected_pages = compiled(reference.ragged_paged_attention, window)(**case)
    out, pages = compiled(implementation, window)(**case)
    real = int(case["query_starts"][-1])
    np.testing.assert_allclose(out[:real], expected[:real], atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(pages, expected_pages)
    np.testing.assert_array_equal(out[real:], 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 1, 24, 1000])
@pytest.mark.parametrize("ranges", RAGGED, ids=str)
def test_matches_the_specification(ragged_case, implementation, ranges, window):
    compare(implementation, ragged_case(ranges, seed=0, **SHAPE), window=window)


@pytest.mark.parametrize(
    "implementation",
    [reference.ragged_paged_attention, *IMPLEMENTATIONS.values()],
    ids=["specification", *IMPLEMENTATIONS],
)
@pytest.mark.parametrize("window", [None, 24])
def test_nan_in_places_that_nobody_sees_does_not_spread(ragged_case, implementation, window):
    """Pages of others, places past a sequence's end, and those before its window."""
    ranges = [(1, 20), (1, 150), (40, 9), (30, 100)]
    case = ragged_case(ranges, seed=7, **SHAPE)
    clean, _ = compiled(implementation, window)(**case)
    seen = np.zeros((140, 16), bool)
    for row, (new, cached) in enumerate(ranges):
        first = 0 if window is None else max(0, cached - window + 1)
        for place in range(first, cached + new):
            seen[int(case["block_tables"][row, place // 16]), place % 16] = True
    dirty = jnp.where(seen[None, :, None, None, :, None], case["pages"], jnp.nan)
    out, _ = compiled(implementation, window)(**dict(case, pages=dirty))
    np.testing.assert_array_equal(out, clean)


@OF_A_CPU
@settings(max_examples=50, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 80)), min_size=1, max_size=7),
    seed=st.integers(0, 9),
    window=st.sampled_from([None, 24]),
)
def test_matches_on_random_batches(ragged_case, implementation, ranges, seed, window):
    compare(implementation, ragged_case(ranges, seed=seed, **SHAPE), window=window)


@OF_A_CPU
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 1), (6, 3)])
@pytest.mark.parametrize("page_size", [8, 128, 256])
def test_head_groups_and_page_sizes(ragged_case, implementation, num_heads, num_kv_heads, page_size):
    case = ragged_case([(1, 40), (30, 9)], seed=1, num_heads=num_heads, num_kv_heads=num_kv_heads, page_size=page_size)
    compare(implementation, case, window=None)


@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 8), (3, 40), (80, 24), (2, 256)])
def test_a_cpus_kernel_takes_any_head_size_of_eights(ragged_case, num_heads, head_dim):
    """Of one vector, of a wide one and a narrow one, and of many; with more heads of a key than a tile has rows."""
    ranges = [(1, 70), (1, 0), (40, 21)]
    case = ragged_case(ranges, seed=1, num_heads=num_heads, num_kv_heads=1, head_dim=head_dim, page_size=8)
    compare(cpu.ragged_paged_attention, case, window=24)


@pytest.mark.parametrize(("num_heads", "page_size"), [(1, 16), (3, 64), (6, 64), (9, 256)])
def test_a_gpus_sizes(ragged_case, num_heads, page_size):
    """Query heads of one key, few and odd, and more than one reduction sums; and a page that is a whole item."""
    ranges = [(1, 40), (30, 9), (1, 700), (1, 0)]
    case = ragged_case(ranges, seed=1, num_heads=num_heads, num_kv_heads=1, page_size=page_size)
    compare(partial(xla.ragged_paged_attention, sizes=xla.GPU_SIZES), case, window=None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_soft_cap_and_sinks(ragged_case, implementation):
    """A cap that bends the scores, and sinks that take from no weight to nearly all, in decode and in longer ranges."""
    case = ragged_case([(1, 40), (30, 9), (1, 150)], seed=5)
    options = {"layer": 1, "scale": 0.3, "soft_cap": 2.0, "sinks": jnp.asarray([0.5, -30.0, 8.0, 0.0])}
    expected, _ = reference.ragged_paged_attention(**case, **options)
    out, _ = implementation(**case, **options)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    plain, _ = implementation(**case, layer=1, scale=0.3)
    assert np.abs(out - plain).max() > 0.1


@pytest.mark.parametrize("sizes", [xla.CPU_SIZES, SMALL_ITEMS], ids=["groups", "items"])
@pytest.mark.parametrize("stored", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int8], ids=str)
def test_eight_bit_pages_with_scales(ragged_case, stored, sizes):
    """Scales differ by key and value and by head; new tokens are stored rounded and clipped."""
    case = ragged_case([(1, 40), (30, 9)], seed=6)
    rows = case["pages"].swapaxes(3, 4)  # [L, P, 2, S, K, H]
    pages = reference.to_storage(rows.reshape(-1, *rows.shape[4:]), stored, jnp.full(2, 0.05))
    case["pages"] = pages.reshape(rows.shape).swapaxes(3, 4)
    scales = jnp.asarray([[0.02, 0.1], [0.05, 0.01]])
    options = {"layer": 1, "scale": 0.3, "kv_scales": scales}
    expected, expected_pages = reference.ragged_paged_attention(**case, **options)
    out, new_pages = xla.ragged_paged_attention(**case, **options, sizes=sizes)
    np.testing.assert_allclose(out, expected, atol=1e-4 * max(1, float(jnp.abs(expected).max())))
    np.testing.assert_array_equal(new_pages.astype(np.float32), expected_pages.astype(np.float32))
    if stored != jnp.int8:
        bits = dict(case, pages=jax.lax.bitcast_convert_type(case["pages"], jnp.uint8))
        of_bits, new_bits = xla.ragged_paged_attention(**bits, **options, bits_of=stored, sizes=sizes)
        np.testing.assert_array_equal(of_bits, out)
        np.testing.assert_array_equal(new_bits, jax.lax.bitcast_convert_type(new_pages, jnp.uint8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
def test_bfloat16_stays_near_float32(ragged_case, implementation):
    case = ragged_case([(1, 100), (50, 20)], seed=2, dtype=jnp.bfloat16)
    expected, _ = reference.ragged_paged_attention(**case, layer=0, scale=0.25)
    out, _ = implementation(**case, layer=0, scale=0.25)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=0.03)


WHOLE = [(1, 33), (64, 0), (1, 0), (5, 130), (17, 0), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize(("ranges", "window"), [(WHOLE, None), (WHOLE, 24), ([(560, 0), (30, 0), (9, 9)], None)])
def test_whole_prompts_by_dense_attention(ragged_case, ranges, window):
    """Those alone that begin their sequence, in steps of one length of theirs and of two."""
    case = ragged_case(ranges, seed=9)
    compare(partial(xla.ragged_paged_attention, whole_prompts="xla"), case, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("ranges", "window"), [(WHOLE, None), (WHOLE, 24), ([(560, 0), (30, 0), (9, 9)], None)])
def test_whole_prompts_by_cudnn(ragged_case, ranges, window, head_dim):
    case = ragged_case(ranges, seed=9, dtype=jnp.bfloat16, head_dim=head_dim)
    expected, _ = compiled(reference.ragged_paged_attention, window)(**case)
    cudnn = partial(xla.ragged_paged_attention, sizes=xla.GPU_SIZES, whole_prompts="cudnn")
    out, _ = compiled(cudnn, window)(**case)
    np.testing.assert_allclose(out.astype(np.float32), expected.astype(np.float32), atol=0.05)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "takes bfloat16 and float16, not float32"),
        ({"dtype": jnp.bfloat16, "head_dim": 20}, {}, "takes a head_dim that is a multiple of 8, 256 at most, not 20"),
        ({"dtype": jnp.bfloat16}, {"soft_cap": 3.0}, "has no soft cap and no sinks; use attention_backend='xla'"),
    ],
)
def test_what_cudnn_does_not_take_is_refused(ragged_case, changes, options, message):
    with pytest.raises(ValueError, match=f"attention_backend='cudnn' {message}"):
        xla.ragged_paged_attention(
            **ragged_case([(3, 0)], seed=0, **changes), **options, layer=0, scale=1.0, whole_prompts="cudnn"
        )


def test_a_gpu_gets_the_sizes_made_for_it():
    assert xla.sizes_for("gpu").decode_rows is None
    for platform, deterministic in (("gpu", False), ("gpu", True), ("cpu", False), ("cpu", True)):
        ops, _ = select_ops("xla", platform=platform, deterministic=deterministic)
        assert ops.attention.kernel.keywords == {"sizes": xla.sizes_for(platform, deterministic=deterministic)}


def test_cudnn_is_chosen_on_a_gpu_alone_and_not_with_fixed_orders():
    ops, reason = select_ops("cudnn", platform="gpu")
    assert ops.attention_name == "cudnn" and "whole prompts by cuDNN" in reason
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU and this machine's platform is 'cpu'"):
        select_ops("cudnn", platform="cpu")
    with pytest.raises(ValueError, match=r"deterministic=True promises the same numbers"):
        select_ops("cudnn", platform="gpu", deterministic=True)


def test_specification_matches_dense_attention(ragged_case):
    """The paged specification equals plain softmax attention computed in numpy over the same tokens."""
    case = ragged_case([(9, 14)], seed=3, num_layers=1)
    out, pages = reference.ragged_paged_attention(**case, layer=0, scale=0.5)
    context = np.asarray(pages)[0, np.asarray(case["block_tables"])[0]]  # [M, 2, K, S, H]
    keys, values = context.transpose(1, 0, 3, 2, 4).reshape(2, -1, 2, 16)[:, :23].astype(np.float64)
    for row in range(9):
        for head in range(4):
            scores = keys[: 15 + row, head // 2] @ np.asarray(case["queries"][row, head], np.float64) * 0.5
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(
                out[row, head], weights @ values[: 15 + row, head // 2] / weights.sum(), atol=1e-5
            )


@OF_A_CPU
def test_a_row_does_not_depend_on_the_rows_beside_it(ragged_case, implementation):
    """Bitwise: a decode row alone, and the same row among longer ones."""
    case = ragged_case([(1, 150), (1, 20), (1, 700)], seed=4)
    together, _ = implementation(**case, layer=0, scale=0.25)
    alone = dict(case, query_starts=jnp.array([0, 1, 1, 1]), num_decodes=jnp.array(1))
    alone["kv_lengths"] = case["kv_lengths"].at[1:].set(0)
    alone["token_sequences"] = case["token_sequences"].at[1:].set(3)
    single, _ = implementation(**alone, layer=0, scale=0.25)
    np.testing.assert_array_equal(together[0], single[0])


@pytest.mark.parametrize("window", [None, 24])
def test_a_cpus_kernel_does_not_depend_on_how_a_prompt_is_cut(ragged_case, window):
    """Bitwise: a prompt whole, and in parts of one token and of many, each behind those before it."""
    case = ragged_case([(150, 0)], seed=8)
    attend = partial(cpu.ragged_paged_attention, layer=1, scale=0.3, window=window)
    whole, pages = attend(**case)
    parts, start = [], 0
    for length in (1, 90, 7, 1, 51):
        rows = {name: case[name][start : start + length] for name in ("queries", "keys", "values", "positions")}
        lengths = {"query_starts": jnp.array([0, length]), "kv_lengths": jnp.array([start + length])}
        part = case | rows | lengths | {"token_sequences": jnp.zeros(length, jnp.int32)}
        out, case["pages"] = attend(**part)
        parts.append(out)
        start += length
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(case["pages"], pages)


def test_threads_that_share_a_call_change_nothing(ragged_case):
    """A prompt that is worth the help of other threads, over and over: to the same bits every time, the right ones."""
    case = ragged_case([(1, 400), (560, 0), (1, 30)], seed=9, num_tokens=600)
    compare(cpu.ragged_paged_attention, case, window=None)
    attend = compiled(cpu.ragged_paged_attention, None)
    first, _ = attend(**case)
    for _ in range(50):
        np.testing.assert_array_equal(attend(**case)[0], first)


def test_a_cpus_kernel_writes_pages_in_place(ragged_case):
    """In a loop over layers too: nothing as large as the pages is allocated, and no instruction copies them."""
    case = ragged_case([(1, 40), (30, 9)], seed=6, num_pages=2000)
    pages = case.pop("pages")

    def run(pages, case):
        def layer(index, carry):
            out, pages = carry
            return cpu.ragged_paged_attention(**(case | {"queries": out}), pages=pages, layer=index, scale=0.3)

        return jax.lax.fori_loop(0, 2, layer, (case["queries"], pages))

    program = jax.jit(run, donate_argnums=0).lower(pages, case).compile()
    analysis = program.memory_analysis()
    assert analysis.alias_size_in_bytes >= pages.nbytes > 10 * analysis.temp_size_in_bytes
    shape = ",".join(map(str, pages.shape))
    assert not [line for line in program.as_text().splitlines() if f"f32[{shape}]" in line and " copy(" in line]


def test_a_cpu_chooses_its_kernel_where_that_can_run(monkeypatch):
    assert select_ops("auto", platform="cpu")[0].attention_name == "cpu"
    ops, reason = select_ops("auto", platform="cpu", shapes=KernelShapes(jnp.float16, jnp.float16))
    assert (ops.attention_name, "not float16" in reason) == ("xla", True)
    ops, reason = select_ops("auto", platform="cpu", shapes=KernelShapes(head_dim=20, page_size=16))
    assert (ops.attention_name, "multiples of 8, not 20 and 16" in reason) == ("xla", True)
    with pytest.raises(ValueError, match=r"attention_backend='cpu' is not for this engine: .* not 20 and 16; use"):
        select_ops("cpu", platform="cpu", shapes=KernelShapes(head_dim=20, page_size=16))
    with pytest.raises(ValueError, match=r"attention_backend='cpu' needs a CPU and this engine's platform is 'gpu'"):
        select_ops("cpu", platform="gpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    ops, reason = select_ops("auto", platform="cpu")
    assert (ops.attention_name, "numba is not installed" in reason) == ("xla", True)


def test_a_block_of_a_sequence_table_is_the_table_of_its_rows():
    """Of two decodes, a continued chunk, a fresh prompt and padding: the sequences that have rows in it, and from the
    first of them on as many as a block can hold.
    """
    starts, lengths = jnp.array([0, 1, 2, 5, 9, 9]), jnp.array([7, 3, 10, 4, 0])
    tables = jnp.arange(5, dtype=jnp.int32)[:, None]
    table = SequenceTable.build(tables, starts, lengths, jnp.array(2), num_tokens=12)
    block = table.block(jnp.array(1), 3)
    assert block.block_tables[:, 0].tolist() == [1, 2, 3]
    assert (block.token_sequences.tolist(), block.positions.tolist()) == ([0, 1, 1], [2, 7, 8])
    assert (block.query_starts.tolist(), block.kv_lengths.tolist()) == ([0, 1, 3, 3], [3, 9, 0])
    assert block.num_decodes == 1
    block = table.block(jnp.array(3), 4)
    assert block.block_tables[:2, 0].tolist() == [2, 3]
    assert (block.token_sequences.tolist(), block.positions.tolist()) == ([0, 0, 1, 1], [8, 9, 0, 1])
    assert (block.query_starts.tolist(), block.kv_lengths.tolist()) == ([0, 2, 4, 4, 4], [10, 2, 0, 0])
    assert block.num_decodes == 0
    assert table.block(jnp.array(8), 4).query_starts.tolist() == [0, 1, 1, 1, 1]
    assert table.block(jnp.array(12), 4).query_starts.tolist() == [0, 0, 0, 0, 0], "past the rows there is nobody"


def test_sequence_table_places_every_token():
    """Positions and owners of two decodes, a continued chunk, a fresh prompt, one padding sequence and padding rows."""
    starts, lengths = jnp.array([0, 1, 2, 5, 9, 9]), jnp.array([7, 3, 10, 4, 0])
    table = SequenceTable.build(jnp.zeros((5, 2), jnp.int32), starts, lengths, jnp.array(2), num_tokens=12)
    assert table.token_sequences.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 3, 5, 5, 5]
    assert table.positions.tolist() == [6, 2, 7, 8, 9, 0, 1, 2, 3, 0, 0, 0]
