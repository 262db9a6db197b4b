"""The operation of a mixture's experts: its weights, its implementations, and how devices share it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_engine.cuda_fallback.experts import blocked_experts, gpu_experts, ragged_experts
from jax_engine.models.partition import ONE_DEVICE, Partition

EXPERTS_SCOPE = "experts"  # what products of experts are traced under, in profiles and in programs' texts


class ExpertWeights(NamedTuple):
    """The weights of a layer's experts, among those of all layers that are stacked with it."""

    gate: Float[Array, "L E D F"]
    up: Float[Array, "L E D F"]
    down: Float[Array, "L E F D"]
    layer: int | Int[Array, ""]


class ExpertsOp(Protocol):
    """What the experts that each row chose make of it, added up by the row's shares of them.

    Another number in `chosen` than of one of the E experts adds nothing. See `reference.expert_feed_forward`.
    """

    def __call__(
        self,
        x: Float[Array, "T D"],
        chosen: Int[Array, "T C"],
        shares: Float[Array, "T C"],
        weights: ExpertWeights,
        *,
        activation: Callable[[Array], Array],
    ) -> Float[Array, "T D"]: ...


def expert_axes(partition: Partition, num_rows: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that experts are divided over, the width of each, and of a step's rows those that their devices
    divide and that are left.
    """
    over_experts, over_mlp = partition.axes_of(("experts", "mlp"))
    (over_rows,) = partition.axes_of(("block_tokens",))
    over_rows = tuple(axis for axis in over_rows if axis not in (*over_experts, *over_mlp))
    return over_experts, over_mlp, over_rows if num_rows % partition.size_of(over_rows) == 0 else ()


@dataclass(frozen=True)
class MixtureOfExperts:
    """The op of a mixture's experts, with its name and why it was chosen; on one device or on a mesh.

    There, each device puts all rows that it has through the experts that it holds, or its part of each, and what they
    make is added up over the devices: an all-reduce of [T, D], as after a feed-forward that is split, for which rows
    stay where the rest of the layer has them. Where experts are whole on every device, each has its part of the rows,
    and nothing is added up.
    """

    kernel: Callable[..., Array]
    name: str
    reason: str
    partition: Partition = ONE_DEVICE

    def __call__(
        self,
        x: Float[Array, "T D"],
        chosen: Int[Array, "T C"],
        shares: Float[Array, "T C"],
        weights: ExpertWeights,
        *,
        activation: Callable[[Array], Array],
    ) -> Float[Array, "T D"]:
        def run(layer: Array, *arrays: Array) -> Array:
            # In the rows' dtype before it is summed, so that partial results travel in it, not in float32.
            return self.kernel(*arrays, layer=layer, activation=activation).astype(x.dtype)

        *arrays, layer = weights
        split = self._split(run, x.shape[0])
        with jax.named_scope(EXPERTS_SCOPE):
            return split(jnp.asarray(layer, jnp.int32), x, chosen, shares, *arrays)

    def _split(self, run: Callable[..., Array], num_rows: int) -> Callable[..., Array]:
        """`run` on the devices of the mesh, each with the experts that it holds."""
        if self.partition.mesh is None:
            return run
        over_experts, over_mlp, over_rows = expert_axes(self.partition, num_rows)
        rows = P(over_rows)
        inner, outer = P(None, over_experts, None, over_mlp), P(None, over_experts, over_mlp)

        def part(layer: Array, x: Array, chosen: Array, shares: Array, gate: Array, *others: Array) -> Array:
            first = jax.lax.axis_index(over_experts) * gate.shape[1] if over_experts else 0
            return jax.lax.psum(run(layer, x, chosen - first, shares, gate, *others), (*over_experts, *over_mlp))

        return jax.shard_map(
            part,
            mesh=self.partition.current_mesh,
            axis_names=self.partition.free_axes,
            in_specs=(P(), rows, rows, rows, inner, inner, outer),
            out_specs=rows,
            check_vma=False,  # loops over as many rows as a device happens to have
        )


def select_experts(platform: str, partition: Partition, *, deterministic: bool) -> MixtureOfExperts:
    """The implementation for a platform."""
    if deterministic:
        reason = "deterministic: every row goes through products of one shape"
    elif platform == "tpu":
        kernel = partial(ragged_experts, parts=partition.num_parts("experts"))
        return MixtureOfExperts(kernel, "ragged_dot", "a kernel of its own on a TPU", partition)
    elif platform == "gpu":
        reason = "few rows read their experts in place, and many go through one expert after another"
        return MixtureOfExperts(gpu_experts, "gathered or blocked", reason, partition)
    else:
        reason = f"on platform {platform!r}, ragged_dot would multiply every row with every expert"
    return MixtureOfExperts(blocked_experts, "blocked", reason, partition)
