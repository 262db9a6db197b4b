"""The page pool as a state machine: whatever is asked of it, every page is blank, idle or used by whom a test says."""

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jax_engine.kv_cache.block_pool import BlockPool

NUM_PAGES = 12
CONTENTS = [bytes([number]) for number in range(8)]  # few, so that equal ones meet


class PoolMachine(RuleBasedStateMachine):
    """A model of the pool that keeps what each page holds, and who uses it."""

    num_partitions = 1

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_PAGES, self.num_partitions)
        self.held: list[list[int]] = []
        self.content: dict[int, bytes] = {}  # of pages that may be found
        self.idle: list[int] = []  # least recently used first

    def partition_of(self, page: int) -> int:
        return page * self.num_partitions // NUM_PAGES

    @rule(count=st.integers(0, NUM_PAGES), partition=st.integers(0, 2))
    def allocate(self, count: int, partition: int) -> None:
        partition %= self.num_partitions
        if count > self.pool.num_free_in(partition):
            return
        idle = [page for page in self.idle if self.partition_of(page) == partition]
        num_blank = self.pool.num_free_in(partition) - len(idle)
        pages = self.pool.allocate(count, partition)
        assert len(pages) == count and {self.partition_of(page) for page in pages} <= {partition}
        evicted = idle[: max(0, count - num_blank)]
        assert pages[count - len(evicted) :] == evicted, "the least recently used go, and only they"
        for page in evicted:
            del self.content[page]
            self.idle.remove(page)
        self.held.append(pages)

    @rule(data=st.data(), content=st.sampled_from(CONTENTS))
    def register(self, data: st.DataObject, content: bytes) -> None:
        own = [page for pages in self.held for page in pages if page not in self.content]
        if own:
            page = data.draw(st.sampled_from(own))
            self.pool.register(page, content)
            if (self.partition_of(page), content) not in self.known():
                self.content[page] = content

    def known(self) -> dict[tuple[int, bytes], int]:
        return {(self.partition_of(page), content): page for page, content in self.content.items()}

    @rule(
        contents=st.lists(st.sampled_from(CONTENTS), min_size=1, max_size=4, unique=True), partition=st.integers(0, 2)
    )
    def share(self, contents: list[bytes], partition: int) -> None:
        partition %= self.num_partitions
        pages = [page for content in contents if (page := self.pool.find(content, partition)) is not None]
        assert set(self.pool.idle(pages)) == set(pages) & set(self.idle)
        self.pool.share(pages)
        self.idle = [page for page in self.idle if page not in pages]
        self.held.append(pages)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.pool.free(pages)
            used = self.users()
            self.idle += [page for page in reversed(pages) if page in self.content and not used[page]]

    @rule()
    def reset(self) -> None:
        done = self.pool.reset()
        assert done == (not self.users())
        if done:
            self.content.clear()
            self.idle.clear()

    def users(self) -> Counter[int]:
        return Counter(page for pages in self.held for page in pages)

    @invariant()
    def every_page_is_used_idle_or_blank(self) -> None:
        users = self.users()
        assert self.pool._counts == [users[page] for page in range(NUM_PAGES)]
        for number, partition in enumerate(self.pool._partitions):
            assert list(partition.idle) == [page for page in self.idle if self.partition_of(page) == number]
        blank = [page for partition in self.pool._partitions for page in partition.blank]
        assert sorted([*users, *self.idle, *blank]) == list(range(NUM_PAGES))
        assert self.pool.num_in_use == len(users)
        assert self.pool.num_free == NUM_PAGES - len(users)

    @invariant()
    def a_page_is_written_by_its_only_user_before_it_is_known(self) -> None:
        for page, count in self.users().items():
            assert self.pool.is_writable(page) == (count == 1 and page not in self.content)

    @invariant()
    def a_page_is_found_by_its_content_alone(self) -> None:
        known = self.known()
        for place in itertools.product(range(self.num_partitions), CONTENTS):
            assert self.pool.find(place[1], place[0]) == known.get(place)


class CutPoolMachine(PoolMachine):
    num_partitions = 3


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
CutPoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool, TestCutPool = PoolMachine.TestCase, CutPoolMachine.TestCase


def test_the_oldest_sequence_goes_first_and_its_tail_before_its_head():
    pool = BlockPool(6)
    first, second = pool.allocate(3), pool.allocate(3)
    for page in (*first, *second):
        pool.register(page, bytes([page]))
    pool.free(first)
    pool.free(second)
    assert pool.allocate(4) == [*reversed(first), second[2]]
    assert [pool.find(bytes([page])) for page in second] == [*second[:2], None]


def test_more_than_there_is_is_a_defect_of_the_caller():
    with pytest.raises(AssertionError, match="13 pages asked for, 12 free"):
        BlockPool(NUM_PAGES).allocate(13)


def test_freeing_a_page_twice_is_a_defect_of_the_caller():
    pool = BlockPool(NUM_PAGES)
    pages = pool.allocate(2)
    pool.free(pages)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(pages)
