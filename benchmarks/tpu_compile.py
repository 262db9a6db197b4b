"""Compile one job with the real TPU compiler and print one JSON line; attention kernels are compiled here.

`tpu_static.py` runs this file in a process of its own for each job, because the compiler reads where to dump once a
process, and because a crash of the compiler must not end the run. The job is JSON on standard input.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_engine.pallas_kernels import tpu
from tpu_schedule import Loop, Schedule, read_schedule
from tpu_step import StepJob, cache_copies, compile_step
from tpu_topology import CHIPS, Moment, topology_devices, traced_for

KILO = 1024  # what "1k" means in the figures
CONTEXT_TOKENS = 8192  # of every sequence of a kernel job
KERNEL = "ragged_paged_attention"
PHASES = ("decode", "prefill")  # of our kernel, in program order
PEER_KERNEL = "ragged_paged_attention_kernel"
PEER_PAGES_TOKENS = 1024  # tokens of its compute block, as its own table of tuned sizes has it for these heads
PEER_QUERY_TOKENS = 32  # of a block in prefill, likewise
PEER_VMEM_SHARE = 0.75  # of the chip's; its default of 16 MiB holds none of the larger shapes


@dataclass(frozen=True)
class Heads:
    """An attention layer's heads on one device."""

    queries: int
    keys: int
    head_dim: int


HEADS = {
    "llama-3-8b": Heads(32, 8, 128),
    "llama-3-70b tp8": Heads(8, 1, 128),
    "mha": Heads(16, 16, 128),
    "head_dim 64": Heads(32, 8, 64),
    "head_dim 256": Heads(16, 8, 256),
}


@dataclass(frozen=True)
class Load:
    """The shape of a step: token rows and the sequences they belong to."""

    tokens: int
    sequences: int


LOADS = {"decode": Load(256, 256), "prefill": Load(2048, 16), "mixed": Load(1024, 128)}


@dataclass(frozen=True)
class KernelJob:
    """One attention kernel; `subject` is "ours" or "peer", the other fields are keys of the tables above."""

    subject: str
    chip: str
    heads: str
    dtype: str  # of the cache; queries are bfloat16, or float32 with a float32 cache
    page_size: int
    load: str


JOBS = {"KernelJob": KernelJob, "StepJob": StepJob}


@dataclass(frozen=True)
class CompiledKernel:
    """What a kernel job finds."""

    compile_seconds: float  # lowering and compiling, while dumping; see `Moment.since`
    vmem_bytes: int
    temporary_bytes: int
    cache_copies: int  # instructions that make another cache, or another of one layer
    decode_bundles: float | None  # see `decode_bundles`; None where the kernel has no loop of its own for it
    short_bundles: float | None  # see `short_bundles`
    decode_spills: int | None  # vector registers written out in that loop
    decode_spill_share: float | None  # spills for each bundle
    prefill_bundles: float | None
    prefill_spills: int | None
    prefill_spill_share: float | None
    bundles: int  # of the whole kernel
    loops: dict[str, dict[str, Any]]


def main() -> None:
    request = json.loads(sys.stdin.read())
    job = JOBS[request.pop("kind")](**request)
    compiled = compile_step(job) if isinstance(job, StepJob) else compile_kernel(job, Path(os.environ["TPU_DUMP_DIR"]))
    print(json.dumps(asdict(compiled)))


@dataclass(frozen=True)
class Subject:
    """What is compiled: a function, the shapes and dtypes of its arguments, and the name of the kernel in it."""

    function: Callable[..., Any]
    arguments: list[tuple[tuple[int, ...], Any]]
    cache: int  # which of the arguments
    donated: tuple[int, ...]
    kernel: str


def compile_kernel(job: KernelJob, dump: Path) -> CompiledKernel:
    """Compile the kernel and read its schedule.

    Raises:
        Exception: the compiler's own, where it rejects the kernel; ValueError where its dump cannot be read.
    """
    device = topology_devices(CHIPS[job.chip])[0]
    sharding = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    subject = our_kernel(job, device) if job.subject == "ours" else peer_kernel(job)
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in subject.arguments]
    start = Moment.now()
    with traced_for(device):
        traced = jax.jit(subject.function, donate_argnums=subject.donated).trace(*arguments)
        executable = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds = Moment.now().since(start)
    schedule, text = read_schedule(dump, subject.kernel), executable.as_text()
    loops = name_loops(job, schedule)
    spills = {phase: loop.body.counts.spills for phase, loop in loops.items()}
    shares = {phase: spills[phase] / loop.body.counts.bundles for phase, loop in loops.items()}
    return CompiledKernel(
        compile_seconds=seconds,
        vmem_bytes=scoped_vmem(text),
        temporary_bytes=executable.memory_analysis().temp_size_in_bytes,
        cache_copies=len(cache_copies(text, subject.arguments[subject.cache][0])),
        decode_bundles=decode_bundles(job, schedule, device.device_kind),
        short_bundles=short_bundles(job, schedule),
        decode_spills=spills.get("decode"),
        decode_spill_share=shares.get("decode"),
        prefill_bundles=prefill_bundles(job, schedule, device.device_kind),
        prefill_spills=spills.get("prefill"),
        prefill_spill_share=shares.get("prefill"),
        bundles=schedule.total.bundles,
        loops={phase: loop_figures(loop) for phase, loop in loops.items()},
    )


def our_kernel(job: KernelJob, device: jax.Device) -> Subject:
    """Ours, in a cache of two layers."""
    heads, load = HEADS[job.heads], LOADS[job.load]
    cache, compute = dtypes(job)
    tables = CONTEXT_TOKENS // job.page_size
    page = tpu.page_shape(heads.keys, job.page_size, heads.head_dim)
    integers = [(load.sequences, tables), (load.sequences + 1,), (load.sequences,), (), (load.tokens,), (load.tokens,)]
    shapes = [
        ((load.tokens, heads.queries, heads.head_dim), compute),
        *[((load.tokens, heads.keys, heads.head_dim), compute)] * 2,
        ((2, load.sequences * tables // 4, *page), cache),
        *((shape, jnp.int32) for shape in integers),
        ((), jnp.int32),
    ]

    def attention(*arguments: Any) -> Any:
        *rest, layer = arguments
        chip = {"device_kind": device.device_kind, "num_cores": device.num_cores}
        return tpu.ragged_paged_attention(*rest, layer=layer, scale=heads.head_dim**-0.5, **chip)

    return Subject(attention, shapes, 3, (3,), KERNEL)


def peer_kernel(job: KernelJob) -> Subject:
    """JAX's public kernel, with its kindest block of queries: one token in decode, else its tuned 32.

    It has no cache write and takes no layer: both are work that ours has besides.
    """
    heads, load = HEADS[job.heads], LOADS[job.load]
    cache, compute = dtypes(job)
    tables = CONTEXT_TOKENS // job.page_size
    shapes = [
        ((load.tokens, heads.queries, heads.head_dim), compute),
        ((load.sequences * tables // 4, job.page_size, 2 * heads.keys, heads.head_dim), cache),
        ((load.sequences,), jnp.int32),
        ((load.sequences, tables), jnp.int32),
        ((load.sequences + 1,), jnp.int32),
        ((1,), jnp.int32),
    ]
    scales = {"k_scale": 1.0, "v_scale": 1.0} if jnp.dtype(cache).itemsize == 1 else {}

    def attention(*arguments: Any) -> Any:
        return ragged_paged_attention(
            *arguments,
            sm_scale=heads.head_dim**-0.5,
            num_kv_pages_per_block=PEER_PAGES_TOKENS // job.page_size,
            num_queries_per_block=1 if job.load == "decode" else PEER_QUERY_TOKENS,
            vmem_limit_bytes=int(pltpu.get_tpu_info().vmem_capacity_bytes * PEER_VMEM_SHARE),
            **scales,
        )

    return Subject(attention, shapes, 1, (), PEER_KERNEL)


def dtypes(job: KernelJob) -> tuple[Any, Any]:
    """Of the cache, and of queries and new keys and values."""
    return jnp.dtype(job.dtype), jnp.dtype(jnp.float32 if job.dtype == "float32" else jnp.bfloat16)


def name_loops(job: KernelJob, schedule: Schedule) -> dict[str, Loop]:
    """The main loop of each phase: of the loops that hold matmuls and no other such loop, a phase's first.

    Ours runs decode's work items in one outermost loop and prefill's in the next; each handles unmasked tokens first.

    Raises:
        ValueError: there are more phases than expected, or fewer.
    """
    phases = [loops for outer in schedule.loops if (loops := outer.innermost_matmul_loops())]
    expected = PHASES if job.subject == "ours" else ("decode" if job.load == "decode" else "prefill",)
    if len(phases) != len(expected):
        raise ValueError(f"{len(phases)} outermost loops hold matmuls, not one for each of {', '.join(expected)}")
    return {phase: loops[0] for phase, loops in zip(expected, phases, strict=True)}


def decode_bundles(job: KernelJob, schedule: Schedule, device_kind: str) -> float | None:
    """Bundles of decode's main loop for each 1,024 cached tokens of all kv heads.

    Raises:
        ValueError: it does not hold the loop over batches of heads that the kernel's sizes call for.
    """
    loop = name_loops(job, schedule).get("decode")
    if loop is None:
        return None
    if job.subject == "peer":
        return loop.body.main_path.bundles * KILO / PEER_PAGES_TOKENS
    blocks, geometry = our_sizes(job, device_kind)
    batches = geometry.num_groups // geometry.groups_at_once
    bundles = loop.body.main_path.bundles * batches
    if batches > 1:
        around = [outer for outer in schedule.all_loops() if loop in outer.loops]
        if len(around) != 1:
            raise ValueError(f"decode's main loop should hold a loop of {batches} batches of heads, and no loop does")
        bundles += around[0].body.main_path.bundles
    return bundles * KILO / blocks.chunk


def short_bundles(job: KernelJob, schedule: Schedule) -> float | None:
    """Bundles of a sequence of 200 tokens in decode: one trip of the outermost loop, all its branches taken, and one of
    each loop in it; of ours not the main one, which takes whole chunks only.
    """
    main = name_loops(job, schedule).get("decode")
    if main is None:
        return None
    outer = next(loop for loop in schedule.loops if main in loop.all_loops())
    return float(outer.total.bundles - (main.total.bundles if job.subject == "ours" else 0))


def prefill_bundles(job: KernelJob, schedule: Schedule, device_kind: str) -> float | None:
    """Bundles of prefill's main loop for each 1,024 cached tokens and 1,024 query rows; a row is a token's one head."""
    loop = name_loops(job, schedule).get("prefill")
    if loop is None:
        return None
    if job.subject == "peer":
        pairs = PEER_QUERY_TOKENS * HEADS[job.heads].queries * PEER_PAGES_TOKENS
    else:
        blocks, geometry = our_sizes(job, device_kind)
        pairs = tpu.UNITS_A_TRIP * blocks.rows_at_once(geometry) * blocks.prefill_chunk
    return loop.body.main_path.bundles * KILO * KILO / pairs


def our_sizes(job: KernelJob, device_kind: str) -> tuple[tpu.Blocks, tpu.Geometry]:
    """The blocks and the geometry that our kernel is compiled with."""
    heads = HEADS[job.heads]
    cache, compute = dtypes(job)
    geometry = tpu.Geometry(heads.keys, heads.queries // heads.keys, heads.head_dim, job.page_size, cache, compute)
    return tpu.block_sizes(geometry, device_kind), geometry


def scoped_vmem(text: str) -> int:
    """Bytes of VMEM that the largest kernel in an executable's text takes."""
    lines = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    found = [re.search(r'used_scoped_memory_configs":\[([^\]]*)\]', line) for line in lines]
    if not lines or None in found:
        raise ValueError("the executable's text has no kernel with used_scoped_memory_configs")
    sizes = [
        size for match in found if match for size in re.findall(r'"memory_space":"1"[^}]*"size":"(\d+)"', match[1])
    ]
    return max(map(int, sizes), default=0)


def loop_figures(loop: Loop) -> dict[str, Any]:
    """A loop's row of the report: bundles of its own body, all and on the main path, and what it uses."""
    body = loop.body
    return {
        "first_bundle": body.first,
        "depth": loop.depth,
        "bundles": body.counts.bundles,
        "main_path_bundles": body.main_path.bundles,
        "sections": [section.counts.bundles for section in body.sections],
        "spills": body.counts.spills,
        "fills": body.counts.fills,
        "units": dict(body.counts.units),
    }


if __name__ == "__main__":
    main()
