"""The GPU kernel, interpreted on a CPU with race detection, against the float32 specification; its work list; and what
it refuses.

The interpreter has copies, barriers and races as on the chip; matrix products and register layouts it does not know,
and of copies that begin within a tile only what `lanes.py` tells it. Those are checked by compilation for a chip
that is not here: `benchmarks/gpu_static.py`. Its warpgroups wait for each other in threads of XLA's, of which a small
machine has too few, hence a process of its own.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Array
from ragged_cases import build_ragged_case

from jax_engine.cuda_fallback.paged_attention import write_pages
from jax_engine.models.gpu_attention import GpuAttention
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.ops import select_ops
from jax_engine.models.partition import ONE_DEVICE, Partition
from jax_engine.pallas_kernels import gpu, reference
from jax_engine.pallas_kernels.gpu.work_list import (
    ALIGNMENT,
    CHUNK,
    END_KEY,
    FIRST_KEY,
    FIRST_POSITION,
    FIRST_ROW,
    NUM_TOKENS,
    OUTPUT,
    SEQUENCE,
    SKIPPED,
    Work,
    WorkShape,
    build_work,
    rows_a_token,
)

LAYER, SCALE, MULTIPROCESSORS = 1, 0.3, 3
compiled_work = jax.jit(build_work, static_argnames=("shape", "window"))
# A decode of one chunk, one of two parts, a range of a wide tile and a narrow one, and a short range.
MIXED = [(1, 5), (1, 400), (70, 20), (3, 60)]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "everything": (
        {"ranges": MIXED, "heads": (2, 1), "num_tokens": 80, "num_sequences": 6},
        {"window": 280, "soft_cap": 20.0},
    ),
    "plain": ({"ranges": MIXED, "num_tokens": 80}, {}),
    "one head": ({"ranges": [(1, 140), (20, 50)], "heads": (8, 1), "head_dim": 128, "page_size": 64}, {}),
    "large": ({"ranges": [(1, 140), (30, 50)], "heads": (2, 2), "head_dim": 256, "page_size": 128}, {"window": 70}),
    "odd group": ({"ranges": [(1, 140), (30, 50)], "heads": (7, 1), "page_size": 8, "dtype": "float16"}, {}),
    "wide decode": ({"ranges": [(1, 140), (2, 1)], "heads": (80, 1)}, {}),
    "no groups": ({"ranges": [(1, 140), (2, 90), (70, 3)], "heads": (2, 2), "page_size": 32}, {"window": 60}),
    "eight bits": ({"ranges": [(1, 300), (70, 20)], "stored": "float8_e4m3fn"}, {"window": 280}),
}


def case_of(
    ranges: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    dtype: str = "bfloat16",
    stored: str = "",
    **sizes: int,
) -> dict[str, Array]:
    """A batch whose cache has NaN wherever no token is; with scales, if it is stored in 8 bits."""
    shape = {"num_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim, "dtype": jnp.dtype(dtype)}
    case = build_ragged_case(ranges, seed=0, **shape, **sizes)
    page_size = case["pages"].shape[4]
    held = np.zeros((case["pages"].shape[1], page_size), bool)
    for row, length in enumerate(np.asarray(case["kv_lengths"])):
        for place in range(length):
            held[int(case["block_tables"][row, place // page_size]), place % page_size] = True
    case["pages"] = jnp.where(held[None, :, None, None, :, None], case["pages"], jnp.nan)
    if not stored:
        return case
    scales = jnp.linspace(0.01, 0.1, 2 * heads[1]).reshape(2, heads[1])
    pages = case["pages"].astype(jnp.float32) / scales[None, None, :, :, None, None]
    return case | {"pages": pages.astype(stored), "kv_scales": scales}


def attend(case: dict[str, Array], sinks: Array, *, window: int | None, soft_cap: float | None) -> tuple[Array, Array]:
    tables, scales = (case["block_tables"], case["token_sequences"], case["positions"]), case.get("kv_scales")
    new = case["keys"], case["values"]
    if scales is not None:
        new = tuple(rows.astype(jnp.float32) / scales[plane, :, None] for plane, rows in enumerate(new))
    pages = write_pages(*new, case["pages"], *tables, LAYER)
    sizes = {"num_heads": case["queries"].shape[1], "num_kv_heads": pages.shape[3]}
    shared: dict[str, Any] = {"window": window, "multiprocessors": MULTIPROCESSORS}
    work = gpu.step_work(case["query_starts"], case["token_sequences"], case["positions"], **sizes, **shared)
    options: dict[str, Any] = {
        "layer": LAYER,
        "scale": SCALE,
        "soft_cap": soft_cap,
        "sinks": sinks,
        "kv_scales": scales,
    }
    how = {"interpret": gpu.interpreter(detect_races=True), "stages": 2}
    return gpu.attend(case["queries"], pages, case["block_tables"], work, **options, **shared, **how), pages


def run_case(name: str) -> dict[str, Any]:
    """What the interpreted kernel makes of a case, beside the specification; for a process with enough threads."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    given, options = CASES[name]
    case, options = case_of(**given), {"window": None, "soft_cap": None} | options
    sinks = jnp.linspace(-1, 2, case["queries"].shape[1], dtype=jnp.float32)
    expected, expected_pages = reference.ragged_paged_attention(
        **case, layer=LAYER, scale=SCALE, sinks=sinks, **options
    )
    out, pages = jax.jit(attend, static_argnames=("window", "soft_cap"))(case, sinks, **options)
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    real = int(case["query_starts"][-1])
    same = np.array_equal(np.asarray(pages, np.float32), np.asarray(expected_pages, np.float32), equal_nan=True)
    return {
        "error": float(np.abs(out - expected)[:real].max() / max(1, np.abs(expected).max())),
        "padding is zero": not out[real:].any(),
        "same pages": same,
        "races": bool(gpu_callbacks.get_races().races_found),
    }


def child(expression: str, module: str = "test_gpu_attention") -> Any:
    """The value of an expression about a module `t`, in a process with threads for all warpgroups."""
    script = f"import json, {module} as t; print(json.dumps({expression}))"
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent / "engine", here.parent / "support")))
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "NPROC": "8"},
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "name", [name if name == "everything" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_the_interpreted_kernel_does_what_is_specified(name):
    """Without races; rows of padding are zero, and nobody sees the NaN in places that hold no token."""
    found = child(f"t.run_case({name!r})")
    assert found.pop("error") < 0.02
    assert found == {"padding is zero": True, "same pages": True, "races": False}


@settings(max_examples=40, deadline=None)
@given(
    ranges=st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 9, 40, 130]), st.integers(0, 3000)), max_size=6),
    model=st.sampled_from([((8, 2), None), ((28, 4), 100), ((16, 1), 1000), ((4, 4), 300)]),
)
def test_items_cover_each_row_and_key_once_and_no_part_is_lost(ranges, model):
    (heads, window), num_tokens, num_sequences = model, 800, 8
    case = build_ragged_case([(1, 0), *ranges], seed=0, num_tokens=num_tokens, num_sequences=num_sequences)
    starts, sequences, positions = (np.asarray(case[n]) for n in ("query_starts", "token_sequences", "positions"))
    shape = WorkShape.of(num_tokens, num_sequences, *heads, 132)
    work = Work(*map(np.asarray, compiled_work(starts, sequences, positions, shape=shape, window=window)))
    assert int(work.num_items[0]) <= shape.num_items
    items = work.items[: int(work.num_items[0])]
    assert (np.diff(items[:, END_KEY] - items[:, FIRST_KEY]) <= 0).all(), "the longest come first"
    by_output = {int(item[OUTPUT]): item for item in items}
    real = int(starts[-1])
    for token in range(real):
        first, count, tokens, place = (int(part[token]) for part in work[2:])
        assert 1 <= count <= shape.max_parts
        parts = [by_output[first + number] for number in range(count)]
        for part in parts:
            assert part[FIRST_ROW] * rows_a_token(heads[0] // heads[1]) % ALIGNMENT == 0, (
                "copies begin with whole tiles"
            )
            assert part[SKIPPED] <= place
            assert part[SEQUENCE] == sequences[token]
            assert part[FIRST_ROW] + place == token
            assert place < part[NUM_TOKENS] == tokens <= shape.tile_tokens
            assert part[FIRST_POSITION] + place == positions[token]
        assert all(here[END_KEY] == there[FIRST_KEY] for here, there in pairwise(parts))
        lowest = 0 if window is None else max(0, int(positions[token]) - window + 1)
        assert parts[0][FIRST_KEY] <= lowest
        assert parts[0][FIRST_KEY] % CHUNK == 0
        assert parts[-1][END_KEY] > positions[token]
    assert (work.num_parts[real:] == 0).all()


def chunks_of(work: Work, token: int) -> list[tuple[int, int]]:
    """The chunks that a token's parts begin and end with."""
    by_output = {int(item[OUTPUT]): item for item in np.asarray(work.items)[: int(work.num_items[0])]}
    first, count = int(work.first_items[token]), int(work.num_parts[token])
    items = [by_output[first + number] for number in range(count)]
    return [(int(item[FIRST_KEY]) // CHUNK, -(-int(item[END_KEY]) // CHUNK)) for item in items]


def test_fixed_parts_begin_at_places_of_the_sequence_whatever_else_is_in_a_step():
    shape = WorkShape.of(64, 3, 8, 2, 132, fixed_tokens=16_000)
    assert (shape.fixed_part, shape.max_parts, shape.tile_tokens) == (32, 8, 16)
    for window, expected in ((None, [(0, 32), (32, 64), (64, 79)]), (3000, [(31, 32), (32, 64), (64, 79)])):
        for ranges in ([(1, 4999)], [(9, 4991), (50, 0)], [(1, 15_000), (1, 20), (30, 4970)]):
            case = build_ragged_case(ranges, seed=0, num_tokens=64, num_sequences=3)
            starts, sequences, positions = (case[name] for name in ("query_starts", "token_sequences", "positions"))
            token = int(np.flatnonzero(np.asarray(positions) == 4999)[0])
            work = compiled_work(starts, sequences, positions, shape=shape, window=window)
            assert bool(work.num_tokens[token] * 4 <= 64), "of a narrow tile"
            assert chunks_of(work, token) == expected


def rows_alone_and_among_others() -> bool:
    """Whether a token's result has the same bits as a decode alone and at the end of a range among others."""
    case = case_of([(1, 5), (9, 392), (20, 130)], num_tokens=32, num_sequences=4)
    tables, rows = case["block_tables"], ("token_sequences", "positions")
    pages = write_pages(case["keys"], case["values"], case["pages"], tables, *(case[name] for name in rows), LAYER)

    @jax.jit
    def run(queries: Array, tables: Array, starts: Array, sequences: Array, positions: Array) -> Array:
        room = tables.shape[1] * pages.shape[4]
        shared: dict[str, Any] = {"multiprocessors": MULTIPROCESSORS, "window": 300}
        work = gpu.step_work(starts, sequences, positions, num_heads=4, num_kv_heads=2, fixed_tokens=room, **shared)
        options: dict[str, Any] = {"layer": LAYER, "scale": SCALE, "deterministic": True, **shared}
        return gpu.attend(queries, pages, tables, work, **options, interpret=gpu.interpreter(), stages=2)

    among = run(case["queries"], tables, case["query_starts"], *(case[name] for name in rows))
    token = 9  # the last of the second sequence
    alone = run(
        case["queries"].at[0].set(case["queries"][token]),
        tables.at[0].set(tables[1]),
        jnp.array([0, 1, 1, 1, 1], jnp.int32),
        jnp.full(32, 4, jnp.int32).at[0].set(0),
        jnp.zeros(32, jnp.int32).at[0].set(400),
    )
    return bool(jnp.array_equal(among[token], alone[0])) and bool(jnp.abs(alone[0]).max() > 0)


@pytest.mark.slow
def test_with_fixed_parts_a_row_is_the_same_to_the_last_bit_in_any_company():
    assert child("t.rows_alone_and_among_others()") is True


@pytest.mark.slow
def test_devices_that_own_sequences_pages_attend_to_them():
    assert child("t.error_of_owned_pages()", "gpu_divided_pages") < 0.02


@pytest.mark.slow
def test_a_stripe_of_the_pages_gives_its_part_of_each_rows_softmax():
    assert child("t.error_of_stripes()", "gpu_divided_pages") < 0.02


def test_a_window_skips_chunks_and_a_long_sequence_alone_is_cut_for_all_multiprocessors():
    starts, sequences, positions = jnp.array([0, 1]), jnp.array([0]), jnp.array([99_999])
    shape = WorkShape.of(1, 1, 32, 8, 132)
    for window, num_chunks in ((None, 1563), (256, 5)):
        work = compiled_work(starts, sequences, positions, shape=shape, window=window)
        items = np.asarray(work.items)[: int(work.num_items[0])]
        assert sum(-(-(end - first) // CHUNK) for first, end in items[:, [FIRST_KEY, END_KEY]]) == num_chunks
        assert len(items) == (2 if window else 16)


def ask_for(backend: str, platform: str, **changes: Any) -> tuple[Any, str]:
    return select_ops(backend, platform=platform, **changes)


def on_device(capability: str) -> Partition:
    """A partition over one device of this generation; of a device, the choice asks no more."""
    device = SimpleNamespace(compute_capability=capability, core_count=132)
    mesh = SimpleNamespace(devices=np.array([device], object), shape={}, axis_names=())
    return Partition(mesh=mesh)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "platform", "changes", "says"),
    [
        ("pallas_gpu", "cpu", {}, r"needs an NVIDIA GPU and this machine's platform is 'cpu'; use auto or xla"),
        ("pallas_gpu", "tpu", {}, r"needs an NVIDIA GPU"),
        ("pallas_gpu", "gpu", {"partition": on_device("8.0")}, r"Hopper .* capability is 8.0; use .*'xla'"),
        ("pallas_gpu", "gpu", {"partition": on_device("10.0")}, r"Hopper .* capability is 10.0; use .*'xla'"),
        ("pallas_gpu", "gpu", {"partition": on_device("gfx942")}, r"Hopper .* capability is gfx942"),
    ],
)
def test_where_it_cannot_run_is_said(backend, platform, changes, says):
    with pytest.raises(ValueError, match=says):
        ask_for(backend, platform, **changes)


def test_it_runs_on_hopper_when_asked_for_and_auto_says_why_it_does_not():
    ops, reason = ask_for("pallas_gpu", "gpu", partition=on_device("9.0"))
    assert (ops.attention_name, reason) == ("pallas_gpu", "asked for")
    ops, reason = ask_for("auto", "gpu")
    assert ops.attention_name == "xla"
    assert "pallas_gpu is to be asked for by name: it has never run on a GPU" in reason


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 80}, "its head sizes are 64, 128, 256, and here it is 80; use attention_backend='xla'"),
        ({"page_size": 4}, r"its page sizes \(block_size\) are 8, 16, 32, 64, 128, 256, and here it is 4"),
        ({"dtype": "float32"}, "its queries are bfloat16 or float16 and its pages like them .*, and here they are flo"),
        ({"heads": (129, 1)}, "it has room for 128 query heads a key and value head, and here are 129"),
        (
            {"heads": (65, 1), "deterministic": True},
            "it has room for 64 query .* with deterministic=True, and here",
        ),
    ],
)
def test_what_an_engine_would_not_be_run_with_is_said(changes, says):
    with pytest.raises(ValueError, match=f"'pallas_gpu_interpret' does not run this model: {says}"):
        traced(**changes)


def test_pages_of_eight_bits_take_registers():
    shape = {"num_heads": 4, "num_kv_heads": 2, "dtype": "bfloat16", "stored": "float8_e4m3fn"}
    assert gpu.why_not(**shape, head_dim=128) is None
    assert "8 bits with head sizes over 128, and here it is 256" in (gpu.why_not(**shape, head_dim=256) or "")


def traced(
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    page_size: int = 16,
    dtype: str = "bfloat16",
    deterministic: bool = False,
) -> Any:
    """The shapes of a step's attention through an engine's operations, in two cache groups; nothing runs."""
    ops, _ = select_ops("pallas_gpu_interpret", platform="cpu", deterministic=deterministic)
    shape = (2, 8, *ops.page_shape(heads[1], page_size, head_dim))
    case = build_ragged_case([(1, 20), (9, 3)], seed=0, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)

    def step(queries: Array, keys: Array, cache: KVPages) -> Any:
        tables = jnp.stack([case["block_tables"]] * 2)
        batch = case["query_starts"], case["kv_lengths"], case["num_decodes"]
        sequences = SequenceTable.build(tables, *batch, num_tokens=10)
        shapes = {"num_heads": heads[0], "head_dim": head_dim, "dtype": jnp.dtype(dtype)}
        sequences = ops.prepare(sequences, cache, windows=(0, 24), **shapes)
        for group, window in enumerate((None, 24)):
            own, options = sequences.of_group(group), {"scale": 0.1, "window": window}
            queries, cache = ops.attention(queries, keys, keys, cache, own, layer=1, **options)
        return queries, cache

    queries, keys = (case[name].astype(dtype) for name in ("queries", "keys"))
    return jax.eval_shape(step, queries, keys, KVPages.zeros(shape, jnp.dtype(dtype)))


@pytest.mark.parametrize("deterministic", [False, True])
def test_an_engine_prepares_a_work_list_for_each_cache_group(deterministic):
    out, cache = traced(deterministic=deterministic)
    assert (out.shape, cache.data.shape) == ((10, 4, 64), (2, 8, 2, 2, 16, 64))


def test_it_follows_the_calling_convention_without_a_work_list_too():
    case = case_of([(1, 20), (9, 3)], stored="float8_e4m3fn")
    kernel = GpuAttention.of("pallas_gpu_interpret", ONE_DEVICE)
    options = {"layer": LAYER, "scale": SCALE, "window": 24, "soft_cap": 5.0, "sinks": jnp.zeros(4)}
    found, specified = (
        jax.eval_shape(lambda case, of=attention: of(**case, **options), case)
        for attention in (kernel, reference.ragged_paged_attention)
    )
    assert found == specified


def test_a_cache_with_more_rows_than_copies_can_name_is_refused():
    case = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in case_of([(1, 5)]).items()}
    case["pages"] = jax.ShapeDtypeStruct((80, 2**20, 2, 2, 16, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"have \d+ rows of 64, .* can name 2147483647; lower kv_cache_memory_bytes"):
        jax.eval_shape(lambda case: attend(case, jnp.zeros(4), window=None, soft_cap=None), case)
