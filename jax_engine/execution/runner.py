"""Owns the devices: weights, step programs, and the state that steps replace."""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import numpy as np
from numpy.typing import NDArray

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.bundles import HELPERS, Bundle
from jax_engine.compilation.compilation_cache import use_compilation_cache
from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.compilation.gpu_settings import prepare_gpus
from jax_engine.compilation.memory_check import check_memory
from jax_engine.compilation.planner import host_pages
from jax_engine.compilation.start_log import log_adapters, log_cache, log_step_programs
from jax_engine.config import EngineConfig
from jax_engine.core.stats import STEP_TOKEN_BOUNDS
from jax_engine.execution.devices import Devices
from jax_engine.execution.kv_scales import load_weights
from jax_engine.execution.orders import (
    CopyPages,
    Draft,
    Draw,
    Forward,
    Order,
    Result,
    Step,
    WriteAdapter,
    WritePages,
    WriteSlot,
)
from jax_engine.execution.page_copies import check_host_memory
from jax_engine.execution.row_blocks import whole_blocks
from jax_engine.execution.step_batch import (
    NO_TOKEN,
    SlotParameters,
    order_chunks,
    pack_batch,
    page_updates_of,
)
from jax_engine.execution.step_program import Program
from jax_engine.execution.weights import Weights
from jax_engine.hosts.group_leader import Leader
from jax_engine.hosts.group_member import Member
from jax_engine.hosts.hosts import check_mesh
from jax_engine.sampling.full_sampling import ForwardResults
from jax_engine.sampling.full_slots import FullSlots, forward_inputs
from jax_engine.sampling.logprob_results import asked_of_draw, asked_of_forward, read_logprobs
from jax_engine.sampling.logprobs import RowLogprobs
from jax_engine.sampling.pooling_results import with_pooled
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.scheduling.step_plan import Chunk, ChunkFindings, SchedulerLimits, StepPlan
from jax_engine.speculation.draft_model import PendingDrafts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingTokens:
    """A step that has been launched: its chunks in the order of its rows, and its tokens, still on the device."""

    plan: StepPlan
    tokens: jax.Array | None  # [steps, rows], or [rows] of one step; None until `Runner.draw` has been called
    program: Program
    found: ForwardResults | None = None  # of a program of the FULL mode: what is asked for
    logprobs: RowLogprobs | None = None  # of the tokens, if they are asked for
    drafts: PendingDrafts | None = None  # what was drafted for it on the device

    def resolve(self) -> StepPlan:
        """The plan with the drafts themselves. Waits for them."""
        return self.plan if self.drafts is None else StepPlan(self.drafts.resolve(self.plan.chunks))


@dataclass
class LaunchCounters:
    """Cumulative figures of launches. Mutable; owned by the runner."""

    steps: int = 0
    token_rows: int = 0
    padding_tokens: int = 0
    steps_by_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKEN_BOUNDS) + 1))
    pack_us: float = 0.0
    launch_us: float = 0.0


class Runner:
    """Runs step plans on the device. Mutable; owned by the engine core."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        watch: Callable[[CompiledSteps], object] | None = None,
        group: Leader | Member | None = None,
    ) -> None:
        """Plan memory, compile the largest step while weights load, and start compiling the rest. `watch` is given the
        step programs beforehand; `group` are the other processes that do the same.

        Raises:
            ValueError: the model or the settings cannot be served; the message says what would be.
        """
        use_compilation_cache(config.compilation_cache_dir)
        prepare_gpus(config)
        device = jax.local_devices()[0]
        self._group = group
        self.blueprint = blueprint = Blueprint.of(config, jax.devices())
        if group is not None:
            check_mesh(blueprint.placed.placement.mesh, config.nnodes)
        limit = (device.memory_stats() or {}).get("bytes_limit")
        limit = limit if group is None or limit is None else group.least(limit)
        check_memory(blueprint, limit)
        self._is_remote = device.platform != "cpu"  # tokens must travel to the host
        self.placed, self.draft = blueprint.placed, blueprint.draft
        self.adapters = blueprint.adapter_store()
        self.vocab_size = blueprint.model.vocab_size
        self.step_sizes = blueprint.step_sizes
        self._num_slots = config.max_num_seqs
        self._geometry = self.placed.geometry
        self._bundle = None if config.compiled is None else Bundle.open(config.compiled, blueprint)
        self.memory = (self._bundle or blueprint).plan_memory(limit)
        log_cache(self.memory, self._geometry)
        log_adapters(config, self.placed)
        log_step_programs(blueprint.programs, self.step_sizes, self.placed.row_block)
        self.compiled = CompiledSteps(
            blueprint.programs,
            lambda program: blueprint.lower(program, self.memory),
            threads=config.compile_threads,
            load=None if self._bundle is None else self._bundle.load_step,
            agree=None if group is None else group.agree,
        )
        if watch is not None:
            watch(self.compiled)
        self.devices = Devices(self.placed, self.draft, self.adapters, self.compiled)
        self._load_while_compiling(config)
        self._seconds_per_loaded_page = self._time_loads(config, device)
        least = SamplingMode.FULL if self.placed.processors else SamplingMode.GREEDY
        self._parameters = SlotParameters(self._num_slots, self.vocab_size, least=least)
        self._full = FullSlots(self.placed, self._num_slots)
        self.counters = LaunchCounters()
        self.compiled.compile_rest(background=not config.compile_before_ready)
        if isinstance(group, Leader):
            group.wait_until_loaded()

    def limits(self, config: EngineConfig) -> SchedulerLimits:
        """What the scheduler may plan with."""
        return SchedulerLimits(
            self.memory.num_pages,
            self._geometry.page_size,
            self._num_slots,
            config.token_budget,
            enable_prefix_caching=config.enable_prefix_caching,
            policy=config.scheduling_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            long_prefill_token_threshold=config.long_prefill_token_threshold,
            hash_algorithm=config.prefix_caching_hash_algo,
            partitions=self._geometry.partitions,
            num_host_pages=host_pages(config, self._geometry),
            seconds_per_loaded_page=self._seconds_per_loaded_page,
            step_sizes=self.step_sizes,
            windows=self._geometry.layout.windows,
            draft_sizes=self.step_sizes
            if self.placed.row_block is not None
            else tuple(
                sorted({program.bucket.num_tokens for program in self.blueprint.programs if program.draft_rows})
            ),
            draft_context=self.draft.max_len if self.draft is not None else 0,
        )

    def do(self, order: Order[Result]) -> Result:
        """Have something done on the devices, here and in the processes that follow."""
        if isinstance(self._group, Leader):
            self._group.send(order)
        return order.run(self.devices)

    def launch(self, plan: StepPlan) -> PendingTokens:
        """Start one step on the devices; returns before it has run."""
        start = time.perf_counter()
        chunks = order_chunks(plan.chunks)
        if copies := plan.copies:
            self.do(CopyPages(copies.saves, copies.copies, copies.loads))
        for slot, lora in plan.adapter_loads:
            self.do(WriteAdapter(slot, dict(self.adapters.values(lora))))
        self._take_parameters(chunks)
        drafts: PendingDrafts | None = None
        if self.draft is not None and any(chunk.fill for chunk in chunks):
            program, filled, buffer = self.draft.pack(self.compiled, chunks, self._parameters)
            drafts = PendingDrafts(filled, self.do(Draft(self.compiled.number_of(program), buffer)))
            if any(chunk.drafts and chunk.request.constraint is not None for chunk in chunks):
                chunks, drafts = drafts.resolve(chunks), None  # masks depend on them
        plan = StepPlan(chunks)
        slots = np.fromiter((chunk.slot for chunk in chunks), np.int32, len(chunks))
        mode = self._parameters.mode(slots)
        program, _ = self.compiled.find(
            plan.num_tokens, len(chunks), mode, num_steps=plan.num_steps, draft_rows=plan.num_draft_rows
        )
        layout = self.blueprint.layouts[program.bucket]
        updates = page_updates_of(chunks, layout)
        if len(updates) > layout.num_page_updates:
            self._write_pages(updates[layout.num_page_updates :])
        buffer = pack_batch(chunks, updates[: layout.num_page_updates], layout, self._parameters)
        inputs = forward_inputs(chunks, program) if program.mode is SamplingMode.FULL else None
        packed = time.perf_counter()
        found: ForwardResults | None = None
        tokens: jax.Array | None = None
        number = self.compiled.number_of(program)
        if inputs is not None:
            found = asked_of_forward(self.do(Forward(number, buffer, inputs)), chunks)
        else:
            tokens = self.do(Step(number, buffer))
        self._begin_copies((tokens, found, drafts and drafts.tokens))
        launched = time.perf_counter()
        counters = self.counters
        counters.steps += 1
        counters.pack_us += (packed - start) * 1e6
        counters.launch_us += (launched - packed) * 1e6
        pending = PendingTokens(plan, tokens, program, found, drafts=drafts)
        return pending if plan.draws_later else self.draw(pending)

    def draw(self, pending: PendingTokens) -> PendingTokens:
        """Start what draws a step's tokens, if that is not done yet; waits until the masks for it are made."""
        if pending.tokens is not None:
            return pending
        start = time.perf_counter()
        chunks, program = pending.plan.chunks, pending.program
        assert program.draw is not None
        inputs = self._full.draw_inputs(chunks, program.draw)
        packed = time.perf_counter()
        drawn = asked_of_draw(self.do(Draw(self.compiled.number_of(program.draw), inputs)), chunks)
        self._begin_copies(drawn)
        self.counters.pack_us += (packed - start) * 1e6
        self.counters.launch_us += (time.perf_counter() - packed) * 1e6
        return replace(pending, tokens=drawn.tokens, logprobs=drawn.logprobs)

    def _begin_copies(self, leaves: object) -> None:
        """Have arrays come to the host as soon as they are there."""
        if self._is_remote:
            jax.tree.map(lambda leaf: leaf.copy_to_host_async(), leaves)

    def collect(self, pending: PendingTokens) -> list[list[int]]:
        """Wait for a step; the tokens of each of its chunks."""
        if pending.program.draft_rows:
            return self._collect_drafted(pending)
        drawn = np.atleast_2d(np.asarray(pending.tokens))[:, : len(pending.plan.chunks)]
        num_drawn = (drawn != NO_TOKEN).sum(axis=0)
        num_steps, num_tokens = 1, pending.plan.num_tokens
        if pending.program.num_steps > 1:
            num_steps, num_tokens = int(num_drawn.max()), int(num_drawn.sum())
        self._count_rows(num_steps * pending.program.bucket.num_tokens, num_tokens)
        return [tokens[:count] for tokens, count in zip(drawn.T.tolist(), num_drawn.tolist(), strict=True)]

    def _collect_drafted(self, pending: PendingTokens) -> list[list[int]]:
        """The tokens drawn behind the last of each chunk's tokens and behind each of its drafts."""
        drawn, end = np.asarray(pending.tokens).reshape(-1).tolist(), 0
        self._count_rows(pending.program.bucket.num_tokens, pending.plan.num_tokens)
        return [drawn[end : (end := end + chunk.num_draws)] for chunk in pending.plan.chunks]

    def _count_rows(self, token_rows: int, num_tokens: int) -> None:
        if self.placed.row_block is not None:
            token_rows = whole_blocks(num_tokens, self.placed.row_block)
        self.counters.token_rows += token_rows
        self.counters.padding_tokens += token_rows - num_tokens
        self.counters.steps_by_tokens[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1

    def collect_findings(self, pending: PendingTokens, drawn: Sequence[Sequence[int]]) -> list[ChunkFindings] | None:
        """Wait for the log-probabilities and vectors that a step's chunks ask for; `drawn` are its tokens. None if none
        does.
        """
        if pending.found is None:
            return None
        by_draws = pending.program.draft_rows > 0
        findings = read_logprobs(pending.logprobs, pending.found.prompt, pending.plan.chunks, drawn, by_draws=by_draws)
        return with_pooled(findings, pending.found.pooled, pending.plan.chunks)

    def shutdown(self) -> None:
        """Stop compiling, log what padding there was, and let go of device memory."""
        if isinstance(self._group, Leader):
            self._group.close()
            jax.distributed.shutdown()  # the others do so now, too
        self.compiled.stop()
        if rows := self.counters.token_rows:
            share = 100 * self.counters.padding_tokens / rows
            logger.info("%d steps, %.1f %% of their token rows padding", self.counters.steps, share)
        self.devices.let_go()

    def _take_parameters(self, chunks: Sequence[Chunk]) -> None:
        """Record the sampling parameters of requests that have just taken a slot."""
        for chunk in chunks:
            if chunk.first_new_page == 0 and chunk.new_pages:
                self._parameters.set(chunk.slot, chunk.request.asked)
                if (row := self._full.take(chunk)) is not None:
                    self.do(WriteSlot(chunk.slot, row))

    def _write_pages(self, updates: NDArray[np.int32]) -> None:
        """Write into the block tables what a step's own buffer has no room for, before the step."""
        shape, past_last = self.devices.updates_shape, self.devices.state.block_tables.shape[0]
        for start in range(0, len(updates), shape[0]):
            some = updates[start : start + shape[0]]
            padded = np.full(shape, past_last, np.int32)
            padded[: len(some)] = some
            self.do(WritePages(padded))

    def _time_loads(self, config: EngineConfig, device: jax.Device) -> float:
        """How long a page takes from host memory to the device; 0 where that is not to matter."""
        if not config.host_cache_bytes:
            return 0.0
        check_host_memory(device)
        seconds = self.devices.time_loads()
        logger.info(
            "KV cache in host memory: %d pages, %.1f MiB; a page comes back in %.0f us",
            host_pages(config, self._geometry),
            config.host_cache_bytes / 2**20,
            seconds * 1e6,
        )
        return 0.0 if config.kv_offloading_load == "always" else seconds

    def _load_while_compiling(self, config: EngineConfig) -> None:
        """Make weights and state while the largest program compiles; their errors do not wait for the compiler."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        compiling = pool.submit(self.compiled.compile_largest)
        try:
            blueprint = self.blueprint
            weights = Weights(partial(load_weights, self.placed, blueprint.model, blueprint.folder, config))
            if self.draft is not None:
                self.draft.load(config)
            if self._is_remote:
                compiling.result()  # an accelerator's compiler may try kernels out, in memory that the state would fill
            weights.leaves = self.adapters.warm_up(weights.leaves)
            self.devices.weights = weights
            self.devices.make_state(self.blueprint.state_size(self.memory), self._helpers())
            compiling.result()
        finally:
            pool.shutdown(wait=False)

    def _helpers(self) -> dict[str, jax.stages.Compiled]:
        """The small programs beside the steps, by name."""
        if self._bundle is not None:
            return {name: self._bundle.load(name) for name in HELPERS}
        lowered = self.blueprint.lower_helpers(self.memory)
        return {name: lowered[name].compile() for name in HELPERS}
