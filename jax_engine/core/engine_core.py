"""The engine: requests in, tokens out, one step ahead of what the host has seen."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from jax_engine.adapters.adapter_files import read_adapter
from jax_engine.adapters.adapter_slots import AdapterSlots
from jax_engine.adapters.served_adapters import ServedList
from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.config import EngineConfig
from jax_engine.core.admin import ASLEEP, Admin
from jax_engine.core.engine_view import EngineView, StepLog, view_of
from jax_engine.core.messages import (
    Abort,
    AdapterReply,
    Add,
    AdminReply,
    Command,
    CoreOutput,
    CoreRequest,
    Inspect,
    IsSleeping,
    LoadAdapter,
    PrefixCacheReset,
    Profile,
    Ready,
    ResetPrefixCache,
    Sleep,
    StepOutputs,
    UnloadAdapter,
    Vocabulary,
    WakeUp,
)
from jax_engine.core.stats import EngineStats, HostTime
from jax_engine.execution.runner import PendingTokens, Runner
from jax_engine.grammar.constraints import Constraints
from jax_engine.hosts.group_leader import Leader
from jax_engine.lora_request import split_module
from jax_engine.sampling.logits_processors import argument_defaults
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.scheduling.request import Constraint
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import StepPlan

STATS_PERIOD = 0.1  # seconds between snapshots sent along with outputs
IDLE_SECONDS = 0.05  # for which a step with nothing to run waits at most
WASTE_PERIOD = 4  # steps between samples of the page waste


class EngineCore:
    """Scheduler and runner in one loop. Mutable; owned by whoever calls `step`, in one thread."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        watch: Callable[[CompiledSteps], object] | None = None,
        group: Leader | None = None,
    ) -> None:
        """`watch` is given the step programs before the first one is compiled; `group` leads the other processes."""
        for module in config.lora_modules:  # a mistake there shows before anything compiles
            read_adapter(split_module(module)[1], max_rank=config.max_lora_rank)
        self.runner = Runner(config, watch=watch, group=group)
        limits = self.runner.limits(config)
        slots = AdapterSlots(config.max_loras if config.enable_lora else 0, self.runner.adapters.fetch)
        self.scheduler = Scheduler(limits, config.speculation, adapters=slots)
        self.served_adapters = ServedList(config.lora_modules, self.runner.adapters.load)
        self.admin = Admin(self.runner, self.scheduler, profile_dir=config.profile_dir)
        self._max_in_flight = config.max_num_queued_reqs
        self._num_refused = 0
        self.info = Ready(
            max_model_len=self.runner.memory.max_model_len,
            vocab_size=self.runner.vocab_size,
            num_pages=limits.num_pages,
            page_size=limits.page_size,
            step_sizes=limits.step_sizes,
            processor_arguments=argument_defaults(self.runner.placed.processors),
            adapters=self.served_adapters.all,
            hidden_size=self.runner.placed.hidden_size,
        )
        self.constraints = Constraints()
        self.steps = StepLog()
        self._early: list[tuple[CoreRequest, Constraint | None]] = []  # wait for a program of the FULL mode
        self._pending: PendingTokens | None = None
        self._step_seconds = 0.0  # that the latest step took
        self._schedule_us = self._wait_us = self._collect_us = 0.0
        self._stats_due = 0.0
        self._device_since = 0.0  # when the device began with the step it is at
        self._is_ahead = False  # the step that is pending was launched before the one before it was collected
        self._period_since = 0.0  # when the tokens of the step before came, or the engine began to be busy

    def handle(
        self, command: Command
    ) -> PrefixCacheReset | AdapterReply | AdminReply | StepOutputs | EngineView | None:
        """Take a command from the front end and return its answer, if it has one; a shutdown is the caller's to act
        on.
        """
        if isinstance(command, Add):
            return self._add(command.requests)
        if isinstance(command, Abort):
            self.constraints.abort(command.request_ids)
            self._early = [early for early in self._early if early[0].request_id not in command.request_ids]
            self.scheduler.abort(command.request_ids)
        elif isinstance(command, Vocabulary):
            self.constraints.take_vocabulary(command)
        elif isinstance(command, ResetPrefixCache):
            return PrefixCacheReset(self.scheduler.cache.reset())
        elif isinstance(command, Inspect):
            return view_of(self.scheduler, self.stats(), self.steps, is_sleeping=self.admin.is_sleeping)
        elif isinstance(command, LoadAdapter):
            return self._load_adapter(command)
        elif isinstance(command, UnloadAdapter):
            return self._unload_adapter(command.lora_int_id)
        elif isinstance(command, Sleep | WakeUp | IsSleeping | Profile):
            return self.admin.handle(command, is_idle=self._is_idle())
        return None

    def _is_idle(self) -> bool:
        """Whether no request is in flight. A step that is, for requests that have ended, is waited for."""
        if self.scheduler.has_work or self._num_held:
            return False
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._collect(pending, is_ahead=False)
        return True

    def is_at_hand(self, command: LoadAdapter | UnloadAdapter) -> bool:
        """Whether `handle` need not wait for a disk; if it would, that is being read meanwhile."""
        if isinstance(command, UnloadAdapter):
            return True
        lora = command.lora
        try:
            lora = self.served_adapters.next_one(lora.lora_name, lora.lora_path) if command.served else lora
        except ValueError:
            return True
        return self.runner.adapters.begin(lora)

    def _load_adapter(self, command: LoadAdapter) -> AdapterReply:
        try:
            if command.served:
                self.served_adapters.add(command.lora.lora_name, command.lora.lora_path)
            else:
                self.runner.adapters.load(command.lora)
        except ValueError as error:
            return AdapterReply(str(error))
        return AdapterReply()

    def _unload_adapter(self, lora_int_id: int) -> AdapterReply:
        """Forget every adapter of this number."""
        known = {*self.served_adapters.all, *self.runner.adapters.loaded}
        found = [lora for lora in known if lora.lora_int_id == lora_int_id]
        for lora in found:
            self.served_adapters.remove(lora)
            self.runner.adapters.forget(lora)
            self.scheduler.adapters.forget(lora)
        return AdapterReply(None if found else f"lora_int_id={lora_int_id} is not the number of a loaded adapter")

    def _add(self, requests: Sequence[CoreRequest]) -> StepOutputs | None:
        """Queue requests, or refuse all of them when too many sequences would be in flight, or the engine is asleep.

        The core decides, since it alone knows all that is in flight, whoever sent it.
        """
        if self.admin.is_sleeping:
            return StepOutputs([CoreOutput(r.request_id, [], "asleep", error=ASLEEP) for r in requests], self.stats())
        limit, num_in_flight = self._max_in_flight, len(self.scheduler.requests) + self._num_held
        if limit is None or num_in_flight + len(requests) <= limit:
            for request in requests:
                if request.structured is None:
                    self._queue(request)
                else:
                    self.constraints.begin(request)
            return None
        self._num_refused += len(requests)
        reason = f"{num_in_flight} sequences are in flight and max_num_queued_reqs={limit} is the most; try again later"
        return StepOutputs([CoreOutput(r.request_id, [], "refused", error=reason) for r in requests], self.stats())

    @property
    def has_work(self) -> bool:
        return self._pending is not None or self.scheduler.has_work or self._num_held > 0

    @property
    def _num_held(self) -> int:
        """Requests that the scheduler does not have yet."""
        return len(self.constraints) + len(self._early)

    def step(self) -> StepOutputs:
        """Launch the next step, then take the tokens of the one before it, so that the host works while the device
        does. Where the next step depends on what the host makes of these tokens, as those with drafts do, they are
        taken first.
        """
        outputs: list[CoreOutput] = []
        previous, self._pending = self._pending, None
        if previous is None:
            self._period_since = time.perf_counter()
        elif previous.plan.waits_for_host or (self._can_draft and self.scheduler.wants_drafts()):
            outputs += self._collect(previous, is_ahead=False)
            previous = None
        outputs += self._add_compiled()
        self._queue_early()
        self.constraints.wait_for_masks(self._step_seconds)
        start = time.perf_counter()
        can_draft = previous is None and self._can_draft
        num_steps = self.runner.compiled.num_steps(len(self.scheduler.running))
        plan = self.scheduler.schedule(num_steps, can_draft=can_draft)
        planned = time.perf_counter()
        self._schedule_us += (planned - start) * 1e6
        if previous is None:
            self._device_since = planned
        pending = self._launch(plan) if plan else None
        outputs += self.scheduler.adapters.take_failed()
        was_ahead, self._is_ahead = self._is_ahead, previous is not None
        if previous is not None:
            outputs += self._collect(previous, is_ahead=was_ahead)
        elif plan is None and not outputs:  # masks, grammars, adapters or a program are all there is to wait for
            self.constraints.wait(IDLE_SECONDS)
            self.runner.adapters.wait(IDLE_SECONDS)
            if self._early:
                time.sleep(IDLE_SECONDS)
        # Masks that follow from the tokens of the step before are there now.
        self._pending = self.runner.draw(pending) if pending is not None else None
        now = time.monotonic()
        if now < self._stats_due and self.has_work:
            return StepOutputs(outputs)
        self._stats_due = now + STATS_PERIOD
        return StepOutputs(outputs, self.stats())

    @property
    def _can_draft(self) -> bool:
        """Whether there are programs for drafts in the next step."""
        return self.scheduler.drafts is not None and self.runner.compiled.can_draft(full=self.scheduler.needs_full)

    def _collect(self, pending: PendingTokens, *, is_ahead: bool) -> list[CoreOutput]:
        """Wait for a step, and take its tokens. `is_ahead`: it was launched before those of the step before it came,
        and so was the step after it.
        """
        start = time.perf_counter()
        assert pending.tokens is not None, "it has been drawn by the end of the engine's step"
        pending.tokens.block_until_ready()
        ready = time.perf_counter()
        self._step_seconds = ready - self._device_since
        plan = pending.resolve()
        if plan.num_steps == 1:
            self.scheduler.cache.load_rule.observe(plan.num_tokens, self._step_seconds)
        if self.scheduler.drafts is not None:
            self.scheduler.drafts.observe(plan, ready - self._period_since, is_ahead=is_ahead)
        self._device_since = self._period_since = ready
        drawn = self.runner.collect(pending)
        counters = self.runner.counters
        self.steps.add(
            plan.chunks,
            ended=time.monotonic(),
            seconds=self._step_seconds,
            draft_rows=pending.program.draft_rows,
            rows=counters.token_rows,
            padding=counters.padding_tokens,
        )
        outputs = self.scheduler.commit(plan, drawn, self.runner.collect_findings(pending, drawn))
        self.constraints.go_on(chunk.request for chunk in plan.chunks)
        self._wait_us += (ready - start) * 1e6
        self._collect_us += (time.perf_counter() - ready) * 1e6
        return outputs

    def _add_compiled(self) -> list[CoreOutput]:
        """Queue the requests whose grammars have been compiled; the outputs of those that cannot be."""
        failed = []
        for asked, constraint in self.constraints.take_compiled():
            if isinstance(constraint, str):
                failed.append(CoreOutput(asked.request_id, [], "error", error=constraint))
            else:
                self._queue(asked, constraint)
        return failed

    def _queue(self, asked: CoreRequest, constraint: Constraint | None = None) -> None:
        """Give a request to the scheduler, or keep it until the program that it needs is compiled: others go on."""
        if asked.needs_full and self.runner.compiled.is_coming(SamplingMode.FULL):
            self._early.append((asked, constraint))
        else:
            self.scheduler.add(asked, constraint)

    def _queue_early(self) -> None:
        """Queue the requests that were kept for a program, if it is there by now."""
        early, self._early = self._early, []
        for asked, constraint in early:
            self._queue(asked, constraint)

    def _launch(self, plan: StepPlan) -> PendingTokens:
        if self.runner.counters.steps % WASTE_PERIOD == 0:
            self.scheduler.cache.sample_waste(self.scheduler.running)
        return self.runner.launch(plan)

    def stats(self) -> EngineStats:
        """A snapshot of every counter."""
        scheduler, compiled, launches = self.scheduler, self.runner.compiled, self.runner.counters
        cache, counters = scheduler.cache, scheduler.cache.counters
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + self._num_held,
            num_pages=cache.pool.num_pages,
            num_pages_in_use=cache.pool.num_in_use,
            num_tokens_in_pages=cache.num_tokens_in_pages(scheduler.running),
            page_size=scheduler.limits.page_size,
            steps_total=launches.steps,
            prompt_tokens_total=scheduler.num_prompt_tokens,
            prefix_cache_queries_total=counters.queries,
            prefix_cache_hits_total=counters.hits,
            num_host_pages=cache.host.num_pages,
            num_host_pages_in_use=cache.host.num_in_use,
            host_cache_queries_total=counters.host_queries,
            host_cache_hits_total=counters.host_hits,
            saved_pages_total=counters.saved_pages,
            loaded_pages_total=counters.loaded_pages,
            copied_pages_total=counters.copied_pages,
            recomputed_tokens_total=counters.recomputed_tokens,
            page_room_sampled_total=counters.sampled_room,
            page_waste_sampled_total=counters.sampled_waste,
            generation_tokens_total=scheduler.num_generation_tokens,
            padding_tokens_total=launches.padding_tokens,
            token_rows_total=launches.token_rows,
            preemptions_total=scheduler.num_preemptions,
            finished_requests_total=dict(scheduler.finished),
            refused_requests_total=self._num_refused,
            programs_compiled=compiled.num_ready,
            programs_planned=len(compiled.programs),
            compile_eta_seconds=compiled.eta,
            compile_seconds_total=compiled.seconds,
            compiles_in_request_path_total=compiled.num_in_request_path,
            **self._draft_figures(),
            **self._adapter_figures(),
            steps_by_tokens_total=tuple(launches.steps_by_tokens),
            host_time=HostTime(
                steps=launches.steps,
                schedule=self._schedule_us,
                pack=launches.pack_us,
                launch=launches.launch_us,
                wait=self._wait_us,
                collect=self._collect_us,
            ),
        )

    def _draft_figures(self) -> dict[str, Any]:
        if self.scheduler.drafts is None:
            return {}
        counters = self.scheduler.drafts.counters
        return {
            "spec_drafts_total": counters.drafts,
            "spec_draft_tokens_total": counters.tokens,
            "spec_accepted_tokens_per_position_total": tuple(counters.accepted),
        }

    def _adapter_figures(self) -> dict[str, Any]:
        scheduler = self.scheduler
        if not scheduler.adapters.num_slots:
            return {}
        running, waiting = (
            {request.asked.lora.lora_name for request in requests if request.asked.lora is not None}
            for requests in (scheduler.running, scheduler.waiting)
        )
        waiting |= scheduler.adapters.waiting_names
        return {"running_adapters": tuple(sorted(running)), "waiting_adapters": tuple(sorted(waiting))}

    def shutdown(self) -> None:
        self.admin.stop()
        self.constraints.shutdown()
        self.runner.shutdown()
