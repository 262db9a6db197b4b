"""The model's weights on the devices, and where they are while the engine sleeps."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from numpy.typing import NDArray

Leaves = tuple[jax.Array, ...]


class Weights:
    """The flat leaves that step programs take. Mutable; owned by the runner.

    `load` reads them, without any adapter in its slot.
    """

    def __init__(self, load: Callable[[], Leaves]) -> None:
        self._load = load
        self.leaves = load()
        self._on_host: list[tuple[NDArray[Any], Sharding]] | None = None

    def put_away(self, *, keep: bool) -> None:
        """Free the devices' memory; `keep` a copy in host memory, one leaf after the other."""
        leaves, self.leaves = self.leaves, ()
        self._on_host = [] if keep else None
        for leaf in leaves:
            if self._on_host is not None:
                # A CPU's array may be its device's own memory, which is to be freed here too.
                self._on_host.append((np.array(leaf, copy=True), leaf.sharding))
            leaf.delete()

    def bring_back(self) -> bool:
        """Have them on the devices again; False when they were read anew, without adapters."""
        if self._on_host is None:
            self.leaves = self._load()
            return False
        self.leaves = tuple(jax.device_put(value, sharding) for value, sharding in self._on_host)
        self._on_host = None
        return True
