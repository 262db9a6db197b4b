"""Which adapters are on the device: never more than there are slots, and nobody waits for one forever."""

from itertools import count

import numpy as np
import pytest
from tiny_engine import core_request

from jax_engine.adapters.adapter_slots import AdapterSlots
from jax_engine.core.messages import CoreRequest
from jax_engine.lora_request import LoRARequest
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import SchedulerLimits, StepPlan


def lora(number: int) -> LoRARequest:
    return LoRARequest(f"adapter {number}", number, f"/adapters/{number}")


def request(name: str, number: int | None, max_tokens: int = 4, **fields: object) -> CoreRequest:
    return core_request(name, [1, 2, 3], max_tokens, lora=None if number is None else lora(number), **fields)


class Device:
    """A scheduler and the slots of its device, as the plans leave them."""

    def __init__(self, num_slots: int, *, max_num_seqs: int = 4, num_pages: int = 64, **limits: object) -> None:
        self.broken: set[LoRARequest] = set()
        self.on_disk: set[LoRARequest] = set()  # and being read
        sizes = SchedulerLimits(num_pages, 4, max_num_seqs, 16, **limits)
        self.scheduler = Scheduler(sizes, adapters=AdapterSlots(num_slots, self.fetch))
        self.slots: list[LoRARequest | None] = [None] * num_slots
        self.num_loads = 0
        self.started: list[str] = []
        self.failed: list[str] = []

    def fetch(self, adapter: LoRARequest) -> bool:
        if adapter in self.broken:
            raise ValueError(f"{adapter.lora_name} is broken")
        return adapter not in self.on_disk

    def add(self, *requests: CoreRequest) -> None:
        for asked in requests:
            self.scheduler.add(asked)

    def step(self) -> StepPlan | None:
        """Plan a step, check what its rows find in their slots, and draw a token for each."""
        plan = self.scheduler.schedule()
        self.failed += [output.request_id for output in self.scheduler.adapters.take_failed()]
        if plan is None:
            return None
        for slot, adapter in plan.adapter_loads:
            self.slots[slot] = adapter
            self.num_loads += 1
        for chunk in plan.chunks:
            adapter, name = chunk.request.asked.lora, chunk.request.asked.request_id
            assert adapter is None or self.slots[chunk.request.adapter_slot] == adapter
            if name not in self.started:
                self.started.append(name)
        self.scheduler.commit(plan, [[7] * chunk.num_draws for chunk in plan.chunks])
        return plan

    def run(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work:
                return
            self.step()
        raise AssertionError("a request waits forever")


def test_a_request_whose_adapter_has_no_slot_waits_while_others_pass():
    device = Device(1)
    device.add(request("a", 1), request("b", 2), request("plain", None))
    device.step()
    assert device.started == ["a", "plain"]
    assert device.scheduler.num_waiting == 1
    device.run()
    assert device.started == ["a", "plain", "b"]


def test_an_adapter_that_is_used_all_the_time_gives_its_slot_to_one_that_waits():
    """Requests that came after the one that waits do not join the adapter's users, whose number would never be zero."""
    device, names = Device(1), count()
    device.add(request("first", 1, 6))
    device.step()
    device.add(request("other", 2))
    for _ in range(40):
        device.add(request(f"late {next(names)}", 1, 6))
        device.step()
    assert device.started[:2] == ["first", "other"]
    device.run()


def test_requests_that_came_before_the_one_that_waits_still_join():
    device = Device(1, max_num_seqs=2)
    device.add(request("one", 1, 4), request("two", 1, 8), request("three", 1, 8), request("other", 2))
    device.run()
    assert device.started == ["one", "two", "three", "other"]


def test_adapters_stay_until_others_need_their_slots_the_least_recently_used_first():
    device = Device(2)
    for number in (1, 2, 1, 3, 1):
        device.add(request(f"{device.num_loads} {number} {len(device.started)}", number))
        device.run()
    assert device.num_loads == 3  # the third one took the place of the second
    assert set(device.slots) == {lora(1), lora(3)}


def test_while_an_adapter_is_read_others_take_the_slots():
    device = Device(1)
    device.on_disk.add(lora(1))
    device.add(request("a", 1), request("b", 2), request("plain", None))
    device.step()
    assert device.started == ["b", "plain"]
    device.on_disk.clear()
    device.run()
    assert device.started == ["b", "plain", "a"]


def test_a_request_whose_adapter_is_being_read_can_be_aborted():
    device = Device(1)
    device.on_disk.add(lora(1))
    device.add(request("a", 1))
    assert device.step() is None
    device.scheduler.abort(["a"])
    assert not device.scheduler.has_work
    device.add(request("b", 2))
    device.run()
    assert device.started == ["b"]


def test_an_adapter_that_cannot_be_used_fails_its_requests_alone():
    device = Device(1)
    device.broken.add(lora(2))
    device.add(request("broken", 2), request("fine", 1), request("also broken", 2))
    device.run()
    assert sorted(device.failed) == ["also broken", "broken"]
    assert device.started == ["fine"]


@pytest.mark.parametrize("victim", ["waits", "runs"])
def test_aborted_requests_leave_no_trace(victim):
    device = Device(1)
    device.add(request("runs", 1, 50), request("waits", 2), request("last", 3))
    device.step()
    device.scheduler.abort([victim])
    device.run()
    assert [name for name in ("runs", "waits", "last") if name in device.started] == [
        name for name in ("runs", "waits", "last") if name != victim or victim == "runs"
    ]
    assert device.scheduler.num_waiting == 0


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_ends_with_no_more_adapters_in_a_step_than_slots(seed):
    """Short of pages, so that requests give way, with priorities, aborts and adapters that some requests share."""
    rng = np.random.default_rng(seed)
    num_slots = int(rng.integers(1, 4))
    device = Device(num_slots, num_pages=10, policy=["fcfs", "priority"][seed % 2])
    names = []
    for index in range(60):
        number = int(rng.integers(0, 6)) or None
        priority = int(rng.integers(0, 3)) if seed % 2 else 0
        names.append(f"request {index}")
        device.add(request(names[-1], number, int(rng.integers(1, 12)), priority=priority))
        if rng.random() < 0.1:
            device.scheduler.abort([str(rng.choice(names))])
        for _ in range(int(rng.integers(0, 4))):
            plan = device.step()
            if plan is not None:
                used = {chunk.request.asked.lora for chunk in plan.chunks} - {None}
                assert len(used) <= num_slots
    device.run()
    assert device.scheduler.adapters._num_users == [0] * num_slots


def test_prefixes_are_shared_only_among_requests_of_one_adapter():
    prompt = list(range(12))
    device = Device(2, max_num_seqs=1)
    for name, number, salt in (("a", 1, None), ("b", 2, None), ("plain", None, None), ("salted", 1, "x")):
        device.add(core_request(name, prompt, 1, lora=number and lora(number), cache_salt=salt))
    device.add(core_request("again", prompt, 1, lora=lora(1)))
    found = {}
    while device.scheduler.has_work:
        plan = device.step()
        assert plan is not None
        for chunk in plan.chunks:
            found[chunk.request.asked.request_id] = chunk.request.num_cached_tokens
    assert found == {"a": 0, "b": 0, "plain": 0, "salted": 0, "again": 8}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("", 1, "p"), "lora_name='' must be"),
        (("a", 0, "p"), "lora_int_id=0 must be"),
        (("a", True, "p"), "lora_int_id=True must be"),
        (("a", 1, ""), "lora_path='' must be"),
    ],
)
def test_a_request_for_an_adapter_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRARequest(*fields)
