"""Compile the engine's whole step program for devices that are not here, and read what it takes from its text."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jax_engine.models.config import ModelConfig
from jax_engine.models.registry import resolve_model
from jax_engine.placed_model import PlacedModel, StateSize
from jax_engine.planner import memory_for_pages
from jax_engine.sampler import SamplingMode
from jax_engine.sharding import make_mesh
from jax_engine.step_batch import BatchLayout, Bucket
from jax_engine.strategies import STRATEGIES
from tpu_topology import CHIPS, Moment, topology_devices, traced_for

BUCKET = Bucket(num_tokens=2048, num_sequences=256)  # the largest step of a busy server
DECODES = Bucket(num_tokens=256, num_sequences=256)
CONTEXT_TOKENS = 8192
PAGE_SIZE = 128
NUM_PAGES = 512
UTILIZATION = 0.9  # the default of gpu_memory_utilization

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
MODELS = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "qwen3-32b": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_position_embeddings": 40960,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "vocab_size": 151936,
    },
}

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclass(frozen=True)
class StepJob:
    """A model of the table above on a slice; `topology` None is the smallest of the chip."""

    model: str
    chip: str
    topology: str | None
    tensor_parallel_size: int
    num_steps: int = 1  # above 1: decodes alone, looped over


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


@dataclass(frozen=True)
class _Instruction:
    """One line of an executable's text."""

    shape: str
    opcode: str
    line: str


_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(
    r"(?:body|calls|condition|to_apply|called_computations|branch_computations)=\{?([^}\s]+(?:, %[^}\s]+)*)"
)
# Instructions whose result is the same memory as their operand.
_NO_COPY = {"bitcast", "custom-call", "get-tuple-element", "opt-barrier", "parameter", "tuple", "while"}


def compile_step(job: StepJob) -> CompiledStep:
    """Compile the largest step of a server, or its largest loop, with what it needs of a device's memory.

    Raises:
        Exception: the compiler's own, where it rejects the program or its memory.
    """
    chip = CHIPS[job.chip]
    devices = topology_devices(chip, job.topology)
    config = ModelConfig.from_hf(MODELS[job.model])
    placed = PlacedModel.of(
        resolve_model(config.architecture),
        config,
        platform="tpu",
        mesh=make_mesh(STRATEGIES["tensor"].mesh_shape(job.tensor_parallel_size), devices),
        attention_backend="auto",
        dtype="bfloat16",
        page_size=PAGE_SIZE,
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
        bytes_for_pages=memory_for_pages(executable, int(chip.hbm_gib * 2**30), UTILIZATION, cache_bytes),
    )


def cache_copies(text: str, shape: Sequence[int]) -> list[str]:
    """The instructions that produce a whole cache of `shape` [L, ...], or one layer of it, in memory of its own.

    In-place updates are not told from copies by their text alone, so a fusion that yields a cache counts: in our
    programs only the kernel writes it.
    """
    dimensions = [",".join(map(str, sizes)) for sizes in (shape, (1, *shape[1:]), shape[1:])]
    forms = tuple(f"[{sizes}]" for sizes in dimensions)
    return [
        instruction.line.strip()[:300]
        for name, body in _computations(text).items()
        if "fused" not in name
        for instruction in body
        if instruction.opcode not in _NO_COPY
        and not instruction.shape.startswith("(")
        and any(form in instruction.shape for form in forms)
    ]


def collectives(text: str) -> tuple[dict[str, float], dict[str, int]]:
    """Collectives of one layer, and of the rest of the program, by opcode.

    A layer's are those of the innermost loop with kernels in it, over how many it has: one trip may run several layers.

    Raises:
        ValueError: there is not exactly one such loop.
    """
    computations = _computations(text)
    loops: dict[str, tuple[set[str], int]] = {}
    for body in computations.values():
        for instruction in body:
            if instruction.opcode == "while" and (match := re.search(r"body=%?([\w.\-]+)", instruction.line)):
                inside = set(_reachable(computations, match[1]))
                if kernels := sum(_is_kernel(line) for name in inside for line in computations[name]):
                    loops[match[1]] = inside, kernels
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
        found.update(opcode for instruction in body if (opcode := _collective(instruction.opcode)))
    return {opcode: count / kernels for opcode, count in layers.items()}, dict(rest)


def _is_kernel(instruction: _Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in instruction.line


def _collective(opcode: str) -> str | None:
    """An asynchronous one counts where it starts."""
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in COLLECTIVES else None


def _computations(text: str) -> dict[str, list[_Instruction]]:
    """Instructions of every computation in an executable's text.

    Raises:
        ValueError: the text holds none in the known form.
    """
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = found.setdefault(header[1], [])
        elif match := _INSTRUCTION.match(line):
            current.append(_Instruction(match[1], match[2], line))
    if not any(found.values()):
        raise ValueError("no computations in the executable's text")
    return found


def _reachable(computations: dict[str, list[_Instruction]], root: str) -> Iterator[str]:
    """`root` and what it calls, directly or not."""
    seen, left = {root}, [root]
    while left:
        name = left.pop()
        yield name
        for instruction in computations[name]:
            for names in _CALLED.findall(instruction.line):
                for called in re.findall(r"[\w.\-]+", names):
                    if called in computations and called not in seen:
                        seen.add(called)
                        left.append(called)
