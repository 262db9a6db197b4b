"""One plan: a model under some settings on some devices, its step programs compiled for them, and what follows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.memory_check import (
    DeviceMemory,
    bytes_of,
    expert_bytes,
    gib,
    shortage,
    shorter,
    split_weights,
)
from jax_engine.compilation.planner import longest_sequence, most_pages_of_use
from jax_engine.config import EngineConfig
from jax_engine.execution.page_copies import staging_pages
from jax_engine.plan.chips import Target, next_sizes
from jax_engine.plan.compiling import compile_program, programs_of_plan
from jax_engine.plan.figure_cache import FigureCache
from jax_engine.plan.figures import ANALYTIC, Bounds, CompiledProgram, Plan, PlannedStep, Question
from jax_engine.plan.hlo_costs import Costs
from jax_engine.plan.roofline import Load, attention_work, expert_work, step_time
from jax_engine.plan.targets import devices_of

CONTEXTS = tuple(2**power for power in range(10, 21))
_COMPILERS = {"cpu": "XLA:CPU", "gpu": "XLA:GPU", "tpu": "XLA:TPU"}
_HLO_TYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def make_plan(question: Question) -> Plan:
    """Plan for a question.

    Raises:
        ValueError: the model, the settings or the strategy cannot be served on such devices, however large.
    """
    config, target = _for_target(question)
    blueprint = Blueprint.of(config, devices_of(target))
    needs = DeviceMemory.of(blueprint)
    usable = int(target.chip.device_bytes * config.gpu_memory_utilization)
    compiled: tuple[CompiledProgram, ...] = ()
    if needs.least <= usable:
        cache = FigureCache.of(config.compilation_cache_dir)
        source = _as_compiled(blueprint, target)
        compiled = tuple(compile_program(source, program, cache) for program in programs_of_plan(source))
    return _Answer(question, blueprint, needs, usable, compiled).plan()


def _for_target(question: Question) -> tuple[EngineConfig, Target]:
    """The settings as an engine on those devices would have them."""
    config, target = question.config, question.target
    if target.has_stand_in:  # as on a GPU, not as on the CPU that compiles in its place
        dtype = "bfloat16" if config.dtype == "auto" else config.dtype
        scan = True if config.scan_layers is None else config.scan_layers
        config = replace(config, dtype=dtype, block_size=config.block_size or 64, scan_layers=scan)
    return config, target


def _as_compiled(blueprint: Blueprint, target: Target) -> Blueprint:
    """What is compiled: of a GPU's engine, the same in float32, since XLA's compiler for CPUs widens sums of 16 bits,
    and cannot widen all of them.
    """
    if not target.has_stand_in:
        return blueprint
    return Blueprint.of(replace(blueprint.config, dtype="float32"), devices_of(target))


@dataclass(frozen=True)
class _Answer:
    """The arithmetic behind a plan."""

    question: Question
    blueprint: Blueprint
    needs: DeviceMemory
    usable: int
    compiled: Sequence[CompiledProgram]

    def plan(self) -> Plan:
        config, target = self.question.config, self.question.target
        problems, remedies = self._verdict()
        steps = self._steps() if self.compiled else {}
        placement = self.blueprint.placed.placement
        lengths = [length for length in CONTEXTS if length < self.context]
        mesh = {axis: size for axis, size in placement.mesh.shape.items() if size > 1} if placement.mesh else {}
        return Plan(
            model=self.question.model_name,
            device=target.name,
            devices=target.describe(),
            strategy=placement.strategy if placement.mesh else config.sharding_strategy,
            mesh=",".join(f"{axis}={size}" for axis, size in mesh.items()) or "one device",
            dtype=str(self.blueprint.placed.dtype),
            basis=_COMPILERS[target.chip.platform] if self.compiled and not target.has_stand_in else ANALYTIC,
            replicas=self._replicas,
            memory=self.needs,
            usable_bytes=self.usable,
            num_pages=self.num_pages,
            max_model_len=self.context,
            max_num_seqs=config.max_num_seqs,
            sequences={length: self.sequences_of(length) for length in [*lengths, self.context]},
            compiled=tuple(self.compiled),
            steps=steps,
            bounds=self._bounds(steps),
            problems=problems,
            remedies=remedies,
            notes=self._notes(),
        )

    @property
    def _replicas(self) -> int:
        tensor_size, pipeline_size = self.question.config.parallel_sizes
        return self.question.target.num_devices // (tensor_size * pipeline_size)

    @property
    def cache_bytes(self) -> int:
        """Memory of a device that is left for pages: by the compiler's figures where there are any."""
        config, geometry = self.blueprint.config, self.blueprint.placed.geometry
        if config.kv_cache_memory_bytes is not None:
            return config.kv_cache_memory_bytes
        left = self.usable - self.needs.fixed
        # The FULL mode, which is not compiled, keeps more than the others do.
        full = bytes_of(jax.tree.leaves(self.blueprint.placed.full_state_shapes(config.max_num_seqs)))
        if not self.question.target.has_stand_in:
            left = min([left, *(self.usable - one.taken_bytes - full for one in self.compiled)])
        return left - staging_pages(host=config.host_cache_bytes > 0) * geometry.page_bytes

    @property
    def num_pages(self) -> int:
        """Of a partition."""
        fits = max(0, self.cache_bytes // self.needs.page)
        placed = self.blueprint.placed
        useful = most_pages_of_use(self.blueprint.config, self.blueprint.model.max_model_len, placed.geometry)
        return fits if useful is None else min(fits, useful)

    @property
    def context(self) -> int:
        """The longest that is served: where it is not configured, what fits of the model's own."""
        own, config = self.blueprint.model.max_model_len, self.blueprint.config
        if config.max_model_len is not None or self.sequences_of(own):
            return own
        holds = longest_sequence(self.blueprint.placed.geometry, self.num_pages, config.token_budget)
        return max(holds, self.needs.least_context)

    def sequences_of(self, context: int) -> int:
        """Sequences of so many tokens that the pages hold at once."""
        geometry = self.blueprint.placed.geometry
        of_owner = self.num_pages // geometry.most_pages(context, self.blueprint.config.token_budget)
        return of_owner * len(geometry.partitions.owners)

    def _verdict(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Why it does not fit, and what to change."""
        config, context = self.blueprint.config, self.context
        asked = self.question.max_num_seqs or 1
        holds = self.sequences_of(context)
        where = f"{config.gpu_memory_utilization:g} of {gib(self.question.target.chip.device_bytes)}"
        if not self.compiled or holds == 0:
            cache = config.kv_cache_memory_bytes or self.needs.least_pages * self.needs.page
            reason = shortage(self.blueprint, self.needs, self.usable, where=where, cache=cache)
            pages = gib(self._pages_for(asked, context) * self.needs.page)
            more = f"; {asked} sequences of {context} tokens need {pages} of KV cache" if asked > 1 else ""
            return (reason + more,), (*shorter(self.blueprint, self.needs, self.usable), *self._larger(asked))
        if holds >= asked:
            return (), ()
        size = self.blueprint.placed.geometry.page_size
        fitting = range(size, context, size)
        longest = next((length for length in reversed(fitting) if self.sequences_of(length) >= asked), 0)
        problem = (
            f"{asked} sequences of {context} tokens need {gib(self._pages_for(asked, context) * self.needs.page)} of "
            f"KV cache on each device, and {gib(self.cache_bytes)} are left beside weights and steps: room for {holds}"
        )
        found = [f"lower max_num_seqs to {holds}"] + ([f"lower max_model_len to {longest}"] if longest else [])
        return (problem,), (*found, *self._larger(asked))

    def _pages_for(self, num_sequences: int, context: int) -> int:
        """Pages of a partition that so many sequences of so many tokens take."""
        geometry = self.blueprint.placed.geometry
        of_owner = -(-num_sequences // len(geometry.partitions.owners))
        return of_owner * geometry.most_pages(context, self.blueprint.config.token_budget)

    def _larger(self, asked: int) -> tuple[str, ...]:
        """The smallest slice of the same chip that is large enough, if cache and weights, but for those that are whole
        on every device of this one, are spread evenly.
        """
        spread = split_weights(self.blueprint) + self._pages_for(asked, self.needs.least_context) * self.needs.page
        kept = self.needs.fixed - split_weights(self.blueprint)
        for target in next_sizes(self.question.target):
            if kept + spread * self.question.target.num_chips / target.num_chips <= self.usable:
                return (f"use more devices: about {target.name}",)
        return ()

    def _steps(self) -> dict[str, PlannedStep]:
        question, config = self.question, self.blueprint.config
        context = min(question.input_len + question.output_len, self.context)
        sequences = max(1, min(config.max_num_seqs, self.sequences_of(context)))
        chunk = min(config.token_budget, question.input_len)
        past = (min(question.input_len, context) - chunk) // 2
        return {
            "decode": self._step(self.compiled[0], Load(sequences, 1, context - 1)),
            "prefill": self._step(self.compiled[-1], Load(1, chunk, past)),
        }

    def _step(self, compiled: CompiledProgram, load: Load) -> PlannedStep:
        blueprint, costs = self.blueprint, compiled.costs
        chip, dtype = self.question.target.chip, str(blueprint.placed.dtype)
        if self.question.target.has_stand_in:
            costs = self._as_on_a_gpu(costs, compiled.rows)
        of_model = blueprint.placed, blueprint.model, load
        added = attention_work(*of_model) + expert_work(*of_model, num_rows=compiled.rows)
        counts: dict[str, float] = {}
        for one, count in costs.collectives.items():
            counts[one.opcode] = counts.get(one.opcode, 0) + count
        return PlannedStep(
            compiled.program,
            load,
            costs.total_flops + added.flops,
            costs.num_bytes + added.num_bytes,
            costs.sent_bytes,
            counts,
            step_time(costs, added, chip, _HLO_TYPES[dtype]) if chip.bytes_per_second else None,
        )

    def _as_on_a_gpu(self, costs: Costs, rows: int) -> Costs:
        """Counts of a program that was compiled for a CPU in float32: products and exchanges in the model's type, and
        for bytes what must move, each weight but experts' once and each row's activations in and out of a layer's
        blocks.
        """
        placed, model = self.blueprint.placed, self.blueprint.model
        itemsize = placed.dtype.itemsize
        embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size * itemsize
        embedding //= placed.placement.weights.num_parts("vocab", "embed")
        activations = 4 * rows * model.hidden_size * itemsize * model.num_hidden_layers
        num_bytes = self.needs.weights - embedding - expert_bytes(self.blueprint) + activations
        flops = {_HLO_TYPES[str(placed.dtype)]: costs.total_flops}
        sent = {replace(one, num_bytes=one.num_bytes * itemsize / 4): count for one, count in costs.collectives.items()}
        return replace(costs, flops=flops, num_bytes=num_bytes, collectives=sent)

    def _bounds(self, steps: dict[str, PlannedStep]) -> Bounds | None:
        if not steps or steps["decode"].time is None or steps["prefill"].time is None:
            return None
        question, decode, prefill = self.question, steps["decode"], steps["prefill"]
        assert decode.time is not None and prefill.time is not None
        chunks = -(-question.input_len // prefill.load.new_tokens)
        tpot, sequences = decode.time.total, decode.load.num_sequences
        # Of a server's time, for one request: its tokens' share of full steps, which have room for decodes beside
        # prompts, and its share of as many steps as it draws tokens in.
        rows = (question.input_len + question.output_len) / prefill.load.new_tokens
        seconds = max(rows * prefill.time.total, question.output_len * tpot / sequences)
        ttft = chunks * prefill.time.total
        return Bounds(ttft, tpot, self._replicas * question.output_len / seconds, sequences)

    def _notes(self) -> tuple[str, ...]:
        found = []
        if self.context < (own := self.blueprint.model.max_model_len):
            found.append(f"max_model_len is lowered from the model's own {own} to {self.context}, which fits")
        if self.question.target.has_stand_in:
            found.append(
                "analytic: no program for a GPU was compiled, for XLA:GPU is not installed (pip install "
                "'jax-engine[cuda]' brings it, and needs no GPU); operations and exchanges are counted in the program "
                "of as many CPU devices, which is cut into the same parts; memory and bytes moved are by arithmetic"
            )
        elif self.compiled and self.question.target.chip.platform == "gpu":
            found.append(
                "compiled by XLA:GPU without a GPU to time its kernels on: it takes its default ones, which may move "
                "more bytes than the best would"
            )
        if self.question.target.chip.platform == "tpu" and self.blueprint.placed.geometry.partitions.striped:
            found.append("no kernel attends over stripes of pages: attention is XLA's (attention_backend='xla')")
        if self.question.target.chip.platform == "cpu":
            found.append("a CPU has no figures to divide by: there are no times")
        for one in self.compiled:
            if loops := one.costs.unknown_loops:
                found.append(f"{len(loops)} loops of {one.program} depend on data and count as one trip: {loops[0]}")
            if kernels := sorted(set(one.costs.kernels) & {"tpu_custom_call"}):
                found.append(f"{one.program} runs kernels besides attention's, whose work is not counted: {kernels[0]}")
        return tuple(dict.fromkeys(found))
