"""What is to be done on the devices, as messages: every process of an engine is given the same, in the same order.

An order names programs by number and carries what they take from the host: packed buffers, never requests.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import jax
import msgspec
import numpy as np

from jax_engine.execution.devices import Devices
from jax_engine.kv_cache.host_pool import PageCopies
from jax_engine.sampling.full_sampling import Drawn, ForwardResults

Values = np.ndarray[Any, Any]
Pairs = Sequence[tuple[int, int]]
Result = TypeVar("Result", covariant=True)


class Order(Protocol[Result]):
    """Something to do, which each process does by `run`."""

    def run(self, devices: Devices) -> Result: ...


class Step(msgspec.Struct, array_like=True, frozen=True, gc=False, tag="step"):
    """See `Devices.step`."""

    number: int
    buffer: Values

    def run(self, devices: Devices) -> jax.Array:
        return devices.step(self.number, self.buffer)


class Forward(msgspec.Struct, array_like=True, frozen=True, gc=False, tag="forward"):
    """See `Devices.forward`."""

    number: int
    buffer: Values
    inputs: dict[str, Values]

    def run(self, devices: Devices) -> ForwardResults:
        return devices.forward(self.number, self.buffer, self.inputs)


class Draw(msgspec.Struct, array_like=True, frozen=True, gc=False, tag="draw"):
    """See `Devices.draw`."""

    number: int
    inputs: dict[str, Values]

    def run(self, devices: Devices) -> Drawn:
        return devices.draw(self.number, self.inputs)


class Draft(msgspec.Struct, array_like=True, frozen=True, gc=False, tag="draft"):
    """See `Devices.draft`."""

    number: int
    buffer: Values

    def run(self, devices: Devices) -> jax.Array:
        return devices.draft(self.number, self.buffer)


class CopyPages(msgspec.Struct, array_like=True, frozen=True, tag="copy_pages"):
    """The fields of `PageCopies`."""

    saves: Pairs
    copies: Pairs
    loads: Pairs

    def run(self, devices: Devices) -> None:
        devices.copy_pages(PageCopies(self.saves, self.copies, self.loads))


class WritePages(msgspec.Struct, array_like=True, frozen=True, tag="write_pages"):
    """See `Devices.write_pages`."""

    updates: Values

    def run(self, devices: Devices) -> None:
        devices.write_pages(self.updates)


class WriteSlot(msgspec.Struct, array_like=True, frozen=True, tag="write_slot"):
    """See `Devices.write_slot`."""

    slot: int
    row: dict[str, Values]

    def run(self, devices: Devices) -> None:
        devices.write_slot(self.slot, self.row)


class WriteAdapter(msgspec.Struct, array_like=True, frozen=True, tag="write_adapter"):
    """The factors of an adapter themselves: only the scheduling process needs its files."""

    slot: int
    values: dict[str, Values]

    def run(self, devices: Devices) -> None:
        devices.write_adapter(self.slot, self.values)


class DropState(msgspec.Struct, array_like=True, frozen=True, tag="drop_state"):
    """See `Devices.drop_state`."""

    def run(self, devices: Devices) -> None:
        devices.drop_state()


class RenewState(msgspec.Struct, array_like=True, frozen=True, tag="renew_state"):
    """See `Devices.renew_state`."""

    def run(self, devices: Devices) -> None:
        devices.renew_state()


class PutAwayWeights(msgspec.Struct, array_like=True, frozen=True, tag="put_away_weights"):
    """See `Devices.put_away_weights`."""

    keep: bool

    def run(self, devices: Devices) -> None:
        devices.put_away_weights(keep=self.keep)


class BringBackWeights(msgspec.Struct, array_like=True, frozen=True, tag="bring_back_weights"):
    """See `Devices.bring_back_weights`."""

    def run(self, devices: Devices) -> bool:
        return devices.bring_back_weights()


class StartProfile(msgspec.Struct, array_like=True, frozen=True, tag="start_profile"):
    """Record a profile; each process writes its own."""

    folder: str

    def run(self, devices: Devices) -> None:
        jax.profiler.start_trace(self.folder)


class StopProfile(msgspec.Struct, array_like=True, frozen=True, tag="stop_profile"):
    """Write what was recorded."""

    def run(self, devices: Devices) -> None:
        jax.profiler.stop_trace()


ORDERS = (
    Step
    | Forward
    | Draw
    | Draft
    | CopyPages
    | WritePages
    | WriteSlot
    | WriteAdapter
    | DropState
    | RenewState
    | PutAwayWeights
    | BringBackWeights
    | StartProfile
    | StopProfile
)
