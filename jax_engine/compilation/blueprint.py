"""An engine before its weights: its model laid out on devices, its step programs, and how each is traced.

The runner serves with it. On devices that are not here, those of a `jax.experimental.topologies` description, it is
what compiles ahead of time.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jax_engine.adapters.adapter_store import AdapterStore
from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.compilation.planner import MemoryPlan, longest_context, memory_for_pages, plan_memory, programs_of
from jax_engine.compilation.surroundings import surroundings_of
from jax_engine.config import EngineConfig
from jax_engine.execution.page_copies import lower_page_programs, staging_pages
from jax_engine.execution.step_batch import BatchLayout, Bucket, write_block_tables
from jax_engine.execution.step_program import Program
from jax_engine.loading.loader import load_config
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.models.adapters import AdapterShape
from jax_engine.models.config import ModelConfig
from jax_engine.sampling.logits_processors import load_processors
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import PlacedModel, StateSize
from jax_engine.speculation.draft_model import DraftModel

WRITE_TABLES = "write block tables"


@dataclass(frozen=True)
class Blueprint:
    """What is known of an engine, and can be compiled, before anything large is read."""

    config: EngineConfig
    folder: Path  # of the model
    model: ModelConfig
    device: jax.Device  # the first
    is_here: bool  # whether this process can run what is compiled for it
    placed: PlacedModel
    draft: DraftModel | None
    programs: tuple[Program, ...]
    layouts: Mapping[Bucket, BatchLayout]  # of the model's own programs
    step_sizes: tuple[int, ...]  # token rows that the scheduler may fill

    @classmethod
    def of(cls, config: EngineConfig, devices: Sequence[jax.Device]) -> "Blueprint":
        """Lay the configured model out on the first of `devices`, as many as the configuration takes.

        Raises:
            ValueError: the model or the settings cannot be served; the message says what would be.
        """
        device = devices[0]
        folder = resolve_model_path(config.model, revision=config.revision)
        model, model_class = load_config(folder)
        model = model.with_max_model_len(longest_context(config, model))
        config.check_whole_prompts(model.max_model_len)
        is_here = device in jax.devices()
        shared = surroundings_of(config, model, devices)
        placed = PlacedModel.of(
            model_class,
            model,
            **shared,
            deterministic=config.deterministic,
            max_logprobs=config.max_logprobs,
            processors=load_processors(config.logits_processors),
            adapters=AdapterShape(config.max_loras, config.max_lora_rank) if config.enable_lora else None,
            quantization=config.quantization,
            num_drafts=config.speculation.num_speculative_tokens if config.speculation else 0,
        )
        draft = DraftModel(config, placed, shared) if config.draft_model is not None else None
        placed = placed if draft is None else draft.target
        programs = programs_of(config, row_block=placed.row_block, only_full=bool(placed.processors))
        layouts = _layouts(config, placed, programs)
        sizes = _step_sizes(placed, programs)
        return cls(config, folder, model, device, is_here, placed, draft, programs, layouts, sizes)

    def plan_memory(self, limit: int | None) -> MemoryPlan:
        """Pages from what the largest steps leave of a device's memory of `limit` bytes, or from the setting.

        Raises:
            ValueError: not one sequence fits; or there is neither a limit nor a setting.
        """
        config, geometry = self.config, self.placed.geometry
        if self.device.platform == "cpu" or config.kv_cache_memory_bytes is not None:
            return plan_memory(config, self.model, geometry, None)
        if limit is None:
            raise ValueError(f"{self.device.device_kind} does not report its memory; set kv_cache_memory_bytes")
        # Temporaries do not depend on the number of pages, so the step is compiled with those of one sequence.
        context = longest_context(config, self.model)
        least = geometry.most_pages(context, config.token_budget) * geometry.partitions.count
        provisional = MemoryPlan(least, context, "provisional")
        largest = CompiledSteps(
            self.programs, lambda program: self.lower(program, provisional)
        ).compile_largest_of_each()
        cache_bytes = geometry.cache_bytes(provisional.num_pages)
        utilization = config.gpu_memory_utilization
        available = min(memory_for_pages(program, limit, utilization, cache_bytes) for program in largest)
        available -= self.adapter_store().staging_bytes  # on its way to a slot
        available -= self.draft.num_bytes if self.draft is not None else 0
        available -= staging_pages(host=config.host_cache_bytes > 0) * geometry.page_bytes
        return plan_memory(config, self.model, geometry, available)

    def adapter_store(self) -> AdapterStore:
        """An empty store of adapters for the model."""
        config = self.config
        return AdapterStore(self.placed, max_rank=config.max_lora_rank, max_adapters=config.num_cpu_loras)

    def lower(self, program: Program, memory: MemoryPlan) -> jax.stages.Lowered:
        """Trace a program."""
        size = self.state_size(memory)
        with nullcontext() if self.is_here else _traced_for(self.device):
            if program.num_drafts and self.draft is not None:
                return self.draft.lower(program, size)
            if program.is_draw:
                return self.placed.lower_draw(program.bucket, size, drafts=program.draft_rows > 0)
            layout = self.layouts[program.bucket]
            steps, rows = program.num_steps, program.draft_rows
            return self.placed.lower(layout, program.mode, size, num_steps=steps, draft_rows=rows)

    def lower_helpers(self, memory: MemoryPlan) -> dict[str, jax.stages.Lowered]:
        """Trace the small programs beside the steps, by name: those that copy pages, and that which writes the block
        tables of a long prompt.
        """
        state = self.placed.state_shapes(self.state_size(memory))
        tables = state.block_tables
        write_tables = jax.jit(write_block_tables, donate_argnums=0, out_shardings=tables.sharding)
        updates = np.empty((tables.shape[1], 3), np.int32)  # one whole block table
        with nullcontext() if self.is_here else _traced_for(self.device):
            return {**lower_page_programs(state.cache), WRITE_TABLES: write_tables.lower(tables, updates)}

    def state_size(self, memory: MemoryPlan) -> StateSize:
        """How large the device state is."""
        longest = self.placed.geometry.pages_for(memory.max_model_len)
        return StateSize(memory.num_pages, self.config.max_num_seqs, longest)


def _layouts(config: EngineConfig, placed: PlacedModel, programs: Sequence[Program]) -> dict[Bucket, BatchLayout]:
    buckets = sorted({program.bucket for program in programs if not program.num_drafts and not program.is_draw})
    num_adapters = config.max_loras if config.enable_lora else 0
    geometry = placed.geometry
    sizes = geometry.page_size, config.max_num_seqs, geometry.layout.num_groups, num_adapters
    return {bucket: BatchLayout(bucket, *sizes) for bucket in buckets}


def _step_sizes(placed: PlacedModel, programs: Sequence[Program]) -> tuple[int, ...]:
    own = [program for program in programs if not program.num_drafts and not program.is_draw]
    if block := placed.row_block:  # a step in blocks of rows costs those that it fills
        largest = max(program.bucket.num_tokens for program in own)
        return tuple(range(block, largest + 1, block))
    mode = SamplingMode.FULL if placed.processors else SamplingMode.SAMPLE
    plain = [program for program in own if program.num_steps == 1 and not program.draft_rows]
    return tuple(sorted({program.bucket.num_tokens for program in plain if program.mode is mode}))


def _traced_for(device: jax.Device) -> use_abstract_mesh:
    """Trace within it, so that Pallas lowers for this device and not for the platform that JAX runs on."""
    num_cores = device.num_cores if device.platform == "tpu" else None  # which GPUs do not have
    described = AbstractDevice(device_kind=device.device_kind, platform=device.platform, num_cores=num_cores)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=described))
