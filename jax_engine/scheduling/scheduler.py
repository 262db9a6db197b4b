"""Continuous batching: which tokens of which requests the next step computes.

There is no prefill or decode mode. A step is a list of token ranges: a running request's next token, a chunk of a
prompt, or a preempted request's tokens once more. Iteration-level scheduling is that of Orca (Yu et al., OSDI 2022);
chunks under one budget, decodes first, that of Sarathi-Serve (Agrawal et al. 2024, arXiv 2403.02310).
"""

import time
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from jax_engine.adapters.adapter_slots import AdapterSlots
from jax_engine.core.messages import CoreOutput, CoreRequest
from jax_engine.kv_cache.host_pool import LoadRule
from jax_engine.kv_cache.kv_cache_manager import KVCacheManager
from jax_engine.scheduling.page_claims import PageClaims, Start
from jax_engine.scheduling.prompt_groups import PromptGroups
from jax_engine.scheduling.request import NO_POSITIONS, Constraint, Request
from jax_engine.scheduling.step_plan import NO_FINDINGS, Chunk, ChunkFindings, SchedulerLimits, StepPlan
from jax_engine.scheduling.waiting_queue import POLICIES, WaitingQueue
from jax_engine.speculation.drafting import NO_DRAFTS, Drafts, PlannedDrafts
from jax_engine.speculation.speculative_config import SpeculativeConfig

_urgency = attrgetter("urgency")


@dataclass(slots=True)
class _Step:
    """A plan in the making. Mutable; lives for one `Scheduler.schedule`."""

    tokens: int  # of the budget, not spent and not kept for a running request's next token
    num_steps: int = 1  # tokens that a decode draws
    drafts: PlannedDrafts = NO_DRAFTS
    chunks: list[Chunk] = field(default_factory=list)
    short: set[int] = field(default_factory=set)  # owners of pages whom somebody has given way to or waits for one of
    is_blocked: bool = False  # the most urgent waiting request cannot start


class Scheduler:
    """Owns every request: `schedule` makes a plan, `commit` takes its tokens.

    A plan may be made before the one before it is committed, not earlier: at most two are open. `clock` gives the
    seconds that arrival times are in; a simulation has one of its own.
    """

    def __init__(
        self,
        limits: SchedulerLimits,
        speculation: SpeculativeConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        adapters: AdapterSlots | None = None,
    ) -> None:
        self.limits = limits
        self.adapters = adapters or AdapterSlots(0, lambda _: True)
        self._clock = clock
        self.cache = KVCacheManager(
            limits.num_pages,
            limits.page_size,
            limits.windows,
            enable_prefix_caching=limits.enable_prefix_caching,
            num_host_pages=limits.num_host_pages,
            load_rule=LoadRule(
                limits.seconds_per_loaded_page, page_size=limits.page_size, large_step=limits.token_budget // 2
            ),
            partitions=limits.partitions,
        )
        reserve = int(limits.watermark * limits.num_pages) // limits.partitions.count
        self._pages = PageClaims(self.cache, reserve)
        self.groups = PromptGroups()
        self.drafts = None if speculation is None else Drafts.of(speculation, limits)
        self.requests: dict[str, Request] = {}
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # the most urgent first
        self._urgency_of = POLICIES[limits.policy]
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._num_added = self._num_full = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.finished: dict[str, int] = {}

    def add(self, asked: CoreRequest, constraint: Constraint | None = None) -> None:
        """Queue a request; the front end has checked that it fits the context and that its id is new."""
        request = Request(asked, order=self._num_added, digest=self.limits.digest, constraint=constraint)
        self._num_added += 1
        self._num_full += asked.needs_full
        request.urgency = self._urgency_of(request)
        self.requests[asked.request_id] = request
        self.groups.add(request)
        self.waiting.add(request)

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
    def num_waiting(self) -> int:
        return len(self.waiting) + self.groups.num_held + self.adapters.num_waiting

    def wants_drafts(self) -> bool:
        """Whether the next plan is better made once the tokens of the one before it are known, to have drafts."""
        room = self.limits.token_budget - len(self.running)
        return self.drafts is not None and bool(self.drafts.choose(len(self.running), room, num_pending=1))

    def schedule(self, max_steps: int = 1, *, can_draft: bool = False) -> StepPlan | None:
        """Spend one step's token budget by urgency. Every running request's next token has its place in it before any
        chunk of a prompt, so that a long prompt never keeps others from decoding.

        Whoever lacks pages takes them from less urgent requests, all of which come later in this step: none that
        already is in it gives way, and the most urgent of all never does. It ends at some time, and so does everyone.

        Where nothing but decodes is to do, each request draws up to `max_steps` tokens. Drafts are planned only if
        `can_draft`: the plans before it are committed, and there is a program for it.
        """
        self.cache.settle()
        for request in (*self.groups.begin_step(), *self.adapters.begin_step()):
            self.waiting.add(request)
        num_decodes = sum(request.num_uncomputed == 1 for request in self.running)
        drafts = NO_DRAFTS
        if can_draft and self.drafts is not None:
            drafts = self.drafts.plan(self.running, self.cache, self.limits.token_budget)
        budget = self.limits.token_budget if drafts.tokens else self._step_budget(num_decodes)
        num_free = budget - num_decodes - sum(map(len, drafts.tokens.values()))
        step = _Step(num_free, self._num_steps(max_steps), drafts)
        is_plain = step.num_steps == 1 and not drafts.tokens
        for request in tuple(self.running):
            if self.waiting and request.slot >= 0:  # without a slot, it has given way
                self._admit(step, before=request)
            if is_plain and (chunk := self.cache.next_token(request)) is not None:
                step.chunks.append(chunk)
            elif request.slot >= 0:
                self._continue(step, request)
        self._admit(step)
        if not step.chunks:
            return None
        return StepPlan(step.chunks, self.cache.take_copies(), self.adapters.take_loads())

    def commit(
        self, plan: StepPlan, drawn: Sequence[Sequence[int]], findings: Sequence[ChunkFindings] | None = None
    ) -> list[CoreOutput]:
        """Take what a step drew for each chunk, where it was to draw, and found besides; returns what is new."""
        outputs = []
        for index, (chunk, tokens) in enumerate(zip(plan.chunks, drawn, strict=True)):
            request = chunk.request
            found = findings[index] if findings else NO_FINDINGS
            if found.prompt and request.prompt_logprobs is not None:
                request.prompt_logprobs += found.prompt
            if not chunk.num_draws or request.finish_reason is not None:
                continue
            request.num_pending -= chunk.num_draws
            if self.drafts is not None and chunk.drafts:
                tokens = self.drafts.keep(request, chunk.drafts, tokens, self.cache)
                self.num_generation_tokens += len(tokens)
                reason = request.finish_reason
            else:
                self.num_generation_tokens += len(tokens) * (not request.asked.pools)
                reason = request.take(tokens, chunk.num_draws)
            if self.drafts is not None and reason is None:
                self.drafts.learn(request)
            outputs.append(
                CoreOutput(
                    request_id=request.asked.request_id,
                    new_token_ids=list(tokens) if found.pooled is None else [],
                    finish_reason=reason,
                    stop_reason=tokens[-1] if reason == "stop" and tokens[-1] in request.asked.stop_token_ids else None,
                    first_scheduled_time=request.first_scheduled_time,
                    num_cached_tokens=request.num_cached_tokens,
                    num_preemptions=request.num_preemptions,
                    logprobs=found.drawn and found.drawn[: len(tokens)],
                    prompt_logprobs=request.take_prompt_logprobs(),
                    pooled=found.pooled,
                    error=request.constraint.error if request.constraint is not None else None,
                )
            )
            if reason is not None:
                self._finish(request)
        return outputs

    @property
    def needs_full(self) -> bool:
        """Whether the next step may have rows of the FULL sampling mode."""
        return self._num_full > 0

    def _step_budget(self, num_decodes: int) -> int:
        """Tokens that this step may compute.

        Not always all that there are: where the step program's size below is nearer than the one above, the last
        chunk's end is left to the next step, which the requests that decode need anyway. So it puts off fewer tokens
        than padding it saves.
        """
        limits, num_free = self.limits, len(self._free_slots)
        limit, sizes = limits.token_budget, limits.step_sizes
        only_decodes = num_decodes == len(self.running) and not self.waiting
        fill_it = 1 < num_free < len(self.waiting)  # with whose prompts, only sorting the queue would tell
        if not sizes or not num_decodes or only_decodes or fill_it or not limits.enable_chunked_prefill:
            return limit
        first = self.waiting.first()
        starting = self.waiting if len(self.waiting) <= num_free else [first] if first and num_free else []
        requests = (*self.running, *starting)
        total = sum(self._chunk_length(request.num_uncomputed, limit) for request in requests)
        if total == num_decodes or total >= limit:
            return limit
        index = bisect_right(sizes, total)
        below, above = (0, *sizes)[index], sizes[index]
        return below if below > num_decodes and total - below < above - total else limit

    def _num_steps(self, bound: int) -> int:
        """How many tokens a request may draw in the next plan: up to `bound` while nobody waits, all running requests
        decode, the host need not see each token, none is in the FULL sampling mode, and there are pages for that many;
        else one.
        """
        if bound == 1 or self.num_waiting:
            return 1
        if any(
            request.asked.needs_host or request.asked.needs_full or request.num_uncomputed > 1
            for request in self.running
        ):
            return 1
        decoding = [request for request in self.running if request.num_uncomputed]
        lengths = [min(bound, request.num_undrawn) for request in decoding]
        return bound if self.cache.have_room(decoding, lengths) else 1

    def _continue(self, step: "_Step", request: Request) -> None:
        """Add a running request's next range to the step, as long as budget and pages allow.

        For its next page, less urgent requests give way. If there are none it waits in its place and keeps what it has,
        which more urgent ones may still take.
        """
        num_uncomputed = request.num_uncomputed
        is_decode = num_uncomputed == 1
        drafts, fill = step.drafts.of(request)
        length = 1 + len(drafts) if is_decode else self._chunk_length(num_uncomputed, step.tokens)
        if not length or request.waits_for_mask:
            return
        while not (room := self.cache.room(request)):
            step.short.add(request.owner)
            less_urgent = self.running[bisect_right(self.running, request.urgency, key=_urgency) :]
            partition = self.cache.next_partition(request)
            candidates = [other for other in less_urgent if self.cache.holds_in(other, partition)]
            if not candidates:
                return
            self._give_way(step, self._pages.victim(candidates, partition))
        length = min(length, room)
        step.tokens -= 0 if is_decode else length
        chunk = self._chunk(request, length, num_steps=step.num_steps, drafts=drafts[: length - 1], fill=fill)
        step.chunks.append(chunk)
        if fill and self.drafts is not None:
            self.drafts.proposer.launch(request, fill, length - 1)

    def _admit(self, step: "_Step", before: Request | None = None) -> None:
        """Start waiting requests in order of urgency while budget, slots and pages last; those alone that are more
        urgent than the running request `before`.

        In a step that is short of pages, only those of a higher priority than running ones: they bring their own.
        """
        while not step.is_blocked and (request := self.waiting.first()) is not None:
            is_short = len(step.short) == len(self.cache.partitions.owners)
            if before is None:
                is_due = not is_short
            elif is_short:
                is_due = request.asked.priority < before.asked.priority
            else:
                is_due = request.urgency < before.urgency
            if not is_due:
                return
            if self.groups.holds(request):
                self.waiting.remove(request)
            elif self.adapters.admits(request):
                step.is_blocked = not self._start(step, request)
            elif request.finish_reason is not None:
                self._finish(request)
            else:
                self.waiting.remove(request)

    def _start(self, step: "_Step", request: Request) -> bool:
        """Give the most urgent waiting request a slot and the pages of its first range. For one of higher priority than
        running ones, these give way where that helps; none of them is in this step yet. False when it must wait.
        """
        outranked = [running for running in self.running if running.asked.priority > request.asked.priority]
        if not outranked and not (step.tokens and self._free_slots):
            return False
        # Where pages are short, there are only those of others that give way.
        owners = {running.owner for running in outranked}.union(set(self.cache.partitions.owners) - step.short)
        while True:
            found = self.cache.cached_prefixes(request, self.groups.donor(request))
            starts = [
                Start(cached, self._chunk_length(request.num_uncomputed - cached.num_tokens, step.tokens))
                for cached in found
                if cached.owner in owners
            ]
            start, victims = self._pages.choose(starts, self.running, outranked, has_slot=bool(self._free_slots))
            if start is None:
                return False
            if not victims:
                break
            victim = self._pages.victim(victims)
            outranked.remove(victim)
            self._give_way(step, victim)
        self.waiting.remove(request)
        self.cache.start(request, start.cached)
        self.groups.started(request)
        request.slot = self._free_slots.pop()
        self.adapters.take(request)
        if request.first_scheduled_time is None:
            request.first_scheduled_time = self._clock()
            self.cache.count_lookup(request, start.cached)
        insort(self.running, request, key=_urgency)
        step.tokens -= start.length
        step.chunks.append(self._chunk(request, start.length, takes_slot=True))
        return True

    def _chunk_length(self, num_uncomputed: int, num_tokens: int) -> int:
        """How many of a request's uncomputed tokens to compute in a step with a budget of `num_tokens` left; 0 when it
        has to wait.
        """
        if not self.limits.enable_chunked_prefill:
            return num_uncomputed if num_uncomputed <= num_tokens else 0
        return min(num_uncomputed, num_tokens, self.limits.long_prefill_token_threshold or num_tokens)

    def _chunk(
        self,
        request: Request,
        length: int,
        *,
        takes_slot: bool = False,
        num_steps: int = 1,
        drafts: Sequence[int] = (),
        fill: range = NO_POSITIONS,
    ) -> Chunk:
        """Plan a request's next `length` tokens, the last of them `drafts`, for which there are pages, as for the
        tokens drawn on the way.
        """
        start = request.num_computed
        num_draws = min(num_steps, request.num_undrawn) if start + length == request.length + len(drafts) else 0
        first_new_page = self.cache.grow(request, length + max(num_draws - 1, 0))  # all but the last are run
        num_draws += len(drafts)
        if takes_slot:
            first_new_page = 0
        self.num_prompt_tokens += max(0, min(request.num_computed, request.num_prompt) - start)
        request.num_pending += num_draws
        new_pages, scored = request.pages[first_new_page:], request.score(start, length)
        return Chunk(request, request.slot, start, length, num_draws, first_new_page, new_pages, scored, drafts, fill)

    def _give_way(self, step: "_Step", victim: Request) -> None:
        """Preempt a request that is not in this step yet."""
        # The place that was kept for it.
        step.tokens += (victim.num_uncomputed == 1) + len(step.drafts.tokens.pop(victim.asked.request_id, ()))
        step.short.add(victim.owner)
        self._preempt(victim)

    def _preempt(self, request: Request) -> None:
        """Free a running request's pages; its tokens are computed again once it is readmitted, ahead of less urgent
        requests.
        """
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)

    def _finish(self, request: Request) -> None:
        assert request.finish_reason is not None
        self.finished[request.finish_reason] = self.finished.get(request.finish_reason, 0) + 1
        del self.requests[request.asked.request_id]
        self._num_full -= request.asked.needs_full
        if self.drafts is not None:
            self.drafts.forget(request)
        if request.slot >= 0:
            self._release(request)
            self.groups.discard(request)
        elif not (self.groups.discard(request) or self.adapters.discard(request)):
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        """Take a request out of the running ones, and its slot and pages."""
        self.cache.release(request)
        self.running.remove(request)
        self.adapters.release(request)
        self._free_slots.append(request.slot)
        request.slot = -1
