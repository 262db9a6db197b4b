"""Where arrays lie on a mesh of devices: a strategy says which logical axes are split, the mesh into how many parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import gcd, lcm, prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_engine.kv_cache.page_partitions import UNCUT, PagePartitions
from jax_engine.models.config import ModelConfig
from jax_engine.models.partition import ONE_DEVICE, Partition
from jax_engine.sharding.strategies import MESH_AXES, STRATEGIES, Strategy, shape_text
from jax_engine.sharding.widening import AS_STORED, Widening


@dataclass(frozen=True)
class Placement:
    """A strategy that fits a model and a mesh; without a mesh, everything is on one device."""

    strategy: str = "none"
    mesh: Mesh | None = None
    weights: Partition = ONE_DEVICE  # where parameters lie
    activations: Partition = ONE_DEVICE  # where a step's other arrays lie, and the cache
    weights_in_use: Partition = ONE_DEVICE  # where a layer's parameters are brought first; nowhere, without a mesh
    widening: Widening = AS_STORED  # what a model has beside its own, so that devices divide it
    vocab_size: int | None = None  # the model's own: logits behind it are padding, on a mesh

    @property
    def page_partitions(self) -> PagePartitions:
        """The parts that a pool of pages is cut into, each on devices of its own."""
        count = self.activations.num_parts("pages")
        return PagePartitions(count, striped=not self.activations.owned_pages) if count > 1 else UNCUT

    def of(self, logical_axes: Sequence[str | None] = ()) -> NamedSharding | None:
        """The sharding of a parameter with these axes; without axes, a copy on every device."""
        is_vector = len([axis for axis in logical_axes if axis not in ("layers", None)]) == 1
        if self.weights_in_use.mesh is not None and is_vector:
            return self.weights_in_use.of(logical_axes)  # no device saves much by a part of a norm
        return self.weights.of(logical_axes)

    def constrain(self, array: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        """Say within a step how an array lies."""
        return self.activations.constrain(array, logical_axes)

    def by_rows(self, array: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        """Within a step, split the rows of an array over all devices, with rows of zeros behind it where they would be
        uneven.

        `logical_axes` say how it lay before. Left unsaid, the compiler would move the rows further up the program,
        and gather weights for them.
        """
        if self.mesh is None:
            return array
        array = self.constrain(array, logical_axes)
        missing = self.whole_shares(array.shape[0]) - array.shape[0]
        if missing:
            array = self.constrain(jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))), logical_axes)
        return lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(MESH_AXES)))

    def whole_shares(self, num_rows: int) -> int:
        """The least number from `num_rows` on that all devices divide."""
        num_devices = 1 if self.mesh is None else self.mesh.size
        return -(-num_rows // num_devices) * num_devices

    def describe(self, model: ModelConfig) -> str:
        """What is split over how many devices, and what is not, in one sentence."""
        if self.mesh is None:
            return "one device"

        def parts(partition: Partition) -> str:
            split = {axis: partition.num_parts(axis) for axis, _ in partition.table}
            return ", ".join(f"{axis} over {count}" for axis, count in split.items() if count > 1) or "nothing"

        text = f"sharding strategy {self.strategy!r} on a mesh of {shape_text(self.mesh.shape)}: of weights, "
        text += f"{parts(self.weights)}; of a step and the cache, {parts(self.activations)}"
        wide = self.widening.config(model)
        if self.widening.kv_head_copies > 1:
            text += f"; each key and value head is there {self.widening.kv_head_copies} times"
        if self.widening.head_padding:
            text += f"; query heads padded from {model.num_attention_heads} to {wide.num_attention_heads}"
        if self.widening.vocab_padding:
            text += f"; the vocabulary padded from {model.vocab_size} to {wide.vocab_size}"
        if self.page_partitions.count > 1:
            text += f"; pages {'owned' if self.activations.owned_pages else 'striped'}"
        return text


def make_mesh(shape: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of the first devices, as many along each axis of `MESH_AXES` as `Strategy.mesh_shape` says, in an order
    that suits their links. The devices need not be of this machine.

    Raises:
        ValueError: there are fewer devices.
    """
    sizes = tuple(shape[axis] for axis in MESH_AXES)
    size = prod(sizes)
    if size > len(devices):
        remedy = f"use at most {len(devices)}"
        if devices[0].platform == "cpu":
            remedy += f", or XLA_FLAGS=--xla_force_host_platform_device_count={size} to try it on a CPU"
        raise ValueError(
            f"a mesh of {shape_text(shape)} needs {size} devices (tensor_parallel_size times pipeline_parallel_size) "
            f"and there are {len(devices)} ({devices[0].device_kind}); {remedy}"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=list(devices[:size]))


def place(model: ModelConfig, mesh: Mesh | None, strategy: Strategy = STRATEGIES["tensor"]) -> Placement:
    """Fit a strategy to a model.

    Where its parts do not divide the key and value heads, as many devices hold the same one, and query heads and the
    vocabulary are padded with zeros.

    Raises:
        ValueError: a mesh axis does not divide what is split over it; with the sizes, and those that would do. Or there
            are more parts than heads, or the strategy splits nothing over a mesh axis.
    """
    if mesh is None:
        return Placement()
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in strategy.used_axes:
            raise ValueError(
                f"a mesh of {shape_text(mesh.shape)} has {size} devices along {axis!r}, over which the sharding "
                f"strategy {strategy.name!r} splits nothing"
            )
    for table in (strategy.weights, strategy.all_activations):
        for logical, mesh_axes in table.items():
            _check_size(logical, mesh_axes, model, mesh, strategy)
    weights, activations = (
        Partition(mesh, tuple((logical, tuple(mesh_axes)) for logical, mesh_axes in table.items()))
        for table in (strategy.weights, strategy.all_activations)
    )
    for partition, gathered in ((weights, strategy.gathers), (activations, ())):
        _check_experts(model, partition, strategy, takes_rows_whole="embed" not in gathered)
    activations = replace(activations, owned_pages=strategy.page_rule == "owned")
    heads, kv_heads = map(activations.mesh_axes, ("heads", "kv_heads"))
    if heads != kv_heads:
        raise ValueError(
            f"sharding strategy {strategy.name!r} splits heads over {list(heads)} and kv_heads over {list(kv_heads)}; "
            "attention needs them over the same"
        )
    tables = weights, activations
    widening = Widening.of(
        model,
        head_parts=lcm(*(table.num_parts(axis) for table in tables for axis in ("heads", "kv_heads"))),
        vocab_parts=lcm(*(table.num_parts("vocab") for table in tables)),
    )
    in_use = tuple((logical, mesh_axes) for logical, mesh_axes in weights.table if logical not in strategy.gathers)
    weights_in_use = Partition(mesh, in_use) if strategy.gathers else ONE_DEVICE
    return Placement(strategy.name, mesh, weights, activations, weights_in_use, widening, model.vocab_size)


def _check_size(logical: str, mesh_axes: Sequence[str], model: ModelConfig, mesh: Mesh, strategy: Strategy) -> None:
    sizes = {"mlp": gcd(*model.feed_forward_sizes), "embed": model.hidden_size}
    parts, heads = prod(mesh.shape[axis] for axis in mesh_axes), model.num_attention_heads
    split = f"sharding strategy {strategy.name!r} splits {logical} over {' x '.join(mesh_axes)}, and {parts} devices"
    if logical in ("heads", "kv_heads") and parts > heads:
        raise ValueError(f"{split} are more than the model's heads ({heads}); use at most {heads}")
    if logical in sizes and sizes[logical] % parts:
        with_heads = not {"heads", "kv_heads"}.isdisjoint(strategy.all_activations)
        most = min(sizes[logical], heads) if with_heads else sizes[logical]
        fitting = [str(count) for count in range(1, most + 1) if sizes[logical] % count == 0]
        raise ValueError(
            f"{split} do not divide the model's {logical} ({sizes[logical]}); sizes that fit are {', '.join(fitting)}"
        )


def _check_experts(model: ModelConfig, partition: Partition, strategy: Strategy, *, takes_rows_whole: bool) -> None:
    """ValueError where experts, or the width of each, are uneven, or what goes into them is split."""
    if model.experts is None or partition.mesh is None:
        return
    if takes_rows_whole and partition.mesh_axes("embed"):
        raise ValueError(
            f"sharding strategy {strategy.name!r} splits embed, and experts, as {model.architecture} has them, take "
            "rows whole; use expert, tensor, tensor_sequence or fully_sharded"
        )
    sizes = {"num_experts": model.experts.num_experts, "moe_intermediate_size": model.experts.moe_intermediate_size}
    for (name, size), mesh_axes in zip(sizes.items(), partition.axes_of(("experts", "mlp")), strict=True):
        parts = prod(partition.mesh.shape[axis] for axis in mesh_axes)
        if size % parts:
            allowed = ", ".join(str(count) for count in range(1, size + 1) if size % count == 0)
            raise ValueError(
                f"sharding strategy {strategy.name!r} splits experts over {' x '.join(mesh_axes)}, and {parts} devices "
                f"do not divide the model's {name} ({size}); what does is {allowed}"
            )
