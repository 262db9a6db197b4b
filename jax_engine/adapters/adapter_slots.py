"""Which adapters are on the device, and who waits for a place there.

A running request holds its adapter's slot; a slot that nobody holds keeps its adapter until another needs it, the least
recently used first. So a step never has more adapters than there are slots.

Requests that cannot have a slot are set aside, which lets those pass whose adapter is there, and those without one.
That alone could keep them waiting forever: so for each adapter that is waited for, one slot is drained. Requests less
urgent than the one that waits do not join those that hold it, who end at some time.
"""

from collections.abc import Callable, Collection

from jax_engine.core.messages import CoreOutput
from jax_engine.lora_request import LoRARequest
from jax_engine.scheduling.request import Request, Urgency
from jax_engine.scheduling.waiting_queue import WaitingQueue


class AdapterSlots:
    """The slots, and the requests that wait for one. Mutable; owned by the `Scheduler`.

    `fetch` says whether an adapter is ready to be written into a slot, and sees to it that it will be, or raises a
    ValueError. Until then its requests wait, and others pass.
    """

    def __init__(self, num_slots: int, fetch: Callable[[LoRARequest], bool]) -> None:
        self._fetch = fetch
        self._adapters: list[LoRARequest | None] = [None] * num_slots
        self._num_users = [0] * num_slots
        self._last_used = [0] * num_slots
        self._clock = 0
        self._slot_of: dict[LoRARequest, int] = {}
        self._drained_for: dict[int, Urgency] = {}
        self._waiting: dict[LoRARequest, WaitingQueue] = {}
        self._loads: list[tuple[int, LoRARequest]] = []
        self._failed: list[CoreOutput] = []

    @property
    def num_slots(self) -> int:
        return len(self._adapters)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def waiting_names(self) -> set[str]:
        """Of the adapters that requests wait for."""
        return {lora.lora_name for lora in self._waiting}

    def begin_step(self) -> list[Request]:
        """Look again at who waits: those whose adapter may have a slot now, and from whom on slots are drained."""
        self._drained_for.clear()
        if not self._waiting:
            return []
        released: list[Request] = []
        idle = self._num_users.count(0)
        joined: set[int] = set()  # slots that more urgent ones are about to hold
        for urgency, lora in sorted((_most_urgent(queue), lora) for lora, queue in self._waiting.items()):
            slot = self._slot_of.get(lora)
            if slot is not None and slot not in self._drained_for:
                obtainable = True
            else:
                obtainable = slot is None and idle > 0
                idle -= obtainable
            if obtainable:
                if slot is not None:
                    joined.add(slot)
                released += self._waiting.pop(lora)
            elif slot is None:
                self._drain(urgency, joined)
        return released

    def admits(self, request: Request) -> bool:
        """Whether a request that is to start can have the slot of its adapter, or needs none.

        Else it is set aside until it can; or it ends with an error, since the adapter cannot be used.
        """
        try:
            is_available = self._is_available(request)
        except ValueError as error:
            request.finish_reason = "error"
            self._failed.append(CoreOutput(request.asked.request_id, [], "error", error=str(error)))
            return False
        if not is_available:
            self._set_aside(request)
        return is_available

    def take_failed(self) -> list[CoreOutput]:
        """What is to be told of requests that ended since their adapters cannot be used."""
        failed, self._failed = self._failed, []
        return failed

    def take(self, request: Request) -> None:
        """Give a request that starts the slot of its adapter, which `admits` it."""
        lora = request.asked.lora
        if lora is None:
            return
        slot = self._slot_of.get(lora)
        if slot is None:
            idle = (slot for slot, users in enumerate(self._num_users) if not users)
            slot = min(idle, key=lambda slot: self._last_used[slot])
            self._put(slot, lora)
        self._num_users[slot] += 1
        self._clock += 1
        self._last_used[slot] = self._clock
        request.adapter_slot = slot

    def release(self, request: Request) -> None:
        """A request has stopped running."""
        if request.asked.lora is not None:
            self._num_users[request.adapter_slot] -= 1

    def discard(self, request: Request) -> bool:
        """Forget a request that ends; whether it was set aside."""
        lora = request.asked.lora
        queue = None if lora is None else self._waiting.get(lora)
        if lora is None or queue is None or request not in queue:
            return False
        queue.remove(request)
        if not queue:
            del self._waiting[lora]
        return True

    def forget(self, lora: LoRARequest) -> None:
        """Make an adapter's slot the first to be given away."""
        slot = self._slot_of.get(lora)
        if slot is not None and not self._num_users[slot]:
            self._adapters[slot] = None
            self._last_used[slot] = 0
            del self._slot_of[lora]

    def forget_all(self) -> None:
        """No adapter is on the device any more. No request may hold one."""
        assert not any(self._num_users)
        self._adapters = [None] * len(self._adapters)
        self._slot_of.clear()

    def take_loads(self) -> list[tuple[int, LoRARequest]]:
        """(slot, adapter) of all that must be on the device before the step that was planned."""
        loads, self._loads = dict(self._loads), []  # the last one of a slot
        return list(loads.items())

    def _is_available(self, request: Request) -> bool:
        lora = request.asked.lora
        if lora is None:
            return True
        slot = self._slot_of.get(lora)
        if slot is None:
            if 0 not in self._num_users:
                return False
            return self._fetch(lora)
        return self._num_users[slot] == 0 or request.urgency <= self._drained_for.get(slot, request.urgency)

    def _set_aside(self, request: Request) -> None:
        lora = request.asked.lora
        assert lora is not None
        if lora not in self._waiting and lora not in self._slot_of and 0 not in self._num_users:
            self._drain(request.urgency)
        self._waiting.setdefault(lora, WaitingQueue()).add(request)

    def _drain(self, urgency: Urgency, left_out: Collection[int] = ()) -> None:
        """Let no less urgent request join the users of one more slot, that with the fewest."""
        busy = [slot for slot, users in enumerate(self._num_users) if users and slot not in left_out]
        busy = [slot for slot in busy if slot not in self._drained_for]
        if busy:
            self._drained_for[min(busy, key=self._num_users.__getitem__)] = urgency

    def _put(self, slot: int, lora: LoRARequest) -> None:
        before = self._adapters[slot]
        if before is not None:
            del self._slot_of[before]
        self._adapters[slot] = lora
        self._slot_of[lora] = slot
        self._loads.append((slot, lora))


def _most_urgent(queue: WaitingQueue) -> Urgency:
    first = queue.first()
    assert first is not None
    return first.urgency
