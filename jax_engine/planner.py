"""Sizes derived before anything large is allocated: step shapes, pages, context."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_engine.config import EngineConfig
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import PageShape, split_page_shape
from jax_engine.row_blocks import whole_blocks
from jax_engine.sharding import Placement
from jax_engine.step_batch import Bucket

logger = logging.getLogger(__name__)

DEFAULT_CPU_CACHE_BYTES = 2 * 2**30  # a development machine's share; serving more is a flag away
SMALLEST_STEP = 8  # below it, step programs would multiply for no gain


@dataclass(frozen=True)
class CacheGeometry:
    """One page of the cache, all layers."""

    num_layers: int
    page_shape: PageShape  # of one layer
    dtype: np.dtype
    num_parts: int = 1  # devices that the key and value heads are split over

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        *,
        page_size: int,
        dtype: jnp.dtype,
        page_shape: Callable[[int, int, int], PageShape] = split_page_shape,
        placement: Placement | None = None,
    ) -> "CacheGeometry":
        """Pages of `page_size` tokens, shaped as the attention implementation wants them (`Ops.page_shape`)."""
        placement = placement or Placement()
        heads = model.num_key_value_heads * placement.kv_head_copies
        shape = page_shape(heads, page_size, model.head_dim)
        return cls(model.num_hidden_layers, shape, np.dtype(dtype), placement.num_parts("kv_heads"))

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.page_shape[2]

    def shape(self, num_pages: int) -> tuple[int, ...]:
        """Of the whole cache, over all devices."""
        return (self.num_layers, num_pages, *self.page_shape)

    @property
    def page_bytes(self) -> int:
        """Memory of a page on each device."""
        return int(np.prod(self.shape(1))) * self.dtype.itemsize // self.num_parts

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


@dataclass(frozen=True)
class MemoryPlan:
    """How many pages the cache has, how long a sequence may be, and why."""

    num_pages: int
    max_model_len: int
    reason: str


def bucket_lattice(max_num_seqs: int, token_budget: int, row_block: int | None = None) -> tuple[Bucket, ...]:
    """The step shapes: token counts up to the budget, each with all the sequences it can hold.

    One and `SMALLEST_STEP` serve the few-sequence decode, powers of two the rest, with a step between two of them
    where decode is at home (up to `max_num_seqs`). A step's cost follows its token rows; padding sequences cost next to
    nothing in attention, whose loops run over real lengths. Where steps run in blocks of `row_block` rows, their cost
    follows their blocks, and one shape of whole blocks is all there is.
    """
    if row_block is not None:
        return (Bucket(whole_blocks(token_budget, row_block), whole_blocks(max_num_seqs, row_block)),)
    sizes = {1, min(SMALLEST_STEP, token_budget), max_num_seqs, token_budget}
    size = SMALLEST_STEP
    while size < token_budget:
        sizes.add(size)
        if 2 * SMALLEST_STEP <= size < max_num_seqs:
            sizes.add(size * 3 // 2)
        size *= 2
    return tuple(Bucket(tokens, min(tokens, max_num_seqs)) for tokens in sorted(sizes) if tokens <= token_budget)


def longest_context(config: EngineConfig, model: ModelConfig) -> int:
    """The configured context, checked against the model's own."""
    if config.max_model_len is None:
        return model.max_model_len
    if config.max_model_len > model.max_model_len:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the {model.max_model_len} tokens that the model was "
            "made for (max_position_embeddings and rope scaling in its config.json); lower it"
        )
    return config.max_model_len


def plan_memory(config: EngineConfig, model: ModelConfig, geometry: CacheGeometry, available: int | None) -> MemoryPlan:
    """Divide memory into pages.

    `available` is what the device has left for pages once weights and the largest step's temporaries are taken (None
    on a CPU, where it is host memory and a setting). No more pages are made than all sequences can fill.

    Raises:
        ValueError: the pages cannot hold one sequence of `max_model_len`; with the numbers and what would fit.
    """
    context = longest_context(config, model)
    if config.kv_cache_memory_bytes is not None:
        budget, reason = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif available is None:
        # Devices that a CPU pretends to be share its memory.
        budget = DEFAULT_CPU_CACHE_BYTES // geometry.num_parts
        reason = "the default on a CPU; kv_cache_memory_bytes sets it"
    else:
        budget, reason = available, f"what gpu_memory_utilization={config.gpu_memory_utilization} leaves"
    fits = max(0, budget) // geometry.page_bytes
    useful = geometry.pages_for(context) * config.max_num_seqs
    if fits < geometry.pages_for(context):
        holds = fits * geometry.page_size
        if config.max_model_len is None and holds >= min(context, 2048):
            logger.warning("max_model_len lowered from %d to %d: the cache has room for no more", context, holds)
            return MemoryPlan(fits, holds, reason)
        needed = geometry.pages_for(context) * geometry.page_bytes
        raise ValueError(
            f"max_model_len={context} needs {needed / 2**20:.1f} MiB of KV cache for one sequence, and there are "
            f"{max(0, budget) / 2**20:.1f} MiB ({reason}), room for {holds} tokens; "
            f"lower max_model_len to {max(holds, 1)} or less, or set kv_cache_memory_bytes to at least {needed}"
        )
    if useful < fits:
        reason = f"{config.max_num_seqs} sequences of {context} tokens"
    return MemoryPlan(min(fits, useful), context, reason)


def host_pages(config: EngineConfig, geometry: CacheGeometry) -> int:
    """Pages that the configured host memory holds.

    Raises:
        ValueError: not one.
    """
    page_bytes = geometry.page_bytes * geometry.num_parts
    if 0 < config.host_cache_bytes < page_bytes:
        name = "kv_offloading_size" if config.kv_offloading_size else "swap_space"
        raise ValueError(
            f"{name}={getattr(config, name)} is {config.host_cache_bytes} bytes in all, less than one KV page "
            f"({page_bytes} bytes); raise it, or set it to 0"
        )
    return config.host_cache_bytes // page_bytes


def memory_for_pages(step: jax.stages.Compiled, limit: int, utilization: float, cache_bytes: int) -> int:
    """Bytes of a device left for pages: its `limit` times `utilization`, less what the largest step takes (weights,
    temporaries, code).

    `cache_bytes` is the cache that this step was compiled with, which is no part of that.
    """
    analysis = step.memory_analysis()
    assert analysis is not None
    taken = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.generated_code_size_in_bytes
        - cache_bytes
    )
    return int(limit * utilization) - taken
