"""Pages in partitions: where each comes from, who waits for which, and who gives way."""

import pytest
from plans import asked, finish, limits, ranges, tokens_of
from tiny_engine import core_request

from jax_engine.kv_cache.page_partitions import UNCUT, PagePartitions
from jax_engine.scheduling.scheduler import Scheduler

STRIPED, OWNED = PagePartitions(3, striped=True), PagePartitions(3)


@pytest.mark.parametrize("rule", [UNCUT, STRIPED, OWNED], ids=["uncut", "striped", "owned"])
@pytest.mark.parametrize("owner", [0, 2])
def test_counts_are_those_of_going_through_the_pages(rule, owner):
    owner %= rule.count
    for first in range(7):
        for end in range(first, first + 9):
            lying = [rule.of(owner, index) for index in range(first, end)]
            assert rule.split(owner, first, end) == [lying.count(number) for number in range(rule.count)]
        free = [4, 7, 5][: rule.count]
        reach = rule.num_in_reach(owner, first, free, 2)
        fits = [
            all(2 * n <= room for n, room in zip(rule.split(owner, first, first + count), free, strict=True))
            for count in range(20)
        ]
        assert reach == fits.index(False) - 1


def start_of(scheduler: Scheduler) -> dict[str, int]:
    """The partition in which each running request has its first page."""
    size = scheduler.limits.num_pages // scheduler.limits.partitions.count
    return {request.asked.request_id: request.pages[0] // size for request in scheduler.running}


def test_a_sequence_goes_where_its_prefix_is_and_else_where_most_pages_are_free():
    scheduler = Scheduler(limits(num_pages=12, partitions=OWNED))
    for name, tokens in {"a": range(9), "b": range(100, 105), "c": range(200, 203)}.items():
        scheduler.add(core_request(name, list(tokens), 9))
    scheduler.schedule()
    assert start_of(scheduler) == {"a": 0, "b": 1, "c": 2}
    scheduler.add(core_request("like b", [*range(100, 104), 7], 9))
    scheduler.add(core_request("like none", [7, 8], 9))
    scheduler.schedule()
    assert start_of(scheduler) == {"a": 0, "b": 1, "c": 2, "like b": 1}
    assert scheduler.requests["like b"].num_cached_tokens == 4


def test_what_finds_its_prefix_in_a_full_partition_starts_in_another():
    scheduler = Scheduler(limits(num_pages=6, max_num_seqs=8, partitions=PagePartitions(2)))
    scheduler.add(core_request("a", list(range(11)), 1))
    finish(scheduler)
    scheduler.add(core_request("again", [*range(8), 50, 51, 52], 9))
    scheduler.schedule()
    scheduler.add(core_request("and again", [*range(8), 60, 61, 62], 9))
    assert ranges(scheduler.schedule())[-1] == ("and again", 0, 11)
    assert start_of(scheduler) == {"again": 0, "and again": 1}


def test_nobody_gives_way_whose_pages_are_elsewhere():
    """Two partitions of two pages; sequences of one page take turns in them. The first one needs a second page."""
    scheduler = Scheduler(limits(num_pages=4, partitions=PagePartitions(2)))
    for name in "abcd":
        scheduler.add(asked(name, 3, 9))
    for step in (scheduler.schedule(), scheduler.schedule()):
        scheduler.commit(step, tokens_of(step))
    assert start_of(scheduler) == {"a": 0, "b": 1, "c": 0, "d": 1}
    plan = scheduler.schedule()
    assert ranges(plan) == [("a", 4, 1), ("b", 4, 1)]
    assert (list(start_of(scheduler)), scheduler.num_preemptions) == (["a", "b"], 2)
    scheduler.abort(["b"])
    scheduler.commit(plan, tokens_of(plan))
    assert start_of(scheduler) == {"a": 0}
    scheduler.schedule()
    assert start_of(scheduler) == {"a": 0, "c": 1}, "c has five tokens by now, and both pages of partition 1"


def test_a_shortage_in_one_partition_keeps_nobody_out_of_another():
    scheduler = Scheduler(limits(num_pages=6, token_budget=32, partitions=PagePartitions(2)))
    for name, length in {"a": 5, "b": 9, "c": 3}.items():
        scheduler.add(asked(name, length, 9))
    for _ in range(2):
        plan = scheduler.schedule()
        scheduler.commit(plan, tokens_of(plan))
    assert start_of(scheduler) == {"a": 0, "b": 1, "c": 0}
    scheduler.abort(["b"])
    scheduler.add(asked("new", 3, 9))
    assert ranges(scheduler.schedule()) == [("a", 6, 1), ("new", 0, 3)], "c waits for a page in its place"
    assert start_of(scheduler) == {"a": 0, "c": 0, "new": 1}


def test_striped_pages_take_turns_and_a_sequence_may_have_all():
    scheduler = Scheduler(limits(num_pages=6, token_budget=32, partitions=STRIPED))
    scheduler.add(asked("a", 23, 1))
    scheduler.schedule()
    (request,) = scheduler.running
    assert [page // 2 for page in request.pages] == [0, 1, 2, 0, 1, 2]
    assert not any(scheduler.cache.pool.free_in_each())


def test_a_short_sequence_has_no_page_in_most_stripes():
    scheduler = Scheduler(limits(num_pages=6, partitions=STRIPED))
    scheduler.add(asked("a", 5, 1))
    scheduler.schedule()
    (request,) = scheduler.running
    assert [scheduler.cache.holds_in(request, number) for number in range(3)] == [True, True, False]
    assert scheduler.cache.own_pages(request) == [1, 1, 0]
