"""The check by XLA for NVIDIA GPUs and by ptxas: its readers, on excerpts in their formats, and one real compile."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpu_static import KernelJob, StepCount, StepJob, kernel_jobs, misses, read_ptxas, step_jobs
from jax_engine.plan.gpu_targets import GPUS, compiler_is_installed
from jax_engine.plan.hlo_text import parse_module

PTXAS = """\
ptxas info    : Compiling entry function 'attention' for 'sm_90a'
ptxas info    : Function properties for attention
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 8 barriers
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""
# A loop of three trips that slices a weight out of its stack, one as long as data says, and a copy of the cache.
HLO = """\
HloModule jit_step

%slicing (p: bf16[3,1024,1024], i: s32[]) -> bf16[1024,1024] {
  %p = bf16[3,1024,1024]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,1024,1024]{2,1,0} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %out = bf16[1024,1024]{1,0} bitcast(%slice)
}

%adding (p: bf16[1024,1024]) -> bf16[1024,1024] {
  %p = bf16[1024,1024]{1,0} parameter(0)
  ROOT %sum = bf16[1024,1024]{1,0} multiply(%p, %p)
}

%layer (arg: (s32[], bf16[3,1024,1024])) -> (s32[], bf16[3,1024,1024]) {
  %arg = (s32[], bf16[3,1024,1024]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %stack = bf16[3,1024,1024]{2,1,0} get-tuple-element(%arg), index=1
  %weight = bf16[1024,1024]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slicing
  %used = bf16[1024,1024]{1,0} fusion(%weight), kind=kLoop, calls=%adding
  ROOT %out = (s32[], bf16[3,1024,1024]{2,1,0}) tuple(%i, %stack)
}

%condition (arg: (s32[], bf16[3,1024,1024])) -> pred[] {
  %arg = (s32[], bf16[3,1024,1024]{2,1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (stack: bf16[3,1024,1024], cache: bf16[8,1024,1024]) -> bf16[8,1024,1024] {
  %stack = bf16[3,1024,1024]{2,1,0} parameter(0)
  %cache = bf16[8,1024,1024]{2,1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[3,1024,1024]{2,1,0}) tuple(%zero, %stack)
  %layers = (s32[], bf16[3,1024,1024]{2,1,0}) while(%start), condition=%condition, body=%layer, backend_config={"known_trip_count":{"n":"3"}}
  %steps = (s32[], bf16[3,1024,1024]{2,1,0}) while(%layers), condition=%condition, body=%layer
  ROOT %copy = bf16[8,1024,1024]{2,1,0} copy(%cache)
}
"""  # noqa: E501


def test_the_worst_kernel_of_a_report_counts() -> None:
    assert read_ptxas(PTXAS) == {"registers": 168, "spilled_bytes": 20}
    assert read_ptxas("") == {}


def test_launches_multiply_by_trips_and_what_only_moves_weights_and_caches_is_found() -> None:
    count = StepCount(parse_module(HLO), weight_bytes={2 * 2**20}, cache_bytes=16 * 2**20)
    count.count_entry()
    assert (count.launches, count.loops_on_data) == (2 * 3 + 2 + 1, 1)
    assert count.weights_copied == (3 + 1) * 2 * 2**20
    assert count.caches_copied == 16 * 2**20


@pytest.mark.parametrize(
    ("job", "found", "says"),
    [
        (KernelJob("h200"), {"spilled_bytes": 0}, []),
        (KernelJob("h200"), {}, ["ptxas reported no kernel"]),
        (KernelJob("h200"), {"spilled_bytes": 8}, ["spills 8 bytes"]),
    ],
)
def test_a_kernels_limits(job: KernelJob, found: dict[str, float], says: list[str]) -> None:
    assert misses(job, found) == says


def test_a_steps_limits() -> None:
    kernel, xla = StepJob("h200", "qwen3-0.6b", "pallas_gpu"), StepJob("h200", "qwen3-0.6b", "xla")
    good = {"spilled_bytes": 0, "loops_on_data": 0, "weights_copied_mib": 0, "caches_copied_mib": 0, "launches": 600}
    good |= {"num_layers": 28, "has_experts": False}
    assert misses(kernel, good) == misses(kernel, good | {"loops_on_data": 1}) == [], "sampling may have one"
    assert misses(kernel, good | {"loops_on_data": 2}) == ["loops_on_data: 2 of 1"]
    assert misses(xla, good | {"loops_on_data": 2}) == [], "it has a loop over each row's pages"
    assert misses(kernel, good | {"launches": 1000}) == ["launches: 1000 of 836"]
    assert misses(kernel, good | {"launches": 1000, "has_experts": True}) == [], "of 1116"
    scanned = replace(kernel, scan_layers=True)
    assert misses(scanned, good | {"weights_copied_mib": 5.5, "launches": 1000}) == [], "as is known of scans"
    assert misses(scanned, good | {"caches_copied_mib": 5.5}) == ["caches_copied_mib: 5.5"]
    for job in (kernel, xla):
        assert misses(job, good | {"weights_copied_mib": 5.5}) == ["weights_copied_mib: 5.5"]
        assert misses(job, good | {"caches_copied_mib": 64.0}) == ["caches_copied_mib: 64"]


def test_all_jobs_are_for_known_chips_and_the_fast_ones_among_them() -> None:
    jobs = [*kernel_jobs(fast=False), *step_jobs(fast=False)]
    assert {job.chip for job in jobs} == {"h100", "h200"} <= set(GPUS)
    assert {(job.model, job.backend) for job in jobs if isinstance(job, StepJob)} == {
        *((model, backend) for model in ("llama-3-8b", "qwen3-0.6b") for backend in ("pallas_gpu", "xla")),
        ("qwen3-235b-a22b", "pallas_gpu"),
    }
    assert {job.quantization for job in jobs if isinstance(job, StepJob)} == {"", "fp8", "int8"}
    assert set(kernel_jobs(fast=True)) | set(step_jobs(fast=True)) <= set(jobs)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_is_installed(), reason="needs the extra `cuda`")
def test_a_kernel_and_a_step_compile_for_an_h200(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu_static.py"
    command = [sys.executable, str(script), "--fast", "--json", str(tmp_path / "found.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=550)
    assert result.returncode == 0, result.stdout + result.stderr
