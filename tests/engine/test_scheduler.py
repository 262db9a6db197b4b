"""The scheduler alone, without a device: budgets, order, preemption, and that nothing is lost whatever happens."""

import subprocess
import sys
import time

import pytest
from fake_device import FakeDevice, check_pages
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import RandomProposer, asked, finish, limits, ranges, token_at, tokens_of
from tiny_engine import core_request

from jax_engine.config import SCHEDULING_POLICIES
from jax_engine.core.messages import CoreOutput
from jax_engine.kv_cache.page_partitions import UNCUT, PagePartitions
from jax_engine.scheduling.request import Request
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import StepPlan


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
    (output,) = scheduler.commit(plan, [[5]])
    assert (output.new_token_ids, output.finish_reason) == ([5], "length")
    assert not scheduler.has_work
    assert scheduler.cache.pool.num_in_use == 0


def test_a_stop_seen_one_step_late_yields_nothing_after_it():
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 3, 10, stop_token_ids=(9,)))
    first = scheduler.schedule()
    second = scheduler.schedule()
    (output,) = scheduler.commit(first, [[9]])
    assert (output.finish_reason, output.stop_reason) == ("stop", 9)
    assert scheduler.commit(second, [[4]]) == []
    assert scheduler.cache.pool.num_in_use == 0


@pytest.mark.parametrize(("min_tokens", "reason"), [(0, "stop"), (1, "stop"), (2, None)])
def test_a_stop_before_min_tokens_does_not_end_it(min_tokens, reason):
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 3, 10, eos_token_ids=(9,), min_tokens=min_tokens))
    (output,) = scheduler.commit(scheduler.schedule(), [[9]])
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
        scheduler.commit(plan, [[1]])
    scheduler.abort(["a", "never seen"])
    assert not scheduler.has_work
    assert scheduler.cache.pool.num_in_use == 0
    assert scheduler.finished == {"abort": 1}
    if when == "launched":
        assert scheduler.commit(plan, [[1]]) == []


@settings(max_examples=300, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=10),
    num_pages=st.integers(8, 20),
    budget=st.integers(4, 24),
    aborts=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=3),
    arrivals=st.lists(st.integers(0, 12), min_size=10, max_size=10),
    num_host_pages=st.one_of(st.none(), st.integers(0, 12)),  # None: no prefix caching
    num_prompts=st.integers(1, 10),
    grouped=st.booleans(),
    policy=st.sampled_from(SCHEDULING_POLICIES),
    priorities=st.lists(st.integers(-1, 1), min_size=10, max_size=10),
    cut=st.sampled_from([0, 0, 3, None]),
    stops=st.lists(st.integers(0, 20), min_size=10, max_size=10),
    max_steps=st.sampled_from([1, 3, 8]),
    windows=st.sampled_from([(0,), (0,), (0, 5), (6,), (0, 0, 9), (0, 1, 4, 4), (3, 7)]),
    drafts=st.one_of(st.none(), st.randoms(use_true_random=False)),
    partitions=st.sampled_from(
        [UNCUT, UNCUT, *(PagePartitions(n, striped) for n in (2, 3) for striped in (False, True))]
    ),
)
def test_whatever_the_pressure_each_request_gets_its_own_tokens(
    sizes,
    num_pages,
    budget,
    aborts,
    arrivals,
    num_host_pages,
    num_prompts,
    grouped,
    policy,
    priorities,
    cut,
    stops,
    max_steps,
    windows,
    drafts,
    partitions,
):
    """Random arrivals, aborts, stops and page shortage under every policy, one step run ahead throughout, in steps of
    one token and of several, or with drafts, right and wrong; prompts begin alike or not, are a group's or not, cut
    (None: not) or not; pages in partitions or not, each just large enough.
    """
    prompts = {"enable_chunked_prefill": cut is not None, "long_prefill_token_threshold": cut or 0}
    pages = pages_for(windows, num_pages, num_host_pages, partitions)
    budget += 28 * (cut is None)  # the longest sequence has 32 tokens
    prompts["step_sizes"] = (*range(1, budget, 3), budget) if budget % 2 else ()
    scheduler = Scheduler(limits(token_budget=budget, policy=policy, **pages, **prompts))
    if drafts:
        max_steps, scheduler.drafts = 1, RandomProposer(scheduler, drafts).drafts
    if grouped:
        lengths = [num_prompt for num_prompt, _ in sizes]
        sizes = [(lengths[index % num_prompts % len(sizes)], limit) for index, (_, limit) in enumerate(sizes)]
    device = FakeDevice(scheduler.limits, num_undone=3 * len(windows) * (drafts is not None))
    expected = {f"r{index}": size for index, size in enumerate(sizes)}
    gone = {f"r{index}" for _, index in aborts}
    outputs, reasons = ({name: [] for name in expected} for _ in range(2))
    plan = None
    for step in range(600):
        for index, (num_prompt, max_tokens) in enumerate(sizes):
            if arrivals[index] == step:
                prompt = [1000 + index % num_prompts, *range(1, num_prompt)]
                fields = {"arrival_time": step / 500, "priority": priorities[index] if policy == "priority" else 0}
                fields["prompt_group"] = f"g{index % num_prompts}" if grouped else None
                fields["stop_token_ids"] = (token_at(f"r{index}", num_prompt + stops[index]),)
                scheduler.add(core_request(f"r{index}", prompt, max_tokens, **fields))
        scheduler.abort([f"r{index}" for when, index in aborts if when == step])
        plan, committed = next_step(scheduler, device, plan, max_steps)
        for output in committed:
            outputs[output.request_id] += output.new_token_ids
            reasons[output.request_id] += [output.finish_reason] if output.finish_reason else []
        if step > 12 and plan is None and not scheduler.has_work:
            break
    assert not scheduler.has_work and not scheduler.cache.pool.num_in_use, "work or pages were left"
    assert (scheduler.groups.num_held, scheduler.groups._groups) == (0, {})
    for (name, (num_prompt, max_tokens)), stop in zip(expected.items(), stops, strict=False):
        whole = [token_at(name, num_prompt + offset) for offset in range(min(max_tokens, stop + 1))]
        reason = "stop" if stop < max_tokens else "length"
        cut_short = name in gone and outputs[name] == whole[: len(outputs[name])]
        assert cut_short or (outputs[name], reasons[name]) == (whole, [reason])


def next_step(
    scheduler: Scheduler, device: FakeDevice, previous: StepPlan | None, max_steps: int
) -> tuple[StepPlan | None, list[CoreOutput]]:
    """Plan and run a step, ahead of the one before it unless that has drafts or the new one wants some."""
    waits = previous is not None and (previous.waits_for_host or scheduler.wants_drafts())
    committed = scheduler.commit(previous, tokens_of(previous)) if waits else []
    plan = checked_plan(scheduler, max_steps, can_draft=waits or previous is None)
    if plan is not None:
        check_pages(scheduler, max_steps)
        device.run(plan)
    if previous is not None and not waits:
        committed = scheduler.commit(previous, tokens_of(previous))
    return plan, committed


def pages_for(
    windows: tuple[int, ...], num_pages: int, num_host_pages: int | None, partitions: PagePartitions
) -> dict[str, object]:
    """Limits for so many pages a cache group, which each owner has, and in host memory; None: no prefix caching."""
    rows = -(-num_pages // partitions.count) if partitions.striped else num_pages
    sizes = {
        "num_pages": rows * partitions.count * len(windows),
        "num_host_pages": (num_host_pages or 0) * len(windows),
    }
    rules = {"partitions": partitions, "windows": windows}
    return sizes | rules | {"enable_prefix_caching": num_host_pages is not None}


def checked_plan(scheduler: Scheduler, max_steps: int, *, can_draft: bool) -> StepPlan | None:
    """The next plan: within its limits, with every decode in it that has a page, and nobody in it gave way or was the
    most urgent.
    """
    decoding = [request for request in scheduler.running if request.num_uncomputed == 1]
    most_urgent = min(scheduler.requests.values(), key=lambda request: request.urgency, default=None)
    was_running = most_urgent is not None and most_urgent.slot >= 0
    plan = scheduler.schedule(max_steps, can_draft=can_draft)
    assert not was_running or most_urgent.slot >= 0, "the most urgent request was preempted"
    chunks = plan.chunks if plan else ()
    assert not plan or plan.num_steps <= max_steps
    scheduled = {id(chunk.request) for chunk in chunks}
    for request in decoding:
        assert id(request) in scheduled or request.slot < 0 or scheduler.cache.room(request) == 0
    assert len(scheduled) == len(chunks)
    assert sum(chunk.length for chunk in chunks) <= scheduler.limits.token_budget
    for chunk in chunks:
        assert chunk.request.slot == chunk.slot, "a request of this step gave way in it"
        assert chunk.num_draws or scheduler.limits.enable_chunked_prefill
        assert chunk.drafts or chunk.length <= (scheduler.limits.long_prefill_token_threshold or chunk.length)
    return plan


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (30, 28)])
def test_the_longest_prefix_of_full_pages_is_taken_but_never_the_last_token(length, cached):
    scheduler = Scheduler(limits())
    for name in "ab":
        scheduler.add(core_request(name, list(range(length)), 1))
        found = finish(scheduler)
    assert found == {"b": cached}
    assert (scheduler.cache.counters.queries, scheduler.cache.counters.hits) == (2 * length, cached)
    assert scheduler.num_prompt_tokens == 2 * length - cached
    assert scheduler.cache.pool.num_in_use == 0


def test_generated_tokens_are_found_by_the_next_turn():
    scheduler = Scheduler(limits())
    scheduler.add(core_request("a", [1, 2, 3], 12))
    finish(scheduler)
    turn = [1, 2, 3, *(token_at("a", position) for position in range(3, 15))]
    # The last token that was drawn never was computed: 14 tokens of 15 are in pages, 12 of them in full ones.
    scheduler.add(core_request("b", [*turn, 7, 7], 1))
    assert finish(scheduler) == {"b": 12}


def test_a_page_is_shared_by_later_steps_than_the_one_that_fills_it():
    scheduler = Scheduler(limits(token_budget=64))
    prompt = list(range(12))
    for name in "ab":
        scheduler.add(core_request(name, prompt, 9))
    first = scheduler.schedule()
    assert ranges(first) == [("a", 0, 12), ("b", 0, 12)], "nothing is there yet"
    scheduler.add(core_request("c", prompt, 9))
    second = scheduler.schedule()  # the first runs before it, though its tokens are not known
    assert ranges(second) == [("a", 12, 1), ("b", 12, 1), ("c", 8, 4)]
    assert second.chunks[2].new_pages[:2] == scheduler.requests["a"].pages[:2]
    assert (second.chunks[2].first_new_page, len(second.chunks[2].new_pages)) == (0, 3)


@pytest.mark.parametrize(("salt", "cached"), [("one", 8), ("two", 0), (None, 0)])
def test_pages_are_shared_within_one_salt_only(salt, cached):
    scheduler = Scheduler(limits())
    scheduler.add(core_request("a", list(range(10)), 1, cache_salt="one"))
    finish(scheduler)
    scheduler.add(core_request("b", list(range(10)), 1, cache_salt=salt))
    assert finish(scheduler) == {"b": cached}


@pytest.mark.parametrize(("algorithm", "size"), [("sha256", 32), ("xxhash", 16)])
def test_prefixes_are_found_by_either_hash(algorithm, size):
    scheduler = Scheduler(limits(hash_algorithm=algorithm))
    for name, salt, cached in (("a", "one", 0), ("b", "one", 8), ("c", "two", 0), ("d", None, 0), ("e", None, 8)):
        scheduler.add(core_request(name, list(range(10)), 1, cache_salt=salt))
        assert finish(scheduler) == {name: cached}
    assert {len(page_hash) for page_hash in scheduler.cache.pool._partitions[0].known} == {size}


def test_a_page_counts_with_all_that_comes_before_it():
    scheduler = Scheduler(limits())
    scheduler.add(core_request("a", [1, 2, 3, 4, 5, 6, 7, 8, 9], 1))
    finish(scheduler)
    scheduler.add(core_request("b", [0, 2, 3, 4, 5, 6, 7, 8, 9], 1))
    assert finish(scheduler) == {"b": 0}


def test_a_preempted_request_finds_its_own_pages():
    scheduler = Scheduler(limits(num_pages=5))
    scheduler.add(asked("a", 9, 4))
    scheduler.add(asked("b", 7, 2))
    plans = [scheduler.schedule()]
    assert ranges(plans[0]) == [("a", 0, 9), ("b", 0, 7)]
    plans.append(scheduler.schedule())
    scheduler.abort(["b"])
    scheduler.commit(plans[0], tokens_of(plans[0]))
    request = scheduler.requests["a"]
    scheduler._preempt(request)
    scheduler.commit(plans[1], tokens_of(plans[1]))
    assert ranges(scheduler.schedule()) == [("a", 8, 3)]


def test_cached_pages_that_nobody_uses_are_room_only_once():
    """Of two free pages, both are what the waiting prompt begins with: none is left for the rest of it."""
    scheduler = Scheduler(limits(num_pages=4))
    scheduler.add(core_request("a", list(range(9)), 1))
    finish(scheduler)
    scheduler.add(asked("b", 5, 2))
    plan = scheduler.schedule()
    scheduler.add(core_request("c", list(range(9)), 1))
    ahead = scheduler.schedule()
    assert (ranges(ahead), scheduler.cache.pool.num_free) == ([("b", 5, 1)], 2)
    for step in (plan, ahead):
        scheduler.commit(step, tokens_of(step))
    assert ranges(scheduler.schedule()) == [("c", 8, 1)]


def test_a_reset_waits_for_running_requests():
    scheduler = Scheduler(limits())
    scheduler.add(asked("a", 9, 1))
    plan = scheduler.schedule()
    assert not scheduler.cache.reset()
    scheduler.commit(plan, tokens_of(plan))
    scheduler.add(asked("a", 9, 1))
    assert finish(scheduler) == {"a": 8}, "a refused reset forgets nothing"
    assert scheduler.cache.reset()
    scheduler.add(asked("a", 9, 1))
    assert finish(scheduler) == {"a": 0}


def test_switched_off_nothing_is_looked_up_or_shared():
    scheduler = Scheduler(limits(enable_prefix_caching=False))
    for _ in range(2):
        scheduler.add(asked("a", 9, 1))
        assert finish(scheduler) == {"a": 0}
    assert (scheduler.cache.counters.queries, scheduler.cache.counters.hits) == (0, 0)


def test_hashing_is_linear_in_the_length():
    """A prompt of a million tokens, and then a thousand more one at a time: no token is hashed twice."""
    page_size = 16
    request = Request(core_request("a", list(range(1_000_000)), 2000), order=0)
    start = time.process_time()
    for _ in range(1000):
        request.append(1)
        request.page_hash(len(request.tokens) // page_size - 1, page_size)
    assert time.process_time() - start < 10, "about a second; hashing all again each time takes many minutes"


def test_scheduling_needs_no_jax():
    code = "import sys, jax_engine.scheduling.scheduler, jax_engine.kv_cache.block_pool; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
