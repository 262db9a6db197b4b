"""What XLA and ptxas say of our GPU kernels and step programs; needs no GPU and uses none.

    pip install -e ".[cuda]"                    # XLA for NVIDIA GPUs and ptxas: some gigabytes, on any Linux machine
    python benchmarks/gpu_static.py             # kernels for H100 and H200, whole steps for H200
    python benchmarks/gpu_static.py --fast      # one job of each kind

A kernel's row has its registers a thread and the bytes that it spills, by ptxas, and the chunks of keys and values
(stages) that shared memory holds beside the rest. A step's row has the launches of one step (loops of known length
multiplied out), loops whose length depends on data (one trip is counted; for each the host is asked, unless it is in a
command buffer), and the bytes that are copied without need: weights that are sliced or laid out anew before each use,
and caches. Without a GPU XLA does not time its kernels, so it takes its default ones. Each job is compiled in a process
of its own. Exits with 1 if one is rejected or misses a limit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.models.config import ModelConfig
from jax_engine.models.registry import resolve_model
from jax_engine.pallas_kernels import gpu
from jax_engine.plan.gpu_targets import GPUS, compiler_is_installed
from jax_engine.plan.hlo_loops import trip_count
from jax_engine.plan.hlo_text import Computation, Instruction, Module, parse_module
from jax_engine.plan.models import CONFIGS
from jax_engine.plan.targets import gpu_devices
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.server.bench.figures import format_table, write_json
from jax_engine.sharding.placed_model import PlacedModel, StateSize
from jax_engine.sharding.sharding import make_mesh
from jax_engine.sharding.strategies import STRATEGIES

JOB_TIMEOUT_SECONDS = 900
MOST_LAUNCHES = {"pallas_gpu": 17, "xla": 65}  # of a layer, one trip of each loop on data counted
MOST_OF_EXPERTS = 10  # more, of a layer with a mixture of them
MOST_OF_QUANTIZATION = 20  # rows that are brought to 8 bits, and scales
LAUNCHES_BESIDE_LAYERS = 360  # sampling, for the most part
LOOPS_BESIDE_LAYERS = 1  # of the tries that sampling makes
PAGE_SIZE = 64
CONTEXT_TOKENS = 8192
NUM_PAGES = 512
CHIPS = ("h100", "h200")
MODELS = ("llama-3-8b", "qwen3-0.6b")
BACKENDS = ("pallas_gpu", "xla")


@dataclass(frozen=True)
class KernelJob:
    """Attention alone."""

    chip: str
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = PAGE_SIZE
    dtype: str = "bfloat16"
    stored: str = ""  # type of the pages; none: `dtype`
    window: int | None = None
    soft_cap: float | None = None
    num_tokens: int = 512
    kind: str = field(default="kernel", init=False)


@dataclass(frozen=True)
class StepJob:
    """A whole step of a model; `backend` as `attention_backend`."""

    chip: str
    model: str
    backend: str
    num_tokens: int = 256
    scan_layers: bool = False
    num_layers: int = 0  # all if 0
    quantization: str = ""
    kind: str = field(default="step", init=False)


Job = KernelJob | StepJob


def main() -> None:
    options = parse_arguments()
    if options.job:
        print(json.dumps(figures_of(options.job)))
        return
    if not compiler_is_installed():
        sys.exit("XLA for NVIDIA GPUs is not installed here; on Linux, pip install 'jax-engine[cuda]' brings it")
    jobs: list[Job] = [*kernel_jobs(fast=options.fast), *step_jobs(fast=options.fast)]
    outcomes = [(job, run_job(job)) for job in jobs]
    for kind, columns in (("kernel", KERNEL_COLUMNS), ("step", STEP_COLUMNS)):
        rows = [[found.get(name) for name in columns] for job, found in outcomes if job.kind == kind]
        print(format_table([name.replace("_", " ") for name in columns], rows), end="\n\n")
    if options.json:
        write_json(options.json, {"jobs": [found for _, found in outcomes]})
    failed = [found for _, found in outcomes if found["verdict"] != "ok"]
    print(f"{len(outcomes)} programs compiled, {len(failed)} rejected or past a limit")
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="one job of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # compile this one, here
    return parser.parse_args()


def kernel_jobs(*, fast: bool) -> list[KernelJob]:
    """Every chip in the usual shape; every other shape on one of them."""
    usual = [KernelJob(chip) for chip in CHIPS]
    if fast:
        return usual[-1:]
    return [
        *usual,
        KernelJob("h200", head_dim=64),
        KernelJob("h200", head_dim=256, num_heads=16),
        KernelJob("h200", num_heads=64),
        KernelJob("h200", num_heads=28, num_kv_heads=4),
        KernelJob("h200", num_heads=28, num_kv_heads=4, num_tokens=1),
        KernelJob("h200", page_size=16),
        KernelJob("h200", page_size=128),
        KernelJob("h200", dtype="float16"),
        KernelJob("h200", stored="float8_e4m3fn"),
        KernelJob("h200", stored="float8_e4m3fn", head_dim=64, page_size=16),
        KernelJob("h200", window=4096),
        KernelJob("h200", soft_cap=50.0),
    ]


def step_jobs(*, fast: bool) -> list[StepJob]:
    """Decodes, and prompts beside them, by the kernel and by XLA."""
    if fast:
        return [StepJob("h200", "qwen3-0.6b", backend) for backend in BACKENDS]
    return [
        *(StepJob("h200", model, backend, size) for model in MODELS for backend in BACKENDS for size in (256, 2048)),
        StepJob("h100", "llama-3-8b", "pallas_gpu"),
        StepJob("h200", "llama-3-8b", "pallas_gpu", num_tokens=1),
        StepJob("h200", "qwen3-235b-a22b", "pallas_gpu", num_tokens=16, num_layers=2),
        *(StepJob("h200", "llama-3-8b", "xla", num_layers=4, quantization=name) for name in ("fp8", "int8")),
        *(StepJob("h200", "llama-3-8b", backend, scan_layers=True) for backend in BACKENDS),
    ]


KERNEL_COLUMNS = (
    "chip", "num_heads", "num_kv_heads", "head_dim", "page_size", "dtype", "stored", "window", "soft_cap",
    "num_tokens", "compile_seconds", "registers", "spilled_bytes", "stages", "shared_kib", "temporaries_mib", "verdict",
)  # fmt: skip
STEP_COLUMNS = (
    "chip", "model", "backend", "num_tokens", "scan_layers", "quantization", "trace_seconds", "compile_seconds",
    "temporaries_mib", "launches", "loops_on_data", "weights_copied_mib", "caches_copied_mib", "verdict",
)  # fmt: skip


def run_job(job: Job) -> dict[str, Any]:
    """The figures of a job compiled in a process of its own, with a verdict."""
    described = asdict(job)
    with tempfile.TemporaryDirectory() as folder:
        dumps = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTXAS": "1"}
        environment = os.environ | dumps | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--job", json.dumps(described)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env=environment, timeout=JOB_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return described | {"verdict": f"rejected: not compiled in {JOB_TIMEOUT_SECONDS} s"}
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception)\b", line)]
            return described | {"verdict": f"rejected: {(lines or [f'exit status {done.returncode}'])[-1][:200]}"}
        reports = "".join(path.read_text() for path in sorted(Path(folder).glob("*.ptxas")))
    found: dict[str, Any] = described | json.loads(done.stdout.splitlines()[-1]) | read_ptxas(reports)
    found["verdict"] = "; ".join(misses(job, found)) or "ok"
    print(*described.values(), found["verdict"], file=sys.stderr)
    return found


def read_ptxas(report: str) -> dict[str, int]:
    """Registers a thread and bytes spilled, the most of the kernels in a report of ptxas; nothing without any."""
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", report)]
    spills = [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)]
    return {"registers": max(registers), "spilled_bytes": max(spills)} if registers and spills else {}


def misses(job: Job, found: Mapping[str, Any]) -> list[str]:
    """The limits that a job does not keep."""
    missed = []
    if "spilled_bytes" not in found and (isinstance(job, KernelJob) or job.backend == "pallas_gpu"):
        missed.append("ptxas reported no kernel")
    if found.get("spilled_bytes"):
        missed.append(f"spills {found['spilled_bytes']} bytes")
    if isinstance(job, StepJob) and job.scan_layers:
        # A scan copies each weight before it is used, which is why layers are not scanned on a GPU unless asked for.
        missed += [f"caches_copied_mib: {found['caches_copied_mib']:g}"] if found["caches_copied_mib"] else []
    elif isinstance(job, StepJob):
        missed += [f"{name}: {found[name]:g}" for name in ("weights_copied_mib", "caches_copied_mib") if found[name]]
        # XLA's attention has a loop over pages.
        if job.backend == "pallas_gpu" and found["loops_on_data"] > LOOPS_BESIDE_LAYERS:
            missed.append(f"loops_on_data: {found['loops_on_data']} of {LOOPS_BESIDE_LAYERS}")
        a_layer = MOST_LAUNCHES[job.backend] + (MOST_OF_EXPERTS if found["has_experts"] else 0)
        a_layer += MOST_OF_QUANTIZATION if job.quantization else 0
        most = a_layer * found["num_layers"] + LAUNCHES_BESIDE_LAYERS
        missed += [f"launches: {found['launches']} of {most}"] if found["launches"] > most else []
    return missed


def figures_of(described: dict[str, Any]) -> dict[str, Any]:
    """Compile a job in this process."""
    kind = described.pop("kind")
    return _compile_kernel(KernelJob(**described)) if kind == "kernel" else _compile_step(StepJob(**described))


def _compile_kernel(job: KernelJob) -> dict[str, Any]:
    """Attention of up to 256 sequences."""
    sharding, dtype = SingleDeviceSharding(gpu_devices(GPUS[job.chip])[0]), jnp.dtype(job.dtype)

    def shaped(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def attend(queries: Any, pages: Any, tables: Any, *batch: Any) -> Any:
        heads: dict[str, Any] = {"num_heads": job.num_heads, "num_kv_heads": job.num_kv_heads}
        work = gpu.step_work(*batch, **heads, window=job.window)
        options: dict[str, Any] = {"scale": job.head_dim**-0.5, "window": job.window, "soft_cap": job.soft_cap}
        return gpu.attend(queries, pages, tables, work, layer=1, **options)

    stored = jnp.dtype(job.stored or job.dtype)
    pages = shaped(2, NUM_PAGES, 2, job.num_kv_heads, job.page_size, job.head_dim, dtype=stored)
    num_sequences = min(job.num_tokens, 256)
    tables = shaped(num_sequences, CONTEXT_TOKENS // job.page_size)
    batch = tables, shaped(num_sequences + 1), shaped(job.num_tokens), shaped(job.num_tokens)
    queries = shaped(job.num_tokens, job.num_heads, job.head_dim, dtype=dtype)
    start = time.monotonic()
    executable = jax.jit(attend).trace(queries, pages, *batch).lower(lowering_platforms=("cuda",)).compile()
    seconds, stages = time.monotonic() - start, gpu.num_stages(job.head_dim, stored.itemsize)
    return {
        "compile_seconds": seconds,
        "temporaries_mib": _temporaries(executable),
        "stages": stages,
        "shared_kib": gpu.shared_bytes(job.head_dim, stored.itemsize, stages=stages) / 1024,
    }


def _temporaries(executable: jax.stages.Compiled) -> float:
    memory = executable.memory_analysis()
    assert memory is not None
    return float(memory.temp_size_in_bytes / 2**20)


def _compile_step(job: StepJob) -> dict[str, Any]:
    given = json.loads((CONFIGS / f"{job.model}.json").read_text())
    config = ModelConfig.from_hf(given | ({"num_hidden_layers": job.num_layers} if job.num_layers else {}))
    placed = PlacedModel.of(
        resolve_model(config.architecture),
        config,
        platform="gpu",
        mesh=make_mesh(STRATEGIES["tensor"].mesh_shape(1), gpu_devices(GPUS[job.chip])),
        attention_backend=job.backend,
        dtype="bfloat16",
        page_size=PAGE_SIZE,
        scan_layers=job.scan_layers,
        quantization=job.quantization or None,
    )
    bucket = Bucket(job.num_tokens, min(job.num_tokens, 256))
    layout = BatchLayout(bucket, PAGE_SIZE, bucket.num_sequences)
    size = StateSize(NUM_PAGES, bucket.num_sequences, CONTEXT_TOKENS // PAGE_SIZE)
    start = time.monotonic()
    lowered = placed.lower(layout, SamplingMode.SAMPLE, size)
    traced = time.monotonic()
    executable = lowered.compile()
    done = time.monotonic()
    text = executable.as_text()
    assert text is not None
    parts = [part for parameter in placed.structure.parameters for part in parameter.parts]
    weights = {size for part in parts for size in (part.num_bytes, part.unquantized.num_bytes)}
    counted = StepCount(parse_module(text), weights, NUM_PAGES * placed.geometry.page_bytes)
    counted.count_entry()
    return {
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "temporaries_mib": _temporaries(executable),
        "num_layers": config.num_hidden_layers,
        "has_experts": config.experts is not None,
        "launches": counted.launches,
        "loops_on_data": counted.loops_on_data,
        "weights_copied_mib": counted.weights_copied / 2**20,
        "caches_copied_mib": counted.caches_copied / 2**20,
    }


LARGE_WEIGHT = 2**20  # bytes; copies of norms and biases cost nothing
_NO_LAUNCH = {"after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple"}


@dataclass
class StepCount:
    """What one run of a program launches and copies. Mutable; its owner counts once."""

    module: Module
    weight_bytes: set[int]  # sizes of parameters
    cache_bytes: int
    launches: int = 0
    loops_on_data: int = 0
    weights_copied: float = 0.0
    caches_copied: float = 0.0

    def count_entry(self) -> None:
        self._count(self.module.computations[self.module.entry], 1)

    def _count(self, computation: Computation, times: int) -> None:
        for instruction in computation:
            if instruction.opcode == "while":
                trips = trip_count(instruction, computation, self.module)
                self.loops_on_data += times * (trips is None)
                self._count(self.module.computations[instruction.called("body")[0]], times * (trips or 1))
            elif instruction.opcode == "conditional":  # one of its branches: the first is counted
                self._count(self.module.computations[instruction.called()[0]], times)
            elif instruction.opcode not in _NO_LAUNCH:
                self.launches += times
                self._count_copies(instruction, computation, times)

    def _count_copies(self, instruction: Instruction, computation: Computation, times: int) -> None:
        """Whole weights and caches that an instruction writes and does not compute."""
        size = instruction.num_bytes
        held = any(_is_given(name, computation) for name in instruction.operands)
        if size >= LARGE_WEIGHT and size in self.weight_bytes and held and self._only_moves(instruction):
            self.weights_copied += size * times
        if size >= self.cache_bytes and instruction.opcode.startswith("copy"):
            self.caches_copied += size * times

    def _only_moves(self, instruction: Instruction) -> bool:
        """Whether nothing is multiplied or added up in it."""
        if instruction.opcode != "fusion":
            return instruction.opcode in ("copy", "copy-start", "dynamic-slice", "slice", "transpose")
        inside = self.module.computations[instruction.called("calls")[0]]
        moving = {*_NO_LAUNCH, "broadcast", "compare", "convert", "copy", "dynamic-slice", "select", "slice"}
        moving |= {"add", "clamp", "concatenate", "reshape", "transpose"}  # of indices, for the most part
        return all(one.opcode in moving for one in inside)


def _is_given(name: str, computation: Computation) -> bool:
    """Whether a value is what a program or a loop's body is called with, or a part of that."""
    value = computation.instructions.get(name)
    while value is not None and value.opcode in ("bitcast", "get-tuple-element"):
        value = computation.instructions.get(value.operands[0])
    return value is not None and value.opcode == "parameter"


if __name__ == "__main__":
    main()
