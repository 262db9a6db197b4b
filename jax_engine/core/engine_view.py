"""What the engine core shows of itself to whoever looks: pages, requests and the latest steps.

Nothing of it is made until it is asked for, but one short record a step.
"""

import itertools
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from jax_engine.core.stats import EngineStats

if TYPE_CHECKING:
    from jax_engine.kv_cache.block_pool import BlockPool
    from jax_engine.scheduling.request import Request
    from jax_engine.scheduling.scheduler import Scheduler
    from jax_engine.scheduling.step_plan import Chunk

NUM_STEPS = 100  # latest ones that are kept
NUM_REQUESTS = 20  # of those that run and of those that wait
NUM_CELLS = 512  # of the map of pages, at most
PAGES_LOOKED_AT = 8  # of a cell, at most: a map of any number of pages takes the same time

PageCounts = tuple[int, int, int, int]  # pages with one user, with several, that hold a known prefix for none, blank


class StepRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One step: when its tokens came, how long after those before, and what its token rows held."""

    number: int  # from 1
    ended: float  # time.monotonic() of the core
    seconds: float
    num_sequences: int
    prefill_tokens: int
    decode_tokens: int
    draft_tokens: int
    padding: int


class RequestView(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One sequence, as far as it has come."""

    request_id: str
    num_prompt: int
    num_computed: int  # tokens, of the prompt and then of the output
    num_output: int
    num_pages: int
    seconds: float  # since it arrived
    num_preemptions: int = 0
    priority: int = 0
    adapter: str | None = None


class EngineView(msgspec.Struct, array_like=True, frozen=True, tag="engine_view"):
    """The engine at one moment; answers an `Inspect`."""

    stats: EngineStats
    time: float  # time.monotonic() of the core
    max_num_seqs: int
    is_sleeping: bool
    num_cached_pages: int  # of those that are free: they hold a known prefix
    pages_per_cell: int
    is_sampled: bool  # a cell's counts are of some of its pages
    cells: list[PageCounts]
    running: list[RequestView]  # the most urgent of them
    waiting: list[RequestView]  # likewise, nearly
    steps: list[StepRecord]  # the oldest first


class StepLog:
    """The latest steps. Mutable; owned by the engine core.

    A step costs it a few comparisons and one short tuple, however many sequences are in it: `records` does the rest.
    """

    def __init__(self) -> None:
        # Time, seconds, sequences, decodes, drafts; then rows and padding of all steps so far.
        self._latest: deque[tuple[float, float, int, int, int, int, int]] = deque(maxlen=NUM_STEPS + 1)
        self._latest.append((0.0, 0.0, 0, 0, 0, 0, 0))
        self._count = 0

    def add(
        self, chunks: Sequence["Chunk"], *, ended: float, seconds: float, draft_rows: int, rows: int, padding: int
    ) -> None:
        """Take note of a step that has run: `chunks` in the order of its rows, those of one token first; `rows` and
        `padding` as counted up to it.
        """
        num_decodes = bisect_left(chunks, 2, key=lambda chunk: chunk.length)
        num_drafts = 0
        if draft_rows:
            num_drafts = sum(len(chunk.drafts) for chunk in chunks)
            num_decodes += sum(bool(chunk.drafts) for chunk in chunks)
        self._latest.append((ended, seconds, len(chunks), num_decodes, num_drafts, rows, padding))
        self._count += 1

    def records(self) -> list[StepRecord]:
        """The latest steps, the oldest first."""
        found: list[StepRecord] = []
        pairs = list(self._latest)
        for before, (ended, seconds, sequences, decodes, drafts, rows, padding) in itertools.pairwise(pairs):
            step_padding = padding - before[-1]
            tokens = rows - before[-2] - step_padding
            if sequences == decodes:  # each may have drawn several tokens
                decodes = tokens - drafts
            number = self._count - len(pairs) + 2 + len(found)
            prefill = tokens - decodes - drafts
            found.append(StepRecord(number, ended, seconds, sequences, prefill, decodes, drafts, step_padding))
        return found


def page_map(pool: "BlockPool") -> tuple[int, list[PageCounts]]:
    """How many pages a cell of the map stands for, and the cells."""
    size = max(1, -(-pool.num_pages // NUM_CELLS))
    stride = -(-size // PAGES_LOOKED_AT)
    cells = range(0, pool.num_pages, size)
    return size, [pool.count_states(slice(first, first + size, stride)) for first in cells]


def view_of(scheduler: "Scheduler", stats: EngineStats, steps: StepLog, *, is_sleeping: bool) -> EngineView:
    """The engine as it is now; takes the same time for any number of pages and of requests that wait."""
    now, pool = time.monotonic(), scheduler.cache.pool
    size, cells = page_map(pool)
    running, waiting = scheduler.running[:NUM_REQUESTS], scheduler.waiting.some(NUM_REQUESTS)
    return EngineView(
        stats=stats,
        time=now,
        max_num_seqs=scheduler.limits.max_num_seqs,
        is_sleeping=is_sleeping,
        num_cached_pages=pool.num_cached,
        pages_per_cell=size,
        is_sampled=size > PAGES_LOOKED_AT,
        cells=cells,
        running=[request_view(request, now) for request in running],
        waiting=[request_view(request, now) for request in waiting],
        steps=steps.records(),
    )


def request_view(request: "Request", now: float) -> RequestView:
    """A request as it is by now."""
    asked = request.asked
    return RequestView(
        request_id=asked.request_id,
        num_prompt=request.num_prompt,
        num_computed=request.num_computed,
        num_output=len(request.tokens) - request.num_prompt,
        num_pages=len(request.pages),
        seconds=now - asked.arrival_time,
        num_preemptions=request.num_preemptions,
        priority=asked.priority,
        adapter=asked.lora.lora_name if asked.lora is not None else None,
    )
