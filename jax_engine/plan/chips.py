"""What chips can do at most, by their makers' figures, and the names of slices of them. Needs no JAX.

Sources: Google Cloud's pages on each TPU (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x: "system architecture")
and NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and B200 (DGX B200), dense figures without sparsity.
What a TPU program may use of its memory is what the compiler says in its error when one needs more; of a GPU's, it is
the engine's share of what the device reports.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from jax_engine.plan.gpu_targets import GPUS, compiler_is_installed

GIB = 2**30
# Of a GPU's memory, what the engine lets JAX's pool take (`gpu_settings`). Outside it are CUDA's context, libraries'
# workspaces, programs and command buffers: 7 GB of an H200's.
GPU_POOL_SHARE = 0.95
# An assumption, not a data sheet's: what a message takes to a neighbour besides its bytes. "How to Scale Your Model"
# (jax-ml.github.io/scaling-book, part 3) has about 1 us for a TPU's links.
HOP_SECONDS = 1e-6


@dataclass(frozen=True)
class Chip:
    """A chip by its maker's figures; JAX sees it as one device or as `devices` of them, which share them equally."""

    name: str
    platform: str  # as JAX has it
    memory_bytes: float  # that programs may use
    bytes_per_second: float  # of its main memory
    flops: Mapping[str, float]  # a second, of products of matrices, by HLO's name of their type
    link_bytes_per_second: float  # to all neighbours together, in one direction
    num_links: int  # that share it; 1: a switch, which gives all of it to any of them
    devices: int = 1
    cores_in_name: int = 1  # what the number in a slice's name counts of a chip
    dimensions: int = 2  # of the torus that chips are wired in
    sizes: tuple[int, ...] = ()  # chips of a slice
    topologies: Mapping[int, str] = field(default_factory=dict)  # by chips; the compiler's names

    def peak(self, dtype: str) -> float:
        """Operations a second of one device on numbers of a type; of a type without a figure, those of bfloat16."""
        kind = "f8" if dtype.startswith("f8") else dtype
        slow = {"f32": 4, "f64": 4}.get(dtype, 1)  # in passes of bfloat16 at best: three of them, or more
        return self.flops.get(kind, self.flops["bf16"] / slow) / self.devices

    @property
    def device_bytes(self) -> int:
        return int(self.memory_bytes / self.devices)

    @property
    def device_bytes_per_second(self) -> float:
        return self.bytes_per_second / self.devices

    @property
    def ring_bytes_per_second(self) -> float:
        """What a device sends on a ring of its neighbours, used in both directions, or through a switch."""
        links = 1 if self.num_links == 1 else min(2, self.num_links)
        return self.link_bytes_per_second * links / self.num_links / self.devices


@dataclass(frozen=True)
class Target:
    """Devices to plan for."""

    name: str
    chip: Chip
    num_chips: int
    # Programs are compiled for as many of this machine's CPU, which are cut into the same parts: there is no compiler.
    has_stand_in: bool = False

    @property
    def num_devices(self) -> int:
        """As JAX sees them."""
        return self.num_chips * self.chip.devices

    @property
    def topology(self) -> str:
        """The compiler's name of the slice."""
        return f"{self.chip.name}:{self.chip.topologies[self.num_chips]}"

    def describe(self) -> str:
        kind = f"{self.num_chips} {self.chip.name} chip{'s' * (self.num_chips > 1)}"
        return kind if self.chip.devices == 1 else f"{kind}, {self.num_devices} devices"


_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_SOLID = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
_HOST = (1, 2, 4, 8)


def _tpu(name: str, gib: float, bandwidth: float, flops: Mapping[str, float], link: float, **more: int) -> Chip:
    links, shapes = (4, _FLAT) if more.pop("dimensions", 2) == 2 else (6, _SOLID)
    sizes = tuple(size for size in shapes if size > 1 or links == 4)
    return Chip(
        name, "tpu", gib * GIB, bandwidth, flops, link, links, **more, dimensions=links // 2, sizes=sizes,
        topologies=shapes,
    )  # fmt: skip


def _gpu(name: str, flops: Mapping[str, float], link: float) -> Chip:
    gpu = GPUS[name]
    return Chip(name, "gpu", gpu.memory_bytes * GPU_POOL_SHARE, gpu.bytes_per_second, flops, link, 1, sizes=_HOST)


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        # The compiler describes a v4 chip as two devices, each with half of it; its name counts TensorCores.
        _tpu("v4", 2 * 15.25, 1228e9, {"bf16": 275e12, "s8": 275e12}, 300e9, dimensions=3, devices=2, cores_in_name=2),
        _tpu("v5e", 15.75, 819e9, {"bf16": 197e12, "s8": 394e12}, 200e9),
        _tpu("v5p", 95.74, 2765e9, {"bf16": 459e12, "s8": 918e12, "f8": 459e12}, 600e9, dimensions=3, cores_in_name=2),
        _tpu("v6e", 31.25, 1638e9, {"bf16": 918e12, "s8": 1836e12, "f8": 918e12}, 400e9),
        _tpu(
            "tpu7x", 2 * 94.75, 7380e9, {"bf16": 2307e12, "f8": 4614e12}, 600e9,
            dimensions=3, devices=2, cores_in_name=2,
        ),
        _gpu("a100", {"bf16": 312e12, "s8": 624e12}, 300e9),
        _gpu("h100", {"bf16": 989e12, "s8": 1979e12, "f8": 1979e12}, 450e9),
        _gpu("h200", {"bf16": 989e12, "s8": 1979e12, "f8": 1979e12}, 450e9),
        _gpu("b200", {"bf16": 2250e12, "s8": 4500e12, "f8": 4500e12}, 900e9),
    )
}  # fmt: skip


def parse_target(name: str, *, host_bytes: int = 0) -> Target:
    """The devices that a name such as `v6e-8`, `tpu7x-8`, `h200-1` or `cpu-1` stands for.

    The number counts chips; of v4, v5p and tpu7x it counts TensorCores, two a chip, as Google Cloud's names do. `cpu`
    is this machine, with `host_bytes` of memory, without figures of what it can do.

    Raises:
        ValueError: there is no such chip, or no such slice of it.
    """
    match = re.fullmatch(r"([a-z]\w*?)-(\d+)", name.strip().lower())
    if match is None or (match[1] not in CHIPS and match[1] != "cpu"):
        raise ValueError(
            f"device={name!r} must be a chip and a number, such as v6e-8, tpu7x-8 or h200-1; chips are "
            f"{', '.join(CHIPS)} and cpu"
        )
    number = int(match[2])
    if match[1] == "cpu":
        return Target(name, cpu(host_bytes // max(number, 1)), max(number, 1))
    chip = CHIPS[match[1]]
    allowed = {size * chip.cores_in_name: size for size in chip.sizes}
    if number not in allowed:
        sizes = ", ".join(f"{chip.name}-{count}" for count in allowed)
        raise ValueError(f"device={name!r} is no size of a {chip.name} slice; sizes are {sizes}")
    return Target(name, chip, allowed[number], chip.platform == "gpu" and not compiler_is_installed())


def cpu(memory_bytes: float) -> Chip:
    """A CPU that pretends to be a device."""
    return Chip("cpu", "cpu", memory_bytes, 0.0, {"bf16": 0.0}, 0.0, 1, sizes=_HOST)


def next_sizes(target: Target) -> tuple[Target, ...]:
    """Larger slices of the same chip, in ascending order."""
    chip = target.chip
    larger = [size for size in chip.sizes if size > target.num_chips]
    return tuple(Target(f"{chip.name}-{size * chip.cores_in_name}", chip, size) for size in larger)


def torus_sizes(target: Target) -> tuple[int, ...]:
    """Chips along each dimension of a TPU slice."""
    sizes = tuple(int(size) for size in target.chip.topologies[target.num_chips].split("x"))
    assert prod(sizes) == target.num_chips
    return sizes
