"""Leaves of stacked layers, filled in place layer by layer; devices that hold some of the layers load those alone."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

LoadLayer = Callable[[int, Sharding], jax.Array]  # of a layer, to where it is to lie


def stack_layers(
    load: LoadLayer, count: int, shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding, *, of_layer: Sharding
) -> jax.Array:
    """The leaf of `count` layers, zeros in those after them: beside it there is only ever one layer.

    `of_layer` is how one layer lies, of a leaf whose axis of layers is whole on every device. If `sharding` splits
    that, the devices of each part load its layers and no others.
    """
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return _fill(load, range(count), shape, dtype, sharding, of_layer)
    rest, pieces = sharding.spec[1:], []
    meshes = list(_meshes_of_parts(sharding))
    num_layers = shape[0] // len(meshes)
    for index, mesh in enumerate(meshes):
        if all(device.process_index != jax.process_index() for device in mesh.devices.flat):
            continue  # another process's
        own = range(index * num_layers, min((index + 1) * num_layers, count))
        where = NamedSharding(mesh, PartitionSpec(None, *rest)), NamedSharding(mesh, PartitionSpec(*rest))
        part = _fill(load, own, (num_layers, *shape[1:]), dtype, *where)
        pieces += [shard.data for shard in part.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _meshes_of_parts(sharding: NamedSharding) -> Iterator[Mesh]:
    """The devices of each part of an array's first dimension, in the order of the parts, as meshes of their own."""
    mesh, first = sharding.mesh, sharding.spec[0]
    names = first if isinstance(first, tuple) else (first,)
    axes = [mesh.axis_names.index(name) for name in names]
    for place in np.ndindex(*(mesh.devices.shape[axis] for axis in axes)):
        index = [slice(None)] * mesh.devices.ndim
        for axis, number in zip(axes, place, strict=True):
            index[axis] = slice(number, number + 1)
        yield Mesh(mesh.devices[tuple(index)], mesh.axis_names, axis_types=mesh.axis_types)


def _fill(
    load: LoadLayer, layers: range, shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding, of_layer: Sharding
) -> jax.Array:
    stack: jax.Array = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    set_layer = jax.jit(_set_layer, donate_argnums=0, out_shardings=sharding)
    for place, layer in enumerate(layers):
        stack = set_layer(stack, load(layer, of_layer), place).block_until_ready()
    return stack


def _set_layer(stack: jax.Array, layer: jax.Array, place: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, layer, place, axis=0)
