"""Continuous batching: which tokens of which requests the next step computes.

There is no prefill or decode mode. A step is a list of token ranges: a running request's next token, a chunk of a
prompt, or a preempted request's tokens once more. Iteration-level scheduling is that of Orca (Yu et al., OSDI 2022);
chunks under one budget, decodes first, that of Sarathi-Serve (Agrawal et al. 2024, arXiv 2403.02310).
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jax_engine.block_pool import BlockPool
from jax_engine.messages import CoreOutput, CoreRequest
from jax_engine.request import Request


@dataclass(frozen=True, slots=True)
class Chunk:
    """A range of one request's tokens, `start` to `start + length`, and the pages it is the first to need."""

    request: Request
    slot: int
    start: int
    length: int
    samples: bool  # the range reaches the request's last token: the step draws the next one
    first_new_page: int  # index in the request's block table; 0 when the request has just taken its slot
    new_pages: list[int]  # those that enter the block table, cached ones included


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    chunks: Sequence[Chunk]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes that the memory plan and the configuration set."""

    num_pages: int
    page_size: int
    max_num_seqs: int
    token_budget: int
    watermark: float = (
        0.01  # share of the pages that admission leaves to running requests, so that it does not preempt at once
    )
    enable_prefix_caching: bool = True


class Scheduler:
    """Owns every request and page: `schedule` makes a plan, `commit` takes its tokens.

    A plan may be made before the one before it is committed, not earlier: at most two are open.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_pages)
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_added = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_prefix_cache_queries = 0  # tokens
        self.num_prefix_cache_hits = 0
        self.finished: dict[str, int] = {}
        self._filling: list[Request] = []  # those for which the latest plan fills a page

    def add(self, asked: CoreRequest) -> None:
        """Queue a request; the front end has checked that it fits the context and that its id is new."""
        request = Request(asked, order=self._num_added)
        self._num_added += 1
        self.requests[asked.request_id] = request
        self.waiting.append(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests and free what they hold; ids that are unknown or finished are ignored."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is not None:
                request.finish_reason = "abort"
                self._finish(request)

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def num_tokens_in_pages(self) -> int:
        """Tokens whose keys and values the pages in use hold, those of shared pages once."""
        references = sum(len(request.pages) for request in self.running)
        num_shared = (references - self.pool.num_in_use) * self.limits.page_size  # shared pages are full
        return sum(request.num_computed for request in self.running) - num_shared

    def reset_prefix_cache(self) -> bool:
        """Forget what free pages hold; False, and nothing is forgotten, while a request holds pages."""
        return self.pool.reset()

    def schedule(self) -> StepPlan | None:
        """Spend one step's token budget: running requests first, one-token ranges before chunks, then waiting
        prompts.
        """
        self._register_filled()
        chunks: list[Chunk] = []
        preemptions = self.num_preemptions
        budget = self.limits.token_budget
        for chunk in self._continue_running():
            chunks.append(chunk)
            budget -= chunk.length
        for request in [request for request in self.running if request.num_uncomputed > 1]:
            if (
                budget
                and request.slot >= 0
                and (grown := self._grow(request, min(request.num_uncomputed, budget), chunks))
            ):
                chunks.append(grown)
                budget -= grown.length
        if self.num_preemptions == preemptions:
            self._admit(chunks, budget)
        return StepPlan(chunks) if chunks else None

    def commit(self, plan: StepPlan, tokens: Sequence[int]) -> list[CoreOutput]:
        """Take a step's sampled token per chunk (ignored where the chunk does not sample) and report what is new."""
        outputs = []
        for chunk, token in zip(plan.chunks, tokens, strict=True):
            request = chunk.request
            if not chunk.samples or request.finish_reason is not None:
                continue
            request.num_pending -= 1
            reason = request.append(token)
            self.num_generation_tokens += 1
            outputs.append(
                CoreOutput(
                    request_id=request.asked.request_id,
                    new_token_ids=[token],
                    finish_reason=reason,
                    stop_reason=token if reason == "stop" and token in request.asked.stop_token_ids else None,
                    first_scheduled_time=request.first_scheduled_time,
                    num_cached_tokens=request.num_cached_tokens,
                    num_preemptions=request.num_preemptions,
                )
            )
            if reason is not None:
                self._finish(request)
        return outputs

    def _continue_running(self) -> Iterator[Chunk]:
        """The next token of every request that has one to compute. The token budget covers all running requests by
        configuration.
        """
        scheduled: list[Chunk] = []
        for request in [request for request in self.running if request.num_uncomputed == 1]:
            # Making room for an earlier request may have preempted this one.
            if request.slot >= 0 and (chunk := self._grow(request, 1, scheduled)):
                scheduled.append(chunk)
        yield from scheduled

    def _grow(self, request: Request, length: int, scheduled: list[Chunk]) -> Chunk | None:
        """A chunk of a running request, preempting later arrivals for its pages; None when the request had to give up
        its own.
        """
        needed = self._pages_needed(request, length)
        while needed > self.pool.num_free:
            victim = self._victim({id(chunk.request) for chunk in scheduled})
            self._preempt(victim)
            if victim is request:
                return None
        return self._chunk(request, length, self.pool.allocate(needed))

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Start waiting requests in order of arrival while budget, slots and pages last."""
        while self.waiting and budget and self._free_slots:
            request = self.waiting[0]
            cached = self._cached_prefix(request)
            num_cached_tokens = len(cached) * self.limits.page_size
            length = min(request.num_uncomputed - num_cached_tokens, budget)
            needed = -(-(num_cached_tokens + length) // self.limits.page_size) - len(cached)
            reserve = int(self.limits.watermark * self.limits.num_pages) if self.running else 0
            if needed + self.pool.num_idle(cached) + reserve > self.pool.num_free:
                return
            self.waiting.popleft()
            self.pool.share(cached)
            request.slot = self._free_slots.pop()
            request.num_computed, request.num_registered = num_cached_tokens, len(cached)
            if request.first_scheduled_time is None:
                self._count_first_admission(request)
            insort(self.running, request, key=lambda running: running.order)
            chunks.append(self._chunk(request, length, [*cached, *self.pool.allocate(needed)]))
            budget -= length

    def _count_first_admission(self, request: Request) -> None:
        request.first_scheduled_time = time.monotonic()
        request.num_cached_tokens = request.num_computed
        if self.limits.enable_prefix_caching:
            self.num_prefix_cache_queries += len(request.tokens)
            self.num_prefix_cache_hits += request.num_computed

    def _cached_prefix(self, request: Request) -> list[int]:
        """The longest run of known pages that a waiting request begins with; never its last token, whose logits the
        next one is drawn from. None of its tokens is on the device only: the steps it was in have been committed.
        """
        cached: list[int] = []
        if not self.limits.enable_prefix_caching:
            return cached
        page_size = self.limits.page_size
        for index in range((len(request.tokens) - 1) // page_size):
            page = self.pool.find(request.page_hash(index, page_size))
            if page is None:
                break
            cached.append(page)
        return cached

    def _register_filled(self) -> None:
        """Let the pages that the plan before this one fills be found.

        That plan has been launched, and steps run in order: whatever a later step reads of them is there by then. In
        its own step a page is not shared, since rows of one step do not wait for each other.
        """
        for request in self._filling:
            self._register(request)
        self._filling.clear()

    def _register(self, request: Request) -> None:
        """Register a running request's full pages, as far as the launched steps fill them and the host knows their
        tokens.
        """
        page_size = self.limits.page_size
        num_full = min(request.num_computed, len(request.tokens)) // page_size
        for index in range(request.num_registered, min(num_full, len(request.pages))):
            self.pool.register(request.pages[index], request.page_hash(index, page_size))
            request.num_registered = index + 1

    def _chunk(self, request: Request, length: int, new_pages: list[int]) -> Chunk:
        """Give a request the pages of its next `length` tokens and count those as computed."""
        start = request.num_computed
        first_new_page = len(request.pages)
        request.pages.extend(new_pages)
        request.num_computed += length
        if self.limits.enable_prefix_caching and start // self.limits.page_size < (
            request.num_computed // self.limits.page_size
        ):
            self._filling.append(request)
        self.num_prompt_tokens += max(0, min(request.num_computed, request.num_prompt) - start)
        samples = request.num_computed == request.length
        request.num_pending += samples
        return Chunk(request, request.slot, start, length, samples, first_new_page, new_pages)

    def _pages_needed(self, request: Request, length: int) -> int:
        return -(-(request.num_computed + length) // self.limits.page_size) - len(request.pages)

    def _victim(self, scheduled: set[int]) -> Request:
        """The latest arrival that this step does not use yet."""
        return next(request for request in reversed(self.running) if id(request) not in scheduled)

    def _preempt(self, request: Request) -> None:
        """Free a running request's pages; its tokens are computed again once it is readmitted, ahead of later
        arrivals.
        """
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)

    def _finish(self, request: Request) -> None:
        assert request.finish_reason is not None
        self.finished[request.finish_reason] = self.finished.get(request.finish_reason, 0) + 1
        del self.requests[request.asked.request_id]
        if request.slot >= 0:
            self._release(request)
        else:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        """Take a request out of the running ones; its full pages can still be found. Steps in flight may still write
        its pages: they run before any later step does.
        """
        if self.limits.enable_prefix_caching:
            self._register(request)
        self.running.remove(request)
        self._free_slots.append(request.slot)
        self.pool.free(request.pages)
        request.pages = []
        request.slot = -1
