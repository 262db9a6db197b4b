"""The scheduler alone, without a device: budgets, order, preemption, and that nothing is lost whatever happens."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import core_request

from jax_engine.messages import CoreRequest
from jax_engine.scheduler import Scheduler, SchedulerLimits, StepPlan


def limits(**changes: int) -> SchedulerLimits:
    return SchedulerLimits(
        **({"num_pages": 64, "page_size": 4, "max_num_seqs": 4, "token_budget": 16, "watermark": 0.0} | changes)
    )


def asked(name: str, num_prompt: int, max_tokens: int, **fields: object) -> CoreRequest:
    return core_request(name, list(range(num_prompt)), max_tokens, **fields)


def ranges(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    return [(chunk.request.asked.request_id, chunk.start, chunk.length) for chunk in plan.chunks] if plan else []


def token_at(request_id: str, position: int) -> int:
    """The token that this test's model says stands at a position: a pure function, as a real greedy model is."""
    return (sum(map(ord, request_id)) * 31 + position * 7) % 1000


def tokens_of(plan: StepPlan) -> list[int]:
    return [token_at(chunk.request.asked.request_id, chunk.start + chunk.length) for chunk in plan.chunks]


def test_a_prompt_longer_than_the_budget_is_cut_and_decodes_go_on():
    scheduler = Scheduler(limits())
    scheduler.add(asked("short", 3, 10))
    plan = scheduler.schedule()
    assert ranges(plan) == [("short", 0, 3)]
    scheduler.add(asked("long", 40, 2))
    ahead = scheduler.schedule()  # before the first step's token is known
    assert ranges(ahead) == [("short", 3, 1), ("long", 0, 15)]
    scheduler.commit(plan, tokens_of(plan))
    assert ranges(scheduler.schedule()) == [("short", 4, 1), ("long", 15, 15)]


def test_requests_join_in_order_of_arrival_while_slots_last():
    scheduler = Scheduler(limits(max_num_seqs=2))
    for name in "abc":
        scheduler.add(asked(name, 2, 1))
    plan = scheduler.schedule()
    assert [name for name, *_ in ranges(plan)] == ["a", "b"]
    scheduler.commit(plan, tokens_of(plan))
    assert [name for name, *_ in ranges(scheduler.schedule())] == ["c"]


def test_the_last_token_it_may_have_is_not_run_past():
    """A request whose last token is on its way is in no further step."""
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 3, 1))
    plan = scheduler.schedule()
    assert scheduler.schedule() is None
    (output,) = scheduler.commit(plan, [5])
    assert (output.new_token_ids, output.finish_reason) == ([5], "length")
    assert not scheduler.has_work
    assert scheduler.pool.num_in_use == 0


def test_a_stop_seen_one_step_late_yields_nothing_after_it():
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 3, 10, stop_token_ids=(9,)))
    first = scheduler.schedule()
    second = scheduler.schedule()
    (output,) = scheduler.commit(first, [9])
    assert (output.finish_reason, output.stop_reason) == ("stop", 9)
    assert scheduler.commit(second, [4]) == []
    assert scheduler.pool.num_in_use == 0


@pytest.mark.parametrize(("min_tokens", "reason"), [(0, "stop"), (1, "stop"), (2, None)])
def test_a_stop_before_min_tokens_does_not_end_it(min_tokens, reason):
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 3, 10, eos_token_ids=(9,), min_tokens=min_tokens))
    (output,) = scheduler.commit(scheduler.schedule(), [9])
    assert output.finish_reason == reason
    assert output.stop_reason is None


def test_pages_run_out_and_the_latest_arrival_gives_way_then_returns_before_others():
    scheduler = Scheduler(limits(num_pages=4))  # 16 tokens
    scheduler.add(asked("a", 7, 5))
    scheduler.add(asked("b", 7, 5))
    scheduler.add(asked("c", 4, 1))
    plans = [scheduler.schedule()]
    assert ranges(plans[0]) == [("a", 0, 7), ("b", 0, 7)]
    plans.append(scheduler.schedule())
    scheduler.commit(plans[0], tokens_of(plans[0]))
    third = scheduler.schedule()  # a needs a page for its 9th token
    assert ranges(third) == [("a", 8, 1)]
    assert [request.asked.request_id for request in scheduler.waiting] == ["b", "c"]
    assert scheduler.num_preemptions == 1
    scheduler.commit(plans[1], tokens_of(plans[1]))  # b's token of the step it was in still counts
    assert len(scheduler.requests["b"].tokens) == 9


@pytest.mark.parametrize("when", ["waiting", "launched", "committed"])
def test_an_abort_frees_everything(when):
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 5, 9))
    plan = None if when == "waiting" else scheduler.schedule()
    if when == "committed":
        scheduler.commit(plan, [1])
    scheduler.abort(["a", "never seen"])
    assert not scheduler.has_work
    assert scheduler.pool.num_in_use == 0
    assert scheduler.finished == {"abort": 1}
    if when == "launched":
        assert scheduler.commit(plan, [1]) == []


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=10),
    num_pages=st.integers(8, 20),
    budget=st.integers(4, 24),
    aborts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=3),
    arrivals=st.lists(st.integers(0, 12), min_size=10, max_size=10),
)
def test_whatever_the_pressure_each_request_gets_its_own_tokens(sizes, num_pages, budget, aborts, arrivals):
    """Random arrivals, aborts and page shortage, one step run ahead throughout, as the engine does it."""
    scheduler = Scheduler(limits(num_pages=num_pages, token_budget=budget))
    expected = {f"r{index}": size for index, size in enumerate(sizes)}
    gone = {f"r{index}" for _, index in aborts}
    outputs: dict[str, list[int]] = {name: [] for name in expected}
    reasons: dict[str, list[str]] = {name: [] for name in expected}
    previous = None
    for step in range(600):
        for index, (num_prompt, max_tokens) in enumerate(sizes):
            if arrivals[index] == step:
                scheduler.add(asked(f"r{index}", num_prompt, max_tokens))
        scheduler.abort([f"r{index}" for when, index in aborts if when == step])
        plan = scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= budget
            check_pages(scheduler)
        if previous is not None:
            for output in scheduler.commit(previous, tokens_of(previous)):
                outputs[output.request_id] += output.new_token_ids
                reasons[output.request_id] += [output.finish_reason] if output.finish_reason else []
        previous = plan
        if step > 12 and plan is None and not scheduler.has_work:
            break
    assert not scheduler.has_work, "work was left undone"
    assert scheduler.pool.num_in_use == 0
    for name, (num_prompt, max_tokens) in expected.items():
        whole = [token_at(name, num_prompt + offset) for offset in range(max_tokens)]
        assert outputs[name] == whole[: len(outputs[name])]
        if name not in gone:
            assert outputs[name] == whole
            assert reasons[name] == ["length"]


def check_pages(scheduler: Scheduler) -> None:
    """Every running request has just the pages its tokens need, none shared."""
    owned = [page for request in scheduler.running for page in request.pages]
    assert len(owned) == len(set(owned)) == scheduler.pool.num_in_use
    for request in scheduler.running:
        assert len(request.pages) == -(-request.num_computed // scheduler.limits.page_size)


def test_scheduling_needs_no_jax():
    code = "import sys, jax_engine.scheduler, jax_engine.block_pool; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
