"""The check by the TPU compiler: its readers, on excerpts in the compiler's formats, and one real compile."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tpu_compile import KernelJob, scoped_vmem
from tpu_schedule import Schedule, parse_schedule, read_schedule
from tpu_static import Outcome, error_line, fails, kernel_jobs, misses, run_job
from tpu_step import StepJob, cache_copies, collectives
from tpu_topology import CHIPS, compiler_environment

LEGEND = "= control target key start\nLB: loop body\nPF: predicated region fallthrough\n= control target key end\n\n"
# A loop over blocks, in it a loop that multiplies (with one delay slot), then a part that a branch may skip.
BUNDLES = (
    LEGEND
    + """\
     0   :  { %s0 = sld [smem:[#allocation1]] /* window of
bounds: (1, 4) */ }
   0x1 LB: > { %s1 = sphi %s0, %s2 } /* Start region 10 :: Start region 11 */
   0x2   : > { %s3 = sadd.s32 1, %s1 } /* End region 11 */
   0x3 LB: >> { %v1 = vld [vmem:[#allocation2] sm:$0xff] } /* Start region 20 */
   0x4   : >> { %v2 = vmatmul.mubr.bf16 %v1  ;;  %9 = vst [vmem:[#allocation9_spill]] %v1 }
   0x5   : >> { %21 = sbr.rel (!%p1) target = $region20 }
   0x6   :  {}
   0x7 PF: > { %30 = sbr.rel (%p2) target = $region31 } /* Start/End empty region 21 :: Start region 30 */
   0x8   :  {}
   0x9   : > { %v3 = vmatmul.mubr.bf16 %v1 }
   0xa   : > { %v4 = vadd.f32 %v3, %v3 }
   0xb PF: > { %s2 = sadd.s32 1, %s1 } /* Start/End empty region 31 */
   0xc   : > { %11 = sbr.rel (!%p3) target = $region10 }
   0xd   :  {}
   0xe   :  { %99 = vsyncpa [#allocation6], 1 }
"""
)
UNITS = "MXU, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL"


def utilization(rows: dict[int, str], *, count: int = 15, units: str = UNITS) -> str:
    idle = " ".join("0" for _ in units.split(","))
    lines = [rows.get(address, idle) for address in range(count)]
    return "\n".join(["== CAPACTIY:", units, "    2     4     3     3     2     2", "== UTILIZATION:", *lines, ""])


UTILIZATION = utilization({0x3: "0 0 1 0 0 0", 0x4: "1 0 0 2 1 1", 0x9: "2 0 0 0 0 0", 0xA: "0 1 0 0 0 0"})


@pytest.fixture
def schedule() -> Schedule:
    return parse_schedule(BUNDLES, UTILIZATION)


def test_loops_nest_as_their_branches_close_them(schedule: Schedule) -> None:
    (outer,) = schedule.loops
    (inner,) = outer.loops
    assert (outer.depth, outer.body.first, outer.body.end) == (1, 0x1, 0xE)
    assert (inner.depth, inner.body.first, inner.body.end) == (2, 0x3, 0x7), "the empty bundle after the branch runs"
    assert schedule.all_loops() == [outer, inner]
    assert schedule.total.bundles == 15


def test_an_outer_loops_own_bundles_leave_out_the_inner_loop(schedule: Schedule) -> None:
    (outer,) = schedule.loops
    assert outer.total.bundles == 13
    assert outer.body.counts.bundles == 13 - 4
    assert outer.body.counts.matmuls == 2


def test_spills_and_fills_belong_to_their_loop(schedule: Schedule) -> None:
    (outer,) = schedule.loops
    (inner,) = outer.innermost_matmul_loops()
    assert (inner.body.counts.spills, inner.body.counts.fills) == (1, 2)
    assert (outer.body.counts.spills, outer.total.spills) == (0, 1)


def test_what_a_branch_skips_is_a_section(schedule: Schedule) -> None:
    (section,) = schedule.loops[0].body.sections
    assert (section.first, section.end, section.counts.matmuls) == (0x8, 0xB, 2)
    assert schedule.loops[0].body.unconditional.bundles == 9 - 3


def test_the_main_path_is_the_shorter_of_two_alternatives_with_matmuls() -> None:
    """A masked variant of five bundles and an unmasked one of three, each behind its own branch."""
    text = (
        LEGEND
        + """\
     0 LB: > { %s1 = sphi 0, %s2 } /* Start region 1 */
   0x1   : > { %30 = sbr.rel (%p1) target = $region2 }
   0x2   : > { %v1 = vcmp.lt.s32 }
   0x3   : > { %v1 = vsel }
   0x4   : > { %v1 = vmatmul.mubr.bf16 %v0 }
   0x5   : > { %v1 = vadd.f32 }
   0x6   : > { %v1 = vadd.f32 }
   0x7 PF: > { %31 = sbr.rel (%p2) target = $region3 } /* Start/End empty region 2 */
   0x8   : > { %v1 = vmatmul.mubr.bf16 %v0 }
   0x9   : > { %v1 = vadd.f32 }
   0xa   : > { %v1 = vadd.f32 }
   0xb PF: > { %21 = sbr.rel (!%p3) target = $region1 } /* Start/End empty region 3 */
   0xc   :  { %99 = vsyncpa }
"""
    )
    table = utilization({0x4: "1 0 0 0 0 0", 0x8: "1 0 0 0 0 0"}, count=13)
    (loop,) = parse_schedule(text, table).loops
    assert loop.body.counts.bundles == 12
    assert loop.body.unconditional.bundles == 4
    assert loop.body.main_path.bundles == 4 + 3


def test_a_jump_to_the_exit_needs_no_region() -> None:
    """The second core of a chip leaves at once; the exit's comment names no region."""
    text = (
        LEGEND
        + "     0   :  { %18 = sbr.rel (%p0) target = $region4 }\n   0x1 PF:  {} /* exit bundle: %f = call() */\n"
    )
    assert parse_schedule(text, utilization({}, count=2)).loops == ()


@pytest.mark.parametrize(
    ("bundles", "table", "says"),
    [
        ("nothing here", UTILIZATION, "no bundles"),
        (BUNDLES.replace("   0x9   :", "   0xf   :"), UTILIZATION, "bundle 0xf where 0x9"),
        (BUNDLES.replace("Start region 20", ""), UTILIZATION, "region 20, which starts nowhere"),
        (BUNDLES.replace("0x3 LB: >>", "0x3   : >>"), UTILIZATION, "disagree at 0x3"),
        (BUNDLES.replace("0x3 LB: >>", "0x3 LB: >>>"), UTILIZATION, "drawn at depth 3, found at 2"),
        (BUNDLES.replace("sbr.rel (%p2) target = $region31", "sbr.ind %s9"), UTILIZATION, "unknown form"),
        (BUNDLES, UTILIZATION.replace("== UTILIZATION:", "== USE:"), "does not begin"),
        (BUNDLES, UTILIZATION.replace("VSTORE:SPILL", "SPILLED"), "no column VSTORE:SPILL"),
        (BUNDLES, UTILIZATION.replace("MXU", "MATRIX"), "none of MXU"),
        (BUNDLES, utilization({}, count=14), "15 bundles but 14 rows"),
        (BUNDLES, UTILIZATION.replace("2 0 0 0 0 0", "2 0 0 0 0"), "does not have its 6 columns"),
    ],
)
def test_an_unknown_format_is_an_error_and_not_a_figure(bundles: str, table: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_schedule(bundles, table)


def test_a_kernel_is_found_by_its_name(tmp_path: Path, schedule: Schedule) -> None:
    for kernel in ("12-attention.1", "12-attention_tail.1"):
        (tmp_path / f"{kernel}-03-final_bundles.txt").write_text(BUNDLES)
        (tmp_path / f"{kernel}-01-final_hlo-static-per-bundle-utilization.txt").write_text(UTILIZATION)
    (tmp_path / "12-attention.1-02-schedule-analysis_final_bundles.txt").write_text("Schedule analysis:")
    assert read_schedule(tmp_path, "attention") == schedule
    with pytest.raises(ValueError, match="0 schedules of kernel 'other'"):
        read_schedule(tmp_path, "other")


HLO = """\
HloModule jit_step

%body.1 (arg: (s32[], bf16[4,64,2,8,128,128])) -> (s32[], bf16[4,64,2,8,128,128]) {
  %arg = (s32[], /*index=1*/bf16[4,64,2,8,128,128]{5,4,3,2,1,0}) parameter(0)
  %cache = bf16[4,64,2,8,128,128]{5,4,3,2,1,0} get-tuple-element(%arg), index=1
  %attention.1 = (bf16[8,128]{1,0}, bf16[4,64,2,8,128,128]{5,4,3,2,1,0}) custom-call(%cache), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %sum.1 = bf16[8,128]{1,0} all-reduce-start(%x), to_apply=%add
  %sum.2 = bf16[8,128]{1,0} all-reduce-done(%sum.1)
  %sum.3 = bf16[8,128]{1,0} all-reduce(%y), to_apply=%add
  ROOT %out = (s32[], bf16[4,64,2,8,128,128]{5,4,3,2,1,0}) tuple(%i, %cache2)
}

ENTRY %main (p: bf16[4,64,2,8,128,128]) -> bf16[4,64,2,8,128,128] {
  %p = bf16[4,64,2,8,128,128]{5,4,3,2,1,0} parameter(0)
  %loop = (s32[], /*index=1*/bf16[4,64,2,8,128,128]{5,4,3,2,1,0}) while(%init), condition=%cond, body=%body.1
  %logits = f32[8,1024]{1,0} all-gather(%z), dimensions={1}
  ROOT %result = bf16[4,64,2,8,128,128]{5,4,3,2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
CACHE = (4, 64, 2, 8, 128, 128)


def test_collectives_of_the_loop_over_layers_count_a_layer() -> None:
    assert collectives(HLO) == ({"all-reduce": 2.0}, {"all-gather": 1})


def test_collectives_of_a_trip_of_two_layers_are_shared_out() -> None:
    second = next(line for line in HLO.splitlines() if "tpu_custom_call" in line).replace("attention.1", "attention.2")
    layers, _ = collectives(HLO.replace("  %sum.3", second + "\n  %sum.3"))
    assert layers == {"all-reduce": 1.0}


def test_a_loop_over_steps_around_that_over_layers_changes_no_layers_count() -> None:
    layers = "%steps.1 (a: s32[]) -> s32[] {\n  %layers = (s32[]) while(%b), condition=%cond, body=%body.1\n}\n\nENTRY"
    looped = HLO.replace("body=%body.1", "body=%steps.1").replace("ENTRY", layers)
    assert collectives(looped) == collectives(HLO)


def test_a_program_without_a_loop_of_kernels_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 innermost loops"):
        collectives(HLO.replace("tpu_custom_call", "other_call"))


@pytest.mark.parametrize("sizes", ["4,64,2,8,128,128", "1,64,2,8,128,128", "64,2,8,128,128"])
def test_a_second_cache_is_found(sizes: str) -> None:
    assert cache_copies(HLO, CACHE) == []
    copied = HLO.replace("  %logits", f"  %copy.1 = bf16[{sizes}]{{0}} copy(%p)\n  %logits")
    (found,) = cache_copies(copied, CACHE)
    assert found == "copy.1 = copy(p)"


def test_vmem_is_the_kernels_own() -> None:
    assert scoped_vmem(HLO) == 4096
    with pytest.raises(ValueError, match="no kernel"):
        scoped_vmem(HLO.replace("tpu_custom_call", "other_call"))


OURS = KernelJob("ours", "v6e", "llama-3-8b", "bfloat16", 128, "decode")
PEER = KernelJob("peer", "v6e", "llama-3-8b", "bfloat16", 128, "decode")
FIGURES = {
    "compile_seconds": 5.0, "decode_bundles": 1200.0, "cache_copies": 0,
    "decode_spill_share": 0.0, "prefill_spill_share": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compile_seconds": 15.2}, "compile_seconds 15.2 > 15"),
        ({"decode_bundles": 1251.0}, "decode_bundles 1,251 > 1,250"),
        ({"decode_spill_share": 0.05}, "decode_spill_share 0.05 > 0.04"),
        ({"cache_copies": 1}, "cache_copies 1 > 0"),
    ],
)
def test_a_missed_limit_fails_the_run_and_says_which(change: dict[str, float], says: str) -> None:
    assert misses(OURS, FIGURES) == ()
    assert misses(OURS, {**FIGURES, **change}) == (says,)
    assert fails(Outcome(OURS, {**FIGURES, **change}, None, (says,)))


def test_a_rejected_kernel_fails_the_run_and_a_rejected_peer_does_not() -> None:
    assert fails(Outcome(OURS, None, "MosaicError: no", ()))
    assert not fails(Outcome(PEER, None, "MosaicError: no", ()))
    assert misses(PEER, {**FIGURES, "decode_bundles": 9999.0}) == ()


def test_float32_may_spill() -> None:
    assert misses(replace(OURS, dtype="float32"), {**FIGURES, "decode_spill_share": 0.3}) == ()


def test_a_step_of_more_than_a_minute_fails_the_run() -> None:
    job = StepJob("llama-3-70b", "v6e", "v6e:2x4", 8)
    assert misses(job, {"compile_seconds": 61.0, "cache_copies": 0}) == ("compile_seconds 61.0 > 60",)


def test_an_error_is_told_by_its_exception_or_by_the_last_words_of_a_crash() -> None:
    trace = "Traceback:\n  File x\njax.errors.JaxRuntimeError: INTERNAL: no\n----\nFor simplicity, JAX has removed"
    assert error_line(trace, 1) == "JaxRuntimeError: INTERNAL: no"
    assert error_line("F0000 Check failed: x\n", -6) == "F0000 Check failed: x"
    assert error_line("", -11) == "exit status -11"


def test_the_full_run_covers_every_chip_and_asks_for_nothing_twice() -> None:
    jobs = kernel_jobs(tuple(CHIPS), fast=False)
    assert len(set(jobs)) == len(jobs)
    assert {job.chip for job in jobs if job.subject == "ours"} == set(CHIPS)


TINY_KERNEL = """
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpu_topology import CHIPS, topology_devices, traced_for

def kernel(counts, x, y, out):
    def product(index, _):
        out[...] += jnp.dot(x[index], y[index], preferred_element_type=jnp.float32)

    def block(index, _):
        lax.fori_loop(0, counts[1], product, None)

        @pl.when(counts[index] > 3)
        def _():
            out[...] = jnp.tanh(out[...])

    out[...] = jnp.zeros_like(out)
    lax.fori_loop(0, counts[0], block, None)

call = pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, in_specs=[pl.BlockSpec()] * 2, out_specs=pl.BlockSpec()
    ),
    out_shape=jax.ShapeDtypeStruct((128, 128), jnp.float32),
    name="tiny",
)
device = topology_devices(CHIPS["v6e"])[0]
where = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
shapes = [((8,), jnp.int32), ((4, 128, 128), jnp.bfloat16), ((4, 128, 128), jnp.bfloat16)]
arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in shapes]
with traced_for(device):
    jax.jit(call).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
"""


def test_the_schedule_of_a_kernel_that_was_just_compiled(tmp_path: Path) -> None:
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax-engine[tpu]'")
    benchmarks = str(Path(__file__).parents[1] / "benchmarks")
    environment = {**os.environ, **compiler_environment(tmp_path), "PYTHONPATH": benchmarks}
    done = subprocess.run(
        [sys.executable, "-c", TINY_KERNEL], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    schedule = read_schedule(tmp_path, "tiny")
    (blocks,) = (loop for loop in schedule.loops if loop.loops)
    (products,) = blocks.innermost_matmul_loops()
    assert products in blocks.loops
    assert products.body.counts.matmuls and not blocks.body.counts.matmuls
    assert max(blocks.body.sections, key=lambda section: section.counts.bundles).counts.units["EUP"], "tanh is skipped"
    assert blocks.total.spills == 0


def test_a_job_that_the_compiler_rejects_is_a_row_with_its_error() -> None:
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax-engine[tpu]'")
    outcome = run_job(KernelJob("peer", "v6e", "llama-3-70b tp8", "complex64", 128, "decode"))
    assert outcome.figures is None and outcome.error is not None, json.dumps(outcome.figures)
    assert outcome.verdict.startswith("rejected: ")
