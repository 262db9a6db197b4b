"""Weights that a strategy leaves whole where a mesh axis could split them: what to change when they do not fit."""

import re
from dataclasses import dataclass
from math import prod

from jax_engine.loading.model_structure import Parameter
from jax_engine.sharding.placed_model import PlacedModel
from jax_engine.sharding.strategies import WEIGHT_AXES


@dataclass(frozen=True)
class UnsplitWeight:
    """A parameter, or those of several layers that are alike, that could be split over one more mesh axis."""

    name: str  # with * for the number of a layer, where there are several
    count: int  # of parameters
    axes: dict[str, int]  # logical axes and their sizes, of one
    num_bytes: int  # of all, on each device
    mesh_axis: str
    mesh_size: int
    candidates: tuple[str, ...]  # logical axes that it divides

    @property
    def saved_bytes(self) -> int:
        """What splitting them frees on each device."""
        return self.num_bytes - self.num_bytes // self.mesh_size

    def describe(self) -> str:
        """What it is, and what would help, in one clause."""
        shape = ", ".join(f"{axis}={size}" for axis, size in self.axes.items())
        many = f", {self.count} of them," if self.count > 1 else ""
        before, after = self.num_bytes / 2**30, (self.num_bytes - self.saved_bytes) / 2**30
        return (
            f"{self.name} ({shape}){many} takes {before:.2f} GiB of each device, whole over the {self.mesh_size} "
            f"devices along {self.mesh_axis!r}; split over {self.mesh_axis!r} by {' or '.join(self.candidates)} "
            f"(`weights` of the sharding rules), it would take {after:.2f} GiB"
        )


def unsplit_giants(placed: PlacedModel, missing_bytes: int) -> list[UnsplitWeight]:
    """The fewest weights that would free `missing_bytes` of each device if they were split over one more mesh axis
    each, the largest first; none where all together would not, or there is no mesh.
    """
    chosen: list[UnsplitWeight] = []
    for weight in sorted(_unsplit(placed), key=lambda weight: weight.saved_bytes, reverse=True):
        if missing_bytes <= 0:
            break
        chosen.append(weight)
        missing_bytes -= weight.saved_bytes
    return chosen if missing_bytes <= 0 else []


def _unsplit(placed: PlacedModel) -> list[UnsplitWeight]:
    """Of each kind of weight, what it could be split over best."""
    groups: dict[tuple[str, tuple[str, ...], tuple[int, ...]], list[Parameter]] = {}
    for parameter in placed.structure.parameters:
        kind = re.sub(r"\.\d+(\.\.\d+)?\.", ".*.", parameter.name)
        groups.setdefault((kind, parameter.logical_axes, parameter.shape), []).append(parameter)
    found = (_best_split(placed, kind, members) for (kind, *_), members in groups.items())
    return [weight for weight in found if weight is not None]


def _best_split(placed: PlacedModel, kind: str, members: list[Parameter]) -> UnsplitWeight | None:
    """The largest mesh axis over which parameters that are alike are whole, and that divides one of their axes."""
    first, mesh = members[0], placed.placement.mesh
    sharding = placed.placement.of(first.logical_axes)
    if mesh is None or sharding is None:
        return None
    used = {axis for entry in sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}
    local = sharding.shard_shape(first.shape)
    held = prod(local) * first.dtype.itemsize * len(members)
    for mesh_axis, size in sorted(mesh.shape.items(), key=lambda item: -item[1]):
        candidates = tuple(
            axis
            for axis, length in zip(first.logical_axes, local, strict=True)
            if axis in WEIGHT_AXES and axis != "layers" and length % size == 0
        )
        if size > 1 and mesh_axis not in used and candidates:
            name = first.name if len(members) == 1 else kind
            axes = dict(zip(first.logical_axes, first.shape, strict=True))
            return UnsplitWeight(name, len(members), axes, held, mesh_axis, int(size), candidates)
    return None
