"""Where arrays lie on a mesh of devices: a strategy says which logical axes are split, the mesh into how many parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_engine.models.config import ModelConfig

MESH_AXES = ("data", "stage", "expert", "tensor")


@dataclass(frozen=True)
class Strategy:
    """A table from logical axes (of parameters, see `models/layers.py`) to mesh axes; an axis that is not in it is held
    whole by every device.
    """

    axes: Mapping[str, str]
    whole_if_uneven: frozenset[str] = frozenset()  # held whole, rather than refused, where the mesh does not divide it


STRATEGIES: Mapping[str, Strategy] = {
    # Megatron (arXiv 1909.08053): two sums over devices a layer, after attention and after the feed-forward.
    "tensor": Strategy(
        axes={"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"},
        whole_if_uneven=frozenset({"vocab"}),
    ),
}


@dataclass(frozen=True)
class Placement:
    """A strategy that fits a model and a mesh; without a mesh, everything is on one device."""

    mesh: Mesh | None = None
    axes: Mapping[str, str] = field(default_factory=dict)
    kv_head_copies: int = 1  # devices that hold the same key and value head

    def of(self, logical_axes: Sequence[str | None] = ()) -> NamedSharding | None:
        """The sharding of an array with these axes; without axes, a copy on every device."""
        if self.mesh is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(*(self.axes.get(axis or "") for axis in logical_axes)))

    def num_parts(self, logical_axis: str) -> int:
        """How many parts an axis is cut into."""
        if self.mesh is None or logical_axis not in self.axes:
            return 1
        return int(self.mesh.shape[self.axes[logical_axis]])

    def constrain(self, array: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        """Say within a step how an array lies."""
        sharding = self.of(logical_axes)
        return array if sharding is None else lax.with_sharding_constraint(array, sharding)

    def by_rows(self, array: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        """Within a step, split the rows of an array over all devices that share a layer, or, where they are uneven,
        hold it whole on each.

        `logical_axes` say how it lay before. Left unsaid, the compiler would move the rows further up the program,
        and gather weights for them.
        """
        if self.mesh is None:
            return array
        rows = "tensor" if array.shape[0] % self.mesh.shape["tensor"] == 0 else None
        array = self.constrain(array, logical_axes)
        return lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(rows)))

    def describe(self, model: ModelConfig) -> str:
        """What is split over how many devices, and what is not, in one sentence."""
        parts = ", ".join(f"{axis} over {self.num_parts(axis)}" for axis in self.axes)
        text = f"tensor parallel: {parts}"
        if self.kv_head_copies > 1:
            text += f"; each key and value head on {self.kv_head_copies} devices"
        if "vocab" not in self.axes:
            text += f"; the vocabulary ({model.vocab_size}) whole on each device, which do not divide it"
        return text


def tensor_mesh(size: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh with the first `size` of the devices along `tensor`, in an order that suits their links.

    Raises:
        ValueError: there are fewer devices.
    """
    if size > len(devices):
        remedy = f"use at most {len(devices)}"
        if devices[0].platform == "cpu":
            remedy += f", or XLA_FLAGS=--xla_force_host_platform_device_count={size} to try it on a CPU"
        raise ValueError(
            f"tensor_parallel_size={size} needs {size} devices and there are {len(devices)} "
            f"({devices[0].device_kind}); {remedy}"
        )
    return jax.make_mesh(
        (1, 1, 1, size), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=list(devices[:size])
    )


def place(model: ModelConfig, mesh: Mesh | None, strategy: Strategy = STRATEGIES["tensor"]) -> Placement:
    """Fit a strategy to a model.

    With more devices than key and value heads, as many of them hold the same head.

    Raises:
        ValueError: a mesh axis does not divide what is split over it; with the sizes, and those that would do.
    """
    if mesh is None:
        return Placement()
    sizes = _axis_sizes(model)
    axes, kv_head_copies = {}, 1
    for axis, mesh_axis in strategy.axes.items():
        parts = int(mesh.shape[mesh_axis])
        if axis == "kv_heads" and parts % sizes[axis] == 0:
            kv_head_copies = parts // sizes[axis]
        elif sizes[axis] % parts:
            if axis in strategy.whole_if_uneven:
                continue
            raise ValueError(_uneven(axis, mesh_axis, parts, model, strategy))
        axes[axis] = mesh_axis
    return Placement(mesh, axes, kv_head_copies)


def _axis_sizes(model: ModelConfig) -> dict[str, int]:
    return {
        "heads": model.num_attention_heads,
        "kv_heads": model.num_key_value_heads,
        "mlp": model.intermediate_size,
        "vocab": model.vocab_size,
    }


def _uneven(axis: str, mesh_axis: str, parts: int, model: ModelConfig, strategy: Strategy) -> str:
    sizes = _axis_sizes(model)
    strict = [
        name for name in strategy.axes if strategy.axes[name] == mesh_axis and name not in strategy.whole_if_uneven
    ]

    def fits(count: int) -> bool:
        return all(sizes[name] % count == 0 or (name == "kv_heads" and count % sizes[name] == 0) for name in strict)

    allowed = [str(count) for count in range(1, max(sizes[name] for name in strict) + 1) if fits(count)]
    return (
        f"{mesh_axis}_parallel_size={parts} does not divide the model's {axis} ({sizes[axis]}); sizes that fit its "
        f"{', '.join(f'{sizes[name]} {name}' for name in strict)} are {', '.join(allowed)}"
    )
