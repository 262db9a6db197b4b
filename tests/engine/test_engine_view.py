"""What the core shows of itself adds up, and looking costs no more however large it is."""

import asyncio
import time

import pytest
from plans import asked
from tiny_engine import core_request

from jax_engine.core.core_client import EngineDeadError
from jax_engine.core.engine_view import NUM_CELLS, NUM_STEPS, PAGES_LOOKED_AT, EngineView, StepLog, page_map
from jax_engine.core.messages import Add, Inspect
from jax_engine.core.stats import EngineStats
from jax_engine.core.view_client import ViewClient
from jax_engine.kv_cache.block_pool import BlockPool
from jax_engine.scheduling.request import Request
from jax_engine.scheduling.step_plan import Chunk
from jax_engine.scheduling.waiting_queue import WaitingQueue


def test_the_steps_account_for_every_row(make_core):
    core = make_core(num_scheduler_steps=1)._core
    before = core.handle(Inspect()).stats
    lengths = [5, 17, 40, 70]
    requests = [core_request(f"r{i}", list(range(1 + i, 1 + i + n)), 6) for i, n in enumerate(lengths)]
    core.handle(Add(requests))
    busiest = core.handle(Inspect())
    while core.has_work:
        core.step()
        busiest = max(busiest, core.handle(Inspect()), key=lambda view: len(view.running))
    view = core.handle(Inspect())
    after, steps = view.stats, view.steps
    assert len(steps) == after.steps_total - before.steps_total < NUM_STEPS
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert sum(step.prefill_tokens for step in steps) == after.prompt_tokens_total == sum(lengths)
    assert sum(step.decode_tokens for step in steps) == after.generation_tokens_total - len(lengths)
    assert sum(step.padding for step in steps) == after.padding_tokens_total
    assert [step.ended for step in steps] == sorted(step.ended for step in steps)
    assert len(busiest.running) == len(lengths) and busiest.stats.num_pages_in_use
    shown = {request.request_id: request for request in busiest.running}
    assert {name: request.num_prompt for name, request in shown.items()} == {f"r{i}": n for i, n in enumerate(lengths)}
    assert sum(map(sum, busiest.cells)) == busiest.stats.num_pages
    assert sum(own + shared for own, shared, _, _ in busiest.cells) == busiest.stats.num_pages_in_use


@pytest.mark.parametrize("drafts", [(), (7, 8)])
def test_drafts_and_loops_are_told_from_prompts(drafts):
    log = StepLog()
    request = Request(asked("a", 4, 9), 0)
    one = Chunk(request, 0, 4, 1, 1, 0, [])
    many = Chunk(request, 1, 4, 1 + len(drafts), 1 + len(drafts), 0, [], drafts=drafts)
    log.add([one, many], ended=1.0, seconds=0.1, draft_rows=len(drafts), rows=8, padding=2)
    (step,) = log.records()
    assert (step.draft_tokens, step.prefill_tokens) == (len(drafts), 0)
    assert step.decode_tokens == 8 - 2 - len(drafts)
    for number in range(2 * NUM_STEPS):
        log.add([one], ended=float(number), seconds=0.1, draft_rows=0, rows=9 + number, padding=2)
    assert [step.number for step in log.records()] == list(range(2 + NUM_STEPS, 2 + 2 * NUM_STEPS))


def test_a_map_tells_the_states_of_pages_apart():
    pool = BlockPool(6)
    own, shared, cached = (pool.allocate(1) for _ in range(3))
    pool.share(shared)
    pool.register(cached[0], b"known")
    pool.free(cached)
    assert page_map(pool) == (1, [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), *[(0, 0, 0, 1)] * 3])
    assert pool.num_cached == 1
    pool.free(own)
    assert page_map(pool)[1][0] == (0, 0, 0, 1)


def test_a_map_of_many_pages_looks_at_some():
    for num_pages in (NUM_CELLS, NUM_CELLS + 1, 100_003):
        size, cells = page_map(BlockPool(num_pages))
        assert NUM_CELLS / 2 < len(cells) <= NUM_CELLS and len(cells) * size >= num_pages
        assert all(0 < sum(cell) <= PAGES_LOOKED_AT for cell in cells)


def test_some_who_wait_are_shown_the_most_urgent_first():
    queue = WaitingQueue()
    requests = [Request(asked(f"r{order}", 2, 2), order, urgency=(0.0, order)) for order in range(3000)]
    for request in reversed(requests):
        queue.add(request)
    queue.remove(requests[0])
    shown = queue.some(20)
    assert len(shown) == 20 and shown[0] is requests[1]
    assert shown == sorted(shown, key=lambda request: request.urgency)


async def test_who_look_at_once_share_a_view_and_learn_of_the_end():
    sent = []
    views = ViewClient(sent.append)
    looks = [asyncio.create_task(views.latest()) for _ in range(5)]
    await asyncio.sleep(0)
    looks[0].cancel()
    view = EngineView(EngineStats(), time.monotonic(), 1, False, 0, 1, False, [], [], [], [])
    views.take(view)
    assert await asyncio.gather(*looks[1:]) == [view] * 4
    assert sent == [Inspect()]
    views.fail("out of memory")
    with pytest.raises(EngineDeadError, match="out of memory"):
        await views.latest()
