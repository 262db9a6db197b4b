"""The adapters that the clients of a server may name, kept by the core for all its front ends."""

from collections.abc import Callable, Iterable

from jax_engine.lora_request import LoRARequest, split_module


class ServedList:
    """The adapters that a server's clients may name. Mutable; owned by the engine core.

    Each gets a number of its own, so that one that is loaded again shares nothing with what it was before.
    """

    def __init__(self, modules: Iterable[str], load: Callable[[LoRARequest], None]) -> None:
        """`modules` are those of the configuration; `load` raises a ValueError for one that cannot be used."""
        self._load = load
        self._by_name: dict[str, LoRARequest] = {}
        self._num_added = 0
        for module in modules:
            self.add(*split_module(module))

    @property
    def all(self) -> tuple[LoRARequest, ...]:
        return tuple(self._by_name.values())

    def next_one(self, name: str, path: str) -> LoRARequest:
        """What `add` would list; ValueError when another has its name."""
        if name in self._by_name:
            raise ValueError(f"lora_name={name!r} is taken by an adapter that is loaded; unload that one first")
        return LoRARequest(name, self._num_added + 1, path)

    def add(self, name: str, path: str) -> None:
        """List an adapter; ValueError when it cannot be used, or another has its name."""
        lora = self.next_one(name, path)
        self._load(lora)
        self._num_added += 1
        self._by_name[name] = lora

    def remove(self, lora: LoRARequest) -> None:
        """List an adapter no longer, if it is listed."""
        if self._by_name.get(lora.lora_name) == lora:
            del self._by_name[lora.lora_name]
