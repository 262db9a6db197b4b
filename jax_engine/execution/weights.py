"""The model's weights on the devices, and where they are while the engine sleeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

Leaves = tuple[jax.Array, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class _HostLeaf:
    """What this process has of an array, by the part that it is of the whole."""

    shape: tuple[int, ...]
    sharding: Sharding
    parts: dict[str, NDArray[Any]]

    @classmethod
    def of(cls, leaf: jax.Array) -> "_HostLeaf":
        shards = {str(shard.index): shard for shard in leaf.addressable_shards}  # devices may have the same part
        # A CPU's array may be its device's own memory, which is to be freed here too.
        parts = {part: np.array(shard.data, copy=True) for part, shard in shards.items()}
        return cls(leaf.shape, leaf.sharding, parts)

    def on_device(self) -> jax.Array:
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[str(index)])


class Weights:
    """The flat leaves that step programs take. Mutable; owned by the runner.

    `load` reads them, without any adapter in its slot.
    """

    def __init__(self, load: Callable[[], Leaves]) -> None:
        self._load = load
        self.leaves = load()
        self._on_host: list[_HostLeaf] | None = None

    def put_away(self, *, keep: bool) -> None:
        """Free the devices' memory; `keep` a copy in host memory, one leaf after the other."""
        leaves, self.leaves = self.leaves, ()
        self._on_host = [] if keep else None
        for leaf in leaves:
            if self._on_host is not None:
                self._on_host.append(_HostLeaf.of(leaf))
            leaf.delete()

    def bring_back(self) -> bool:
        """Have them on the devices again; False when they were read anew, without adapters."""
        if self._on_host is None:
            self.leaves = self._load()
            return False
        self.leaves = tuple(leaf.on_device() for leaf in self._on_host)
        self._on_host = None
        return True
