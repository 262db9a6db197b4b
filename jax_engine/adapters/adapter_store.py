"""The weights of adapters: read from disk into host memory, and from there into their slots on the devices."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Sharding
from numpy.typing import NDArray

from jax_engine.adapters.adapter_files import AdapterError, ModuleFactors, adapter_folder, read_adapter
from jax_engine.loading.model_structure import Parameter
from jax_engine.lora_request import LoRARequest
from jax_engine.models.adapters import ADAPTED_MODULES
from jax_engine.sharding.placed_model import PlacedModel

Values = NDArray[Any]

MAX_READS = 4  # at once


class AdapterStore:
    """Adapters in host memory, the least recently used of which make way. Mutable; owned by the runner.

    Threads read files, however long a disk takes, and touch nothing else. Nothing compiles when adapters come and go:
    `warm_up` runs every program that `write` needs.
    """

    def __init__(self, placed: PlacedModel, *, max_rank: int, max_adapters: int) -> None:
        parameters = placed.structure.parameters
        self._places = {place: own for place, own in enumerate(parameters) if own.is_of_adapters}
        self._placed = placed
        self._max_rank = max_rank
        self._max_adapters = max_adapters
        self._loaded: OrderedDict[LoRARequest, dict[str, Values]] = OrderedDict()
        self._reads: dict[LoRARequest, Future[dict[str, Values]]] = {}

    @property
    def loaded(self) -> tuple[LoRARequest, ...]:
        """Those in host memory, the least recently used first."""
        return tuple(self._loaded)

    @property
    def staging_bytes(self) -> int:
        """Memory of the largest factors of one adapter, which are on their way to a slot one after the other."""
        own = self._places.values()
        return max((p.num_bytes // p.shape[p.logical_axes.index("adapters")] for p in own), default=0)

    def begin(self, lora: LoRARequest) -> bool:
        """Whether an adapter has been read, well or not. If it has not, it is being read, or will be after others if
        this is asked again.
        """
        if lora not in self._loaded and lora not in self._reads and len(self._unfinished) < MAX_READS:
            read: Future[dict[str, Values]] = Future()
            self._reads[lora] = read
            threading.Thread(target=self._read, args=(lora, read), name="adapter", daemon=True).start()
        return lora in self._loaded or (lora in self._reads and self._reads[lora].done())

    def fetch(self, lora: LoRARequest) -> bool:
        """Whether an adapter is in host memory, which it will be at some time if this is asked again and again.

        AdapterError, once, when it cannot be used.
        """
        if not self.begin(lora):
            return False
        finished = [other for other, read in self._reads.items() if read.done() and not read.exception()]
        for other in sorted(finished, key=lora.__eq__):  # so that none makes this one go
            self._loaded[other] = self._reads.pop(other).result()
        if failed := self._reads.pop(lora, None):
            failed.result()
        self._loaded.move_to_end(lora)
        while len(self._loaded) > self._max_adapters:
            self._loaded.popitem(last=False)
        return True

    def load(self, lora: LoRARequest) -> None:
        """Return once an adapter is in host memory; AdapterError when it cannot be used."""
        while not self.fetch(lora):
            self.wait(None)

    def wait(self, seconds: float | None) -> None:
        """Return when an adapter that is being read has been, if one is, or after that many seconds."""
        if reads := self._unfinished:
            wait(reads, seconds, FIRST_COMPLETED)

    def forget(self, lora: LoRARequest) -> None:
        """Let go of an adapter, if it is there."""
        self._loaded.pop(lora, None)
        self._reads.pop(lora, None)

    def values(self, lora: LoRARequest) -> Mapping[str, Values]:
        """An adapter's factors, by the names of their parameters. Without `fetch` just before, as `load`."""
        self.load(lora)
        return self._loaded[lora]

    def warm_up(self, leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """The leaves as they were, with zeros in slot 0, and every program of `write` compiled."""
        return self.write(leaves, 0, {})

    def write(self, leaves: Sequence[jax.Array], slot: int, values: Mapping[str, Values]) -> tuple[jax.Array, ...]:
        """The leaves with an adapter's factors in a slot; those that change are donated."""
        changed = list(leaves)
        for place, parameter in self._places.items():
            sharding = self._placed.sharding_of(parameter)
            axis = parameter.logical_axes.index("adapters")
            shape = (*parameter.shape[:axis], *parameter.shape[axis + 1 :])
            padded: Values = np.zeros(shape, parameter.dtype)
            for layer, part in enumerate(parameter.parts):
                if (own := values.get(part.name)) is not None:
                    (padded[layer] if axis else padded)[: len(own)] = own
            changed[place] = _slot_writer(axis, sharding)(changed[place], padded, np.int32(slot))
        return tuple(changed)

    @property
    def _unfinished(self) -> list[Future[dict[str, Values]]]:
        return [read for read in self._reads.values() if not read.done()]

    def _read(self, lora: LoRARequest, read: "Future[dict[str, Values]]") -> None:
        try:
            modules = read_adapter(lora.lora_path, max_rank=self._max_rank)
            read.set_result(self._arranged(modules, lora.lora_path))
        except AdapterError as error:
            read.set_exception(error)
        except BaseException as error:
            read.set_exception(error)  # so that nobody waits in vain
            raise

    def _arranged(self, modules: Mapping[str, ModuleFactors], path: str) -> dict[str, Values]:
        """The factors by the names of their parameters, [rank, *dimensions], in the model's dtype."""
        own = {part.name: part for parameter in self._places.values() for part in parameter.parts}
        arranged = {}
        for module, factors in modules.items():
            for name, stored in ((f"{module}.lora_a", factors.a), (f"{module}.lora_b", factors.b.T)):
                if name not in own:
                    there = {projection for *_, projection, _ in (place.split(".") for place in own)}
                    targets = ", ".join(projection for projection in ADAPTED_MODULES if projection in there)
                    raise AdapterError(
                        f"{adapter_folder(path)}: adapters of {module} are not supported, or the model has none such; "
                        f"the target_modules may be {targets}, of the model's layers, and not of a mixture's experts"
                    )
                arranged[name] = _spread(stored, own[name], f"{adapter_folder(path)}: {module}")
        return arranged


def _spread(stored: NDArray[np.float32], part: Parameter, what: str) -> Values:
    """One factor [rank, merged dimensions] as its parameter has it, with copies of heads and zeros."""
    dims, spreads = part.base_shape[2:], part.spreads[2:]
    if stored.shape[1] != int(np.prod(dims)):
        raise AdapterError(
            f"{what} is made for {stored.shape[1]} values, the model has {int(np.prod(dims))} there; the adapter "
            "belongs to another model"
        )
    values = stored.reshape(-1, *dims)
    for axis, (size, spread) in enumerate(zip(part.shape[2:], spreads, strict=True), start=1):
        values = spread.fill(values, axis, 0, size)
    return values.astype(part.dtype)


@cache  # a program for each shape and sharding, whatever the slot
def _slot_writer(axis: int, sharding: Sharding) -> Callable[[jax.Array, Values, np.int32], jax.Array]:
    write = partial(lax.dynamic_update_index_in_dim, axis=axis)
    return jax.jit(write, donate_argnums=0, out_shardings=sharding)
