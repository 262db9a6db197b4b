"""Completions of one prompt: one of them computes it, the others share its pages and copy what they write."""

import pytest
from plans import asked, finish, limits, ranges, tokens_of
from tiny_engine import core_request, run_requests

from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import CoreRequest
from jax_engine.scheduling.scheduler import Scheduler

PROMPT = list(range(1, 11))  # two pages of four tokens and a half


def completions(count: int, max_tokens: int = 8, **fields: object) -> list[CoreRequest]:
    return [core_request(f"c{index}", PROMPT, max_tokens, prompt_group="g", **fields) for index in range(count)]


def scheduler_with(requests: list[CoreRequest], **changes: int) -> Scheduler:
    scheduler = Scheduler(limits(**changes))
    for request in requests:
        scheduler.add(request)
    return scheduler


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
def test_one_computes_the_prompt_and_the_rest_only_its_last_token(caching):
    scheduler = scheduler_with(completions(4), enable_prefix_caching=caching, token_budget=8)
    scheduler.add(asked("behind", 2, 1))
    first = scheduler.schedule()
    assert ranges(first) == [("c0", 0, 8)]
    second = scheduler.schedule()  # those behind the held ones go on
    assert ranges(second) == [("c0", 8, 2), ("behind", 0, 2)]
    assert (scheduler.num_waiting, len(scheduler.waiting)) == (3, 0)
    third = scheduler.schedule()
    assert ranges(third) == [("c0", 10, 1), *((f"c{index}", 9, 1) for index in (1, 2))]
    leader, *others = scheduler.running[:3]
    assert all(other.pages[:2] == leader.pages[:2] for other in others)
    assert third.copies.copies == [(leader.pages[2], other.pages[2]) for other in others]
    for plan in (first, second, third):
        scheduler.commit(plan, tokens_of(plan))
    fourth = scheduler.schedule()
    assert ranges(fourth)[-1] == ("c3", 9, 1)
    assert scheduler.num_prompt_tokens == len(PROMPT) + 3 + 2
    assert scheduler.cache.pool.num_in_use == 2 + 4, "two that all share and one for each"
    finish(scheduler, fourth)
    assert scheduler.cache.pool.num_in_use == 0
    assert scheduler.cache.counters.copied_pages == 3


@pytest.mark.parametrize("length", [1, 2, 4, 5, 8, 9])
def test_prompts_of_any_length_are_shared(length):
    requests = [core_request(f"c{index}", PROMPT[:length], 3, prompt_group="g") for index in range(3)]
    scheduler = scheduler_with(requests)
    finish(scheduler)
    assert scheduler.num_prompt_tokens == length + 2
    assert scheduler.cache.counters.copied_pages == 2 * ((length - 1) % 4 != 0)


@pytest.mark.parametrize("when", ["before it starts", "in its prompt"])
def test_if_the_first_leaves_another_computes_the_prompt(when):
    scheduler = scheduler_with(completions(3), token_budget=8)
    if when == "in its prompt":
        scheduler.schedule()
    scheduler.abort(["c0"])
    given = {"before it starts": ("c1", 0, 8), "in its prompt": ("c1", 8, 2)}[when]  # full pages are known by now
    plan = scheduler.schedule()
    assert ranges(plan) == [given]
    finish(scheduler, plan)
    assert (scheduler.num_waiting, scheduler.cache.pool.num_in_use) == (0, 0)


def test_a_held_request_can_leave():
    scheduler = scheduler_with(completions(3))
    scheduler.schedule()
    scheduler.abort(["c1"])
    assert scheduler.num_waiting == 1
    assert ranges(scheduler.schedule()) == [("c0", 10, 1), ("c2", 9, 1)]
    scheduler.abort(["c0", "c2"])
    assert not scheduler.has_work


def test_more_than_run_at_once_share_with_those_that_still_do():
    scheduler = scheduler_with(completions(8), enable_prefix_caching=False, max_num_seqs=4)
    finish(scheduler)
    assert scheduler.num_prompt_tokens == len(PROMPT) + 7


def test_when_all_that_had_the_prompt_are_gone_one_begins_again():
    scheduler = scheduler_with(completions(8), enable_prefix_caching=False, max_num_seqs=4)
    scheduler.schedule()
    scheduler.schedule()
    assert len(scheduler.running) == 4
    scheduler.abort([f"c{index}" for index in range(4)])
    finish(scheduler)
    assert scheduler.num_prompt_tokens == 2 * (len(PROMPT) + 3)


def test_preempted_together_they_begin_again_with_one():
    """What the first had computed before counts no more: the other waits until it is there again."""
    scheduler = scheduler_with(completions(2), enable_prefix_caching=False)
    for _ in range(3):
        plan = scheduler.schedule()
        scheduler.commit(plan, tokens_of(plan))
    for request in reversed(scheduler.running.copy()):
        scheduler._preempt(request)
    plan = scheduler.schedule()
    assert ranges(plan) == [("c0", 0, 13)]
    ahead = scheduler.schedule()
    assert ranges(ahead) == [("c0", 13, 1), ("c1", 10, 2)]
    scheduler.commit(plan, tokens_of(plan))
    finish(scheduler, ahead)
    assert scheduler.cache.pool.num_in_use == 0


def test_tokens_are_those_of_requests_that_share_nothing(core: InProcessCore):
    """On a real model, seeded: each with its own key, in a group and alone; the prompt ends within a page."""
    prompt = [(5 * k) % 100 for k in range(45)]

    def requests(group: str | None) -> list[CoreRequest]:
        return [
            core_request(
                f"{group}{index}", prompt, 20, prompt_group=group, prng_key=(index, 1), temperature=1.0,
                cache_salt=f"{group}{index}" if group is None else None,
            )
            for index in range(6)
        ]  # fmt: skip

    alone = list(run_requests(core, requests(None)).values())
    before = core.stats()
    assert list(run_requests(core, requests("g")).values()) == alone
    after = core.stats()
    assert after.prompt_tokens_total - before.prompt_tokens_total == len(prompt) + 5
    assert after.copied_pages_total - before.copied_pages_total == 5
    assert len(set(map(tuple, alone))) == 6
