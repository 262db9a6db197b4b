"""The page pool as a state machine: whatever is asked of it, every page is free or has one owner."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from jax_engine.block_pool import BlockPool

NUM_PAGES = 12


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_PAGES)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, NUM_PAGES))
    def allocate(self, count: int) -> None:
        if count <= self.pool.num_free:
            pages = self.pool.allocate(count)
            assert len(pages) == count
            self.held.append(pages)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.held:
            index = data.draw(st.integers(0, len(self.held) - 1))
            self.pool.free(self.held.pop(index))

    @invariant()
    def every_page_has_one_place(self) -> None:
        owned = [page for pages in self.held for page in pages]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(NUM_PAGES))
        assert self.pool.num_in_use == len(owned)
        assert self.pool.num_free == NUM_PAGES - len(owned)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_more_than_there_is_is_a_defect_of_the_caller():
    with pytest.raises(AssertionError, match="13 pages asked for, 12 free"):
        BlockPool(NUM_PAGES).allocate(13)
