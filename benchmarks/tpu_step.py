"""Compile the engine's whole step program for devices that are not here, and read what it takes from its text."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jax_engine.compilation.planner import memory_for_pages
from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.loading.model_files import read_model_config
from jax_engine.models.config import ModelConfig
from jax_engine.models.registry import resolve_model
from jax_engine.plan.hlo_costs import COLLECTIVES
from jax_engine.plan.hlo_text import Computation, Instruction, parse_module
from jax_engine.plan.models import model_folder
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import PlacedModel, StateSize
from jax_engine.sharding.sharding import make_mesh
from jax_engine.sharding.strategies import STRATEGIES
from tpu_topology import CHIPS, Moment, topology_devices, traced_for

BUCKET = Bucket(num_tokens=2048, num_sequences=256)  # the largest step of a busy server
DECODES = Bucket(num_tokens=256, num_sequences=256)
CONTEXT_TOKENS = 8192
PAGE_SIZE = 128
NUM_PAGES = 512
UTILIZATION = 0.9  # the default of gpu_memory_utilization


@dataclass(frozen=True)
class StepJob:
    """A model whose configuration comes with the package, on a slice; `topology` None is the smallest of the chip."""

    model: str
    chip: str
    topology: str | None
    tensor_parallel_size: int
    num_steps: int = 1  # above 1: decodes alone, looped over
    cache_dtype: str = "bfloat16"


@dataclass(frozen=True)
class CompiledStep:
    """What a step job finds; bytes are those of one device."""

    trace_seconds: float  # see `Moment.since`
    compile_seconds: float
    argument_bytes: int
    temporary_bytes: int
    cache_copies: int  # instructions that make another cache, or another of one layer
    collectives_per_layer: dict[str, float]
    collectives_besides: dict[str, int]
    bytes_for_pages: int


# Instructions whose result is the same memory as their operand.
_NO_COPY = {"bitcast", "custom-call", "get-tuple-element", "opt-barrier", "parameter", "tuple", "while"}


def compile_step(job: StepJob) -> CompiledStep:
    """Compile the largest step of a server, or its largest loop, with what it needs of a device's memory.

    Raises:
        Exception: the compiler's own, where it rejects the program or its memory.
    """
    chip = CHIPS[job.chip]
    devices = topology_devices(chip, job.topology)
    with model_folder(job.model) as folder:
        config = ModelConfig.from_hf(read_model_config(folder))
    placed = PlacedModel.of(
        resolve_model(config.architecture),
        config,
        platform="tpu",
        mesh=make_mesh(STRATEGIES["tensor"].mesh_shape(job.tensor_parallel_size), devices),
        attention_backend="auto",
        dtype="bfloat16",
        page_size=PAGE_SIZE,
        cache_dtype=job.cache_dtype,
        scan_layers=True,
    )
    bucket = BUCKET if job.num_steps == 1 else DECODES
    layout = BatchLayout(bucket, PAGE_SIZE, bucket.num_sequences)
    size = StateSize(NUM_PAGES, bucket.num_sequences, CONTEXT_TOKENS // PAGE_SIZE)
    start = Moment.now()
    with traced_for(devices[0]):
        lowered = placed.lower(layout, SamplingMode.SAMPLE, size, num_steps=job.num_steps)
    traced = Moment.now()
    executable = lowered.compile()
    done = Moment.now()
    memory, text = executable.memory_analysis(), executable.as_text()
    assert memory is not None and text is not None
    cache_bytes = NUM_PAGES * placed.geometry.page_bytes
    layer, rest = collectives(text)
    parts = placed.geometry.num_parts
    planes, heads, *page = placed.geometry.page_shape
    return CompiledStep(
        trace_seconds=traced.since(start),
        compile_seconds=done.since(traced),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        cache_copies=len(cache_copies(text, (config.num_hidden_layers, NUM_PAGES, planes, heads // parts, *page))),
        collectives_per_layer=layer,
        collectives_besides=rest,
        bytes_for_pages=memory_for_pages(executable, chip.chip.device_bytes, UTILIZATION, cache_bytes),
    )


def cache_copies(text: str, shape: Sequence[int]) -> list[str]:
    """The instructions that produce a whole cache of `shape` [L, ...], or one layer of it, in memory of its own.

    In-place updates are not told from copies by their text alone, so a fusion that yields a cache counts: in our
    programs only the kernel writes it.
    """
    forms = {tuple(shape), (1, *shape[1:]), tuple(shape[1:])}
    return [
        f"{instruction.name} = {instruction.opcode}({', '.join(instruction.operands)})"
        for name, body in parse_module(text).computations.items()
        if "fused" not in name
        for instruction in body
        if instruction.opcode not in _NO_COPY and not instruction.is_tuple and instruction.arrays[0].sizes in forms
    ]


def collectives(text: str) -> tuple[dict[str, float], dict[str, int]]:
    """Collectives of one layer, and of the rest of the program, by opcode.

    A layer's are those of the innermost loop with kernels in it, over how many it has: one trip may run several layers.

    Raises:
        ValueError: there is not exactly one such loop.
    """
    computations = parse_module(text).computations
    loops: dict[str, tuple[set[str], int]] = {}
    for body in computations.values():
        for instruction in body:
            for root in instruction.called("body"):
                inside = set(_reachable(computations, root))
                if kernels := sum(_is_kernel(part) for name in inside for part in computations[name]):
                    loops[root] = inside, kernels
    innermost = [
        found for root, found in loops.items() if not any(other in found[0] for other in loops.keys() - {root})
    ]
    if len(innermost) != 1:
        raise ValueError(
            f"{len(innermost)} innermost loops of the program hold kernels, where the layers' alone should"
        )
    ((inside, kernels),) = innermost
    layers: Counter[str] = Counter()
    rest: Counter[str] = Counter()
    for name, body in computations.items():
        found = layers if name in inside else rest
        opcodes = (instruction.opcode.removesuffix("-start") for instruction in body)  # an asynchronous one starts once
        found.update(opcode for opcode in opcodes if opcode in COLLECTIVES)
    return {opcode: count / kernels for opcode, count in layers.items()}, dict(rest)


def _is_kernel(instruction: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.attributes


def _reachable(computations: Mapping[str, Computation], root: str) -> Iterator[str]:
    """`root` and what it calls, directly or not."""
    seen, left = {root}, [root]
    while left:
        name = left.pop()
        yield name
        for instruction in computations[name]:
            called = [other for other in instruction.called() if other in computations and other not in seen]
            seen.update(called)
            left += called
