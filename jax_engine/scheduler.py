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

from jax_engine.kv_cache_manager import KVCacheManager
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
    """Owns every request: `schedule` makes a plan, `commit` takes its tokens.

    A plan may be made before the one before it is committed, not earlier: at most two are open.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.cache = KVCacheManager(
            limits.num_pages, limits.page_size, enable_prefix_caching=limits.enable_prefix_caching
        )
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in order of arrival
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_added = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.finished: dict[str, int] = {}

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

    def schedule(self) -> StepPlan | None:
        """Spend one step's token budget: running requests first, one-token ranges before chunks, then waiting
        prompts.
        """
        self.cache.register_filled()
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
        while not self.cache.can_grow(request, length):
            victim = self._victim({id(chunk.request) for chunk in scheduled})
            self._preempt(victim)
            if victim is request:
                return None
        return self._chunk(request, length, first_new_page=len(request.pages))

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Start waiting requests in order of arrival while budget, slots and pages last."""
        while self.waiting and budget and self._free_slots:
            request = self.waiting[0]
            cached = self.cache.cached_prefix(request)
            num_cached_tokens = len(cached) * self.limits.page_size
            length = min(request.num_uncomputed - num_cached_tokens, budget)
            reserve = int(self.limits.watermark * self.limits.num_pages) if self.running else 0
            if not self.cache.can_start(cached, num_cached_tokens + length, reserve=reserve):
                return
            self.waiting.popleft()
            self.cache.start(request, cached)
            request.slot = self._free_slots.pop()
            if request.first_scheduled_time is None:
                request.first_scheduled_time = time.monotonic()
                self.cache.count_lookup(request)
            insort(self.running, request, key=lambda running: running.order)
            chunks.append(self._chunk(request, length, first_new_page=0))
            budget -= length

    def _chunk(self, request: Request, length: int, *, first_new_page: int) -> Chunk:
        """Plan a request's next `length` tokens, for which there are pages."""
        start = request.num_computed
        self.cache.grow(request, length)
        self.num_prompt_tokens += max(0, min(request.num_computed, request.num_prompt) - start)
        samples = request.num_computed == request.length
        request.num_pending += samples
        return Chunk(request, request.slot, start, length, samples, first_new_page, request.pages[first_new_page:])

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
        """Take a request out of the running ones, and its slot and pages."""
        self.cache.release(request)
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = -1
