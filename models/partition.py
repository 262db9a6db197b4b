"""Where the arrays of a step lie on a mesh of devices, by the names of their axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh


@dataclass(frozen=True)
class Partition:
    """Which mesh axes each logical axis is split over; without a mesh, everything is on one device. Hashable.

    Of one array, a mesh axis splits one dimension only: that whose logical axis comes first in the table. Within a
    `shard_map` over some axes of the mesh, arrays are those of one of its parts, which the other axes split.
    """

    mesh: Mesh | None = None
    table: tuple[tuple[str, tuple[str, ...]], ...] = ()
    owned_pages: bool = False  # where `pages` are split: each sequence's are on one device, or else striped over all

    def mesh_axes(self, logical_axis: str | None) -> tuple[str, ...]:
        """The mesh axes that an axis is split over; none, if it is whole."""
        return next((mesh_axes for name, mesh_axes in self.table if name == logical_axis), ())

    def num_parts(self, *logical_axes: str) -> int:
        """How many parts an array with these axes is cut into."""
        if self.mesh is None:
            return 1
        taken = {axis for entry in self.axes_of(logical_axes) for axis in entry}
        return prod(int(self.mesh.shape[axis]) for axis in taken)

    def size_of(self, mesh_axes: Sequence[str]) -> int:
        """Devices along these axes of the mesh, together."""
        return 1 if self.mesh is None else prod(int(self.mesh.shape[axis]) for axis in mesh_axes)

    def spec(self, logical_axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array with these axes; without axes, a copy on every device."""
        return PartitionSpec(*(entry or None for entry in self.axes_of(logical_axes)))

    def of(self, logical_axes: Sequence[str | None] = ()) -> NamedSharding | None:
        """The sharding of an array with these axes."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.spec(logical_axes))

    def constrain(self, array: jax.Array, logical_axes: Sequence[str | None]) -> jax.Array:
        """Say within a step how an array lies; a dimension that its mesh axes do not divide is whole."""
        if self.mesh is None:
            return array
        even = [
            name if name is not None and size % self.num_parts(name) == 0 else None
            for name, size in zip(logical_axes, array.shape, strict=False)
        ]
        return lax.with_sharding_constraint(array, NamedSharding(self.current_mesh, self.spec(even)))

    @property
    def current_mesh(self) -> Mesh | AbstractMesh:
        """The mesh, within a `shard_map` with what that has made of its axes."""
        assert self.mesh is not None
        context = get_abstract_mesh()
        return context if context.manual_axes else self.mesh

    @property
    def free_axes(self) -> frozenset[str]:
        """The axes of the mesh over which no `shard_map` around has split the arrays already."""
        mesh = self.current_mesh
        return frozenset(mesh.axis_names) - frozenset(mesh.manual_axes if isinstance(mesh, AbstractMesh) else ())

    def axes_of(self, logical_axes: Sequence[str | None]) -> list[tuple[str, ...]]:
        """The mesh axes of each dimension of an array with these axes."""
        ranks = {name: rank for rank, (name, _) in enumerate(self.table)}
        taken: set[str] = set(get_abstract_mesh().manual_axes)
        found: list[tuple[str, ...]] = [()] * len(logical_axes)
        for place in sorted(
            range(len(logical_axes)), key=lambda place: ranks.get(logical_axes[place] or "", len(ranks))
        ):
            found[place] = tuple(axis for axis in self.mesh_axes(logical_axes[place]) if axis not in taken)
            taken.update(found[place])
        return found


ONE_DEVICE = Partition()
