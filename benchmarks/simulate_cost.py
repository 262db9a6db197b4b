"""What a step is taken to cost, in seconds: a few coefficients, computed from a device's data sheet or fitted to times.

A model, not a measurement: it knows rows, cached tokens and the padding of the step shapes, and nothing of kernels,
compilers, sockets or the host. `simulate_fit.py` fits the coefficients to the real engine on the device at hand.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from jax_engine.scheduling.step_plan import Chunk


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: `step_seconds + max(weights_seconds, rows * row_seconds) + attention`.

    Rows are the step program's, padding included. Attention is `kv_token_seconds` for every cached token that a
    sequence of the step reads, its own new ones included, and `pair_seconds` for every query and key that meet: the
    first is what decode costs, the second what long prompts cost. Nothing overlaps.
    """

    name: str
    source: str  # where the coefficients come from
    step_seconds: float  # what does not grow
    weights_seconds: float  # reading every weight once: the floor of the linear layers
    row_seconds: float  # linear layers' work for one token row
    kv_token_seconds: float
    pair_seconds: float
    kv_tokens: int  # the cache's room

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "source"):
                if not isinstance(value, str):
                    raise ValueError(f"{field.name}={value!r} must be text")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name}={value!r} must be a number, 0 or more")
        if self.kv_tokens != int(self.kv_tokens) or self.kv_tokens < 1:
            raise ValueError(f"kv_tokens={self.kv_tokens!r} must be a whole number of at least 1")
        if self.step_seconds + self.weights_seconds + self.row_seconds == 0:
            raise ValueError("a step would take no time: give step_seconds, weights_seconds or row_seconds")

    def seconds(self, chunks: Sequence[Chunk], rows: int) -> float:
        """Of one step that computes `chunks` in a program of `rows` token rows."""
        kv_tokens = pairs = 0
        for chunk in chunks:
            start, length = chunk.start, chunk.length
            kv_tokens += start + length
            pairs += length * (2 * start + length + 1)
        return (
            self.step_seconds
            + max(self.weights_seconds, rows * self.row_seconds)
            + kv_tokens * self.kv_token_seconds
            + pairs * self.pair_seconds / 2
        )

    @classmethod
    def read(cls, path: Path) -> "StepCost":
        """From a JSON object of this class's fields.

        Raises:
            ValueError: not such an object; the message names the file and the field.
        """
        try:
            given = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(given, dict) or given.keys() != names:
            found = sorted(given) if isinstance(given, dict) else type(given).__name__
            raise ValueError(f"{path} must be an object of exactly the fields {sorted(names)}; it has {found}")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        return (
            f"cost model {self.name}: {1e3 * self.step_seconds:.3g} ms a step, "
            f"weights {1e3 * self.weights_seconds:.3g} ms, {1e6 * self.row_seconds:.3g} us a row, "
            f"{1e9 * self.kv_token_seconds:.3g} ns a cached token read, {1e9 * self.pair_seconds:.3g} ns a query-key "
            f"pair, room for {self.kv_tokens:,} tokens\n  {self.source}"
        )


@dataclass(frozen=True)
class Device:
    """A data sheet: dense bfloat16 operations a second, bytes of memory a second, bytes of memory."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str


@dataclass(frozen=True)
class Decoder:
    """A dense decoder in bfloat16, by what a step reads and computes of it."""

    name: str
    parameters: float  # without the embedding table, of which a step reads a few rows only
    table: float  # parameters of that table
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_bytes(self) -> int:
        """Of one token, all layers."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


# Shares of the data sheet that a step is taken to reach, and what one costs besides: assumed, not measured.
COMPUTE_SHARE = 0.6
BANDWIDTH_SHARE = 0.8
STEP_SECONDS = 0.5e-3
MEMORY_SHARE = 0.9  # the engine's default gpu_memory_utilization
TEMPORARIES = 1e9  # bytes

V6E = Device("v6e-1", 918e12, 1640e9, 31.25 * 2**30, "cloud.google.com/tpu/docs/v6e")
H100 = Device("H100 SXM", 989e12, 3350e9, 80e9, "NVIDIA H100 data sheet, dense")
LLAMA_3_8B = Decoder("Llama-3-8B", 7.505e9, 0.525e9, layers=32, heads=32, kv_heads=8, head_dim=128)


def roofline(name: str, model: Decoder, device: Device) -> StepCost:
    """Every coefficient from a data sheet and the model's shape, times the shares above."""
    flops, bandwidth = COMPUTE_SHARE * device.flops, BANDWIDTH_SHARE * device.bandwidth
    room = MEMORY_SHARE * device.memory - 2 * (model.parameters + model.table) - TEMPORARIES
    return StepCost(
        name=name,
        source=(
            f"computed: {model.name} in bfloat16 on {device.name} ({device.source}: {device.flops / 1e12:.0f} TFLOP/s, "
            f"{device.bandwidth / 1e9:.0f} GB/s) at {COMPUTE_SHARE:.0%} of its operations and {BANDWIDTH_SHARE:.0%} of "
            "its bandwidth, both assumed"
        ),
        step_seconds=STEP_SECONDS,
        weights_seconds=2 * model.parameters / bandwidth,
        row_seconds=2 * model.parameters / flops,
        kv_token_seconds=model.kv_bytes / bandwidth,
        pair_seconds=4 * model.layers * model.heads * model.head_dim / flops,
        kv_tokens=int(room // model.kv_bytes),
    )


CPU_DEMO = StepCost(
    name="cpu-demo",
    source=(
        "fitted by simulate_fit.py to 787 steps of the built-in model on two virtual cores of an Intel Xeon with "
        "AVX-512, shared, the least of 8 times each; off by 9% (median), 24% (p90) of a step's time"
    ),
    step_seconds=0.631e-3,
    weights_seconds=0.0,
    row_seconds=49.2e-6,
    kv_token_seconds=810e-9,
    pair_seconds=71.9e-9,
    kv_tokens=131_072,
)

PRESETS = {
    cost.name: cost
    for cost in (
        roofline("llama-3-8b-v6e", LLAMA_3_8B, V6E),
        roofline("llama-3-8b-h100", LLAMA_3_8B, H100),
        CPU_DEMO,
    )
}


def find_cost(name: str) -> StepCost:
    """A preset by its name, or the coefficients in a JSON file.

    Raises:
        ValueError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"cost model {name!r} is neither a file nor one of {', '.join(PRESETS)}")
    return StepCost.read(path)
