"""What the runner says once, of the sizes that it has chosen."""

import logging
from collections.abc import Sequence

from jax_engine.compilation.planner import CacheGeometry, MemoryPlan, largest_padding
from jax_engine.config import EngineConfig
from jax_engine.execution.step_program import Program
from jax_engine.sharding.placed_model import PlacedModel

logger = logging.getLogger(__name__)


def log_cache(memory: MemoryPlan, geometry: CacheGeometry) -> None:
    logger.info(
        "KV cache: %d pages of %d tokens in %s, %.1f MiB a device (%s)",
        memory.num_pages,
        geometry.page_size,
        geometry.dtype.name,
        geometry.cache_bytes(memory.num_pages) / 2**20,
        memory.reason,
    )
    if any(geometry.layout.windows):
        logger.info("cache groups: %s", geometry.layout.describe())


def log_adapters(config: EngineConfig, placed: PlacedModel) -> None:
    if config.enable_lora:
        logger.info(
            "adapters: %d on the device at once, of rank %d at most, %.1f MiB",
            config.max_loras,
            config.max_lora_rank,
            placed.structure.adapter_bytes / 2**20,
        )


def log_step_programs(programs: Sequence[Program], step_sizes: Sequence[int], row_block: int | None) -> None:
    if row_block is not None:
        logger.info("step programs: one, of blocks of %d token rows", row_block)
        return
    logger.info(
        "step programs: %d, of %s token rows; padding is %.0f %% of a step at most",
        len(programs),
        ", ".join(map(str, step_sizes)),
        100 * largest_padding(step_sizes),
    )
