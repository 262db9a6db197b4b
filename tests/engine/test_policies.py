"""Who runs first, who gives way, and what a long prompt may do to the others: the scheduler without a device."""

import time
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import asked, finish, limits, ranges, tokens_of
from tiny_engine import core_request

from jax_engine.config import SCHEDULING_POLICIES, EngineConfig
from jax_engine.scheduling.page_claims import PageClaims
from jax_engine.scheduling.request import Request
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.waiting_queue import AGING_TOKENS_PER_SECOND, POLICIES, WaitingQueue


def waiting(scheduler: Scheduler) -> list[str]:
    return [request.asked.request_id for request in scheduler.waiting]


def running(scheduler: Scheduler) -> list[str]:
    return [request.asked.request_id for request in scheduler.running]


def step(scheduler: Scheduler) -> list[tuple[str, int, int]]:
    """Schedule and commit a step; its ranges."""
    plan = scheduler.schedule()
    if plan is not None:
        scheduler.commit(plan, tokens_of(plan))
    return ranges(plan)


def queued(name: str, urgency: tuple[float, int]) -> Request:
    request = Request(core_request(name, [1]), order=urgency[1])
    request.urgency = urgency
    return request


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "add", "pop", "remove"]), st.integers(0, 20)), max_size=120))
def test_the_queue_is_a_sorted_list_that_is_quick(operations):
    queue, expected, orders = WaitingQueue(), [], count()
    for operation, number in operations:
        if operation == "add":
            order = next(orders)
            expected.append(queued(f"r{order}", (number, order)))
            queue.add(expected[-1])
        elif expected:
            gone = expected[number % len(expected)]
            if operation == "pop":
                gone = min(expected, key=lambda request: request.urgency)
                assert queue.first() is gone
            queue.remove(gone)
            expected.remove(gone)
            if number % 2:  # it returns, as a preempted request does
                queue.add(gone)
                expected.append(gone)
        assert len(queue) == len(expected)
    assert list(queue) == sorted(expected, key=lambda request: request.urgency)
    assert len(queue._heap) <= 2 * len(expected) + 8, "those taken out of the middle are forgotten in time"


def test_a_hundred_thousand_waiting_requests_are_aborted_at_once():
    scheduler = Scheduler(limits(policy="priority"))
    names = [f"r{index}" for index in range(100_000)]
    start = time.process_time()
    for index, name in enumerate(names):
        scheduler.add(core_request(name, [1], priority=index * 7919 % 1000))
    scheduler.abort(names)
    assert not scheduler.has_work
    assert time.process_time() - start < 20, "about a second; looking through the queue for each takes many minutes"


def test_the_settings_name_every_policy():
    assert tuple(POLICIES) == SCHEDULING_POLICIES


def test_the_lowest_priority_number_runs_first_and_equals_as_they_come():
    scheduler = Scheduler(limits(policy="priority", max_num_seqs=1))
    for name, priority in {"a": 1, "b": 0, "c": -3, "d": 0}.items():
        scheduler.add(asked(name, 3, 1, priority=priority))
    assert [step(scheduler)[0][0] for _ in range(4)] == ["c", "b", "d", "a"]


def test_an_urgent_request_takes_the_slot_of_the_lowest_and_cheapest():
    scheduler = Scheduler(limits(policy="priority", max_num_seqs=3, token_budget=32))
    for name, num_prompt, priority in [("a", 3, 1), ("b", 9, 2), ("c", 5, 2)]:
        scheduler.add(asked(name, num_prompt, 9, priority=priority))
    step(scheduler)
    scheduler.add(asked("same", 3, 9, priority=2))
    step(scheduler)
    assert running(scheduler) == ["a", "b", "c"], "an equal takes nothing"
    scheduler.add(asked("urgent", 3, 9, priority=0))
    assert step(scheduler) == [("urgent", 0, 3), ("a", 4, 1), ("b", 10, 1)]
    assert waiting(scheduler) == ["c", "same"]
    assert scheduler.requests["c"].num_preemptions == 1
    assert scheduler.num_preemptions == 1


def test_a_budget_of_next_tokens_alone_does_not_keep_an_urgent_request_out():
    scheduler = Scheduler(limits(policy="priority", max_num_seqs=4, token_budget=4))
    for name in "abcd":
        scheduler.add(asked(name, 1, 9, priority=1))
    step(scheduler)
    scheduler.add(asked("urgent", 5, 9))
    assert step(scheduler) == [("urgent", 0, 1), ("a", 1, 1), ("b", 1, 1), ("c", 1, 1)]


def test_an_urgent_request_takes_pages_but_not_in_vain():
    scheduler = Scheduler(limits(policy="priority", num_pages=6))
    scheduler.add(asked("first", 9, 9, priority=0))  # three pages
    scheduler.add(asked("low", 4, 9, priority=5))  # one, then two
    step(scheduler)
    step(scheduler)
    scheduler.add(asked("large", 16, 9, priority=1))  # four; one is free and "low" has two
    step(scheduler)
    assert (running(scheduler), waiting(scheduler)) == (["first", "low"], ["large"])
    scheduler.abort(["large"])
    scheduler.add(asked("small", 9, 9, priority=1))  # three
    step(scheduler)
    assert (running(scheduler), waiting(scheduler)) == (["first", "small"], ["low"])


def test_an_urgent_prompt_has_the_budget_before_the_chunks_of_others():
    scheduler = Scheduler(limits(policy="priority"))
    scheduler.add(asked("long", 60, 2, priority=1))
    step(scheduler)
    scheduler.add(asked("urgent", 10, 2, priority=0))
    assert step(scheduler) == [("urgent", 0, 10), ("long", 16, 6)]


@pytest.mark.parametrize(
    ("lengths", "num_pages", "victim"), [((7, 3), 5, "c"), ((3, 7), 5, "b"), ((3, 3), 4, "c"), ((2, 3), 4, "b")]
)
def test_the_later_request_that_loses_least_gives_way(lengths, num_pages, victim):
    scheduler = Scheduler(limits(num_pages=num_pages, token_budget=32))
    scheduler.add(asked("a", 8, 9))
    for name, length in zip("bc", lengths, strict=True):
        scheduler.add(asked(name, length, 9))
    step(scheduler)
    step(scheduler)
    assert waiting(scheduler) == [victim]
    assert running(scheduler) == [name for name in "abc" if name != victim]


def test_who_has_given_way_does_not_return_in_the_same_step():
    scheduler = Scheduler(limits(num_pages=6, long_prefill_token_threshold=4, enable_prefix_caching=False))
    for name, length in {"a": 8, "b": 5, "c": 9}.items():
        scheduler.add(asked(name, length, 9))
    step(scheduler)
    assert step(scheduler) == [("a", 4, 4), ("b", 4, 1), ("c", 4, 4)]
    assert step(scheduler) == [("a", 8, 1), ("c", 8, 1)], "b left two pages, and one would do for its first chunk"
    assert waiting(scheduler) == ["b"]


def test_pages_that_others_share_cost_nothing_to_leave():
    scheduler = Scheduler(limits(num_pages=16, token_budget=64))
    prompt = list(range(16))
    scheduler.add(core_request("first", prompt, 30))
    step(scheduler)
    scheduler.add(core_request("sharing", [*prompt, 5], 30))
    scheduler.add(asked("alone", 6, 30))
    step(scheduler)
    claims = PageClaims(scheduler.cache, reserve=0)
    cost = {name: claims.cost(request) for name, request in scheduler.requests.items()}
    assert cost == {"first": 17 - 16, "sharing": 17 - 16, "alone": 6}
    own = {name: sum(scheduler.cache.own_pages(request)) for name, request in scheduler.requests.items()}
    assert own == {"first": 1, "sharing": 1, "alone": 2}


def test_the_last_in_line_waits_for_a_page_in_its_place():
    """It keeps what it has until somebody more urgent needs that; to give way to nobody would only lose work."""
    scheduler = Scheduler(limits(num_pages=4))
    scheduler.add(asked("a", 6, 3))
    scheduler.add(asked("b", 8, 4))
    assert step(scheduler) == [("a", 0, 6), ("b", 0, 8)]
    scheduler.add(asked("c", 1, 1))
    assert step(scheduler) == [("a", 6, 1)]
    assert (running(scheduler), waiting(scheduler)) == (["a", "b"], ["c"])
    assert step(scheduler) == [("a", 7, 1)]
    assert step(scheduler) == [("b", 8, 1), ("c", 0, 1)]
    assert scheduler.num_preemptions == 0


def test_the_shortest_prompt_runs_first():
    scheduler = Scheduler(limits(policy="sjf", max_num_seqs=1))
    for name, length in {"long": 12, "middle": 7, "short": 2}.items():
        scheduler.add(asked(name, length, 1))
    assert [step(scheduler)[0][0] for _ in range(3)] == ["short", "middle", "long"]


def test_a_long_prompt_is_passed_for_a_bounded_time_only():
    """One slot, a long prompt, and for ever a shorter one that comes just when the slot is free."""
    length, short = 50, 10
    scheduler = Scheduler(limits(policy="sjf", max_num_seqs=1, token_budget=64))
    scheduler.add(asked("long", length, 1, arrival_time=0.0))
    passed = []
    for index in count():
        arrival = index * 0.001
        scheduler.add(asked(f"s{index}", short, 1, arrival_time=arrival))
        ((name, _, _),) = step(scheduler)
        if name == "long":
            break
        passed.append(arrival)
    assert len(passed) == length - short, "as many milliseconds as it is longer, at 1,000 tokens a second"
    assert max(passed) < length / AGING_TOKENS_PER_SECOND


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_decodes_go_on_in_every_step_whatever_is_prefilled(policy):
    scheduler = Scheduler(limits(policy=policy, num_pages=200, max_num_seqs=6, token_budget=8))
    for name in "abc":
        scheduler.add(asked(name, 2, 40))
    step(scheduler)
    for name in "xyz":
        scheduler.add(asked(name, 90, 1))
    for position in range(2, 30):
        lengths = {name: length for name, _, length in step(scheduler)}
        assert {name: lengths[name] for name in "abc"} == dict.fromkeys("abc", 1)
        assert sum(lengths.values()) == 8, "what decodes leave of the budget is spent on prompts"
        assert scheduler.requests["a"].num_computed == position + 1


def test_a_short_prompt_behind_a_long_one_starts_at_once_below_the_threshold():
    for threshold, start in {0: 6, 12: 0}.items():
        scheduler = Scheduler(limits(long_prefill_token_threshold=threshold))
        scheduler.add(asked("long", 16 * 6, 2))
        scheduler.add(asked("short", 4, 2))
        steps = [dict.fromkeys(name for name, *_ in step(scheduler)) for _ in range(7)]
        assert min(index for index, names in enumerate(steps) if "short" in names) == start


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_it():
    scheduler = Scheduler(limits(enable_chunked_prefill=False))
    scheduler.add(asked("a", 3, 4))
    scheduler.add(asked("b", 15, 2))
    scheduler.add(asked("c", 1, 1))
    assert step(scheduler) == [("a", 0, 3)], "13 tokens are left, and b has 15; c comes after it"
    assert step(scheduler) == [("a", 3, 1), ("b", 0, 15)]
    assert step(scheduler) == [("a", 4, 1), ("b", 15, 1), ("c", 0, 1)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheduling_policy": "random"}, "scheduling_policy='random' must be one of fcfs, priority, sjf"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold=-1 must be a whole number"),
        ({"enable_chunked_prefill": None}, "enable_chunked_prefill=None must be true or false"),
        (
            {"enable_chunked_prefill": False, "long_prefill_token_threshold": 8},
            "long_prefill_token_threshold=8 cuts prompts, and enable_chunked_prefill=False keeps them whole; drop one",
        ),
        (
            {"enable_chunked_prefill": False, "max_model_len": 600},
            "max_num_batched_tokens=512 is less than max_model_len=600; raise max_num_batched_tokens to 600, lower",
        ),
        ({"max_num_queued_reqs": 0}, "max_num_queued_reqs=0 must be a whole number"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**given)


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_everyone_ends_though_pages_are_for_two(policy):
    scheduler = Scheduler(limits(policy=policy, num_pages=8))
    for index in range(12):
        priority = index % 3 if policy == "priority" else 0
        scheduler.add(asked(f"r{index}", 4 + index, 16 - index, priority=priority, arrival_time=index / 1000))
    finish(scheduler)
    assert scheduler.finished == {"length": 12}
    assert scheduler.num_preemptions > 0
