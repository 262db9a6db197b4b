"""Sizes derived before anything large is allocated: step shapes, pages, context."""

import logging
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_engine.config import EngineConfig
from jax_engine.execution.row_blocks import whole_blocks
from jax_engine.execution.step_batch import Bucket
from jax_engine.execution.step_program import Program
from jax_engine.kv_cache.page_partitions import UNCUT, PagePartitions
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import CacheLayout, KVPages, PageShape, split_page_shape
from jax_engine.sampling.sampler import LOOPING_MODES, SamplingMode
from jax_engine.sharding.sharding import Placement

logger = logging.getLogger(__name__)

DEFAULT_CPU_CACHE_BYTES = 2 * 2**30  # a development machine's share; serving more is a flag away
# Step programs of all sizes: at most 40 in all, since loops and drafts exclude each other.
MAX_PROGRAMS = 24  # in the modes that most requests need
MAX_FULL_PROGRAMS = 8  # in the FULL mode, which few do: forward passes and draws
FULL_SIZE_STEP = 4  # its step sizes grow by this factor
MAX_LOOP_PROGRAMS = 8  # beside them, where decodes loop on the device
MAX_DRAFT_PROGRAMS = 8  # beside them, for steps with drafted tokens
MAX_DRAFT_MODEL_PROGRAMS = 6  # of a model that drafts them; in place of as many of `MAX_PROGRAMS`
SMALLEST_SPLIT = 8  # the least power of two with a size between it and the next one: rows of small steps are cheap


@dataclass(frozen=True)
class CacheGeometry:
    """One page of the cache, all layers of a cache group, on whatever device they are."""

    layout: CacheLayout
    page_shape: PageShape  # of one layer
    dtype: np.dtype
    num_parts: int = 1  # that a page is split into, each on a device of its own
    num_stages: int = 1  # each of which has layers as `layout` says
    partitions: PagePartitions = UNCUT  # of the pages, each on devices of its own
    as_bits: bool = False  # of 8-bit floats
    draft_bytes: int = 0  # memory, on each device, of the page of the same number in the draft model's cache

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        layout: CacheLayout,
        *,
        page_size: int,
        dtype: jnp.dtype,
        page_shape: Callable[[int, int, int], PageShape] = split_page_shape,
        placement: Placement | None = None,
        floats_as_bits: bool = False,
    ) -> "CacheGeometry":
        """Pages of `page_size` tokens, as attention wants them; 8-bit floats as their bits where it does."""
        placement = placement or Placement()
        heads = model.num_key_value_heads * placement.widening.kv_head_copies
        shape = page_shape(heads, page_size, model.head_dim)
        parts, partitions = placement.activations.num_parts, placement.page_partitions
        sizes = parts("kv_heads", "cache_layers"), parts("cache_layers")
        as_bits = floats_as_bits and np.dtype(dtype).itemsize == 1 and not jnp.issubdtype(dtype, jnp.integer)
        return cls(layout, shape, np.dtype(dtype), *sizes, partitions, as_bits)

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.page_shape[2]

    def shape(self, num_pages: int) -> tuple[int, ...]:
        """Of the whole cache, over all devices."""
        return (self.num_stages * self.layout.layers_a_page, num_pages, *self.page_shape)

    def empty_cache(self, num_pages: int) -> KVPages:
        """Of zeros, all of it."""
        return KVPages.zeros(self.shape(num_pages), jnp.dtype(self.dtype), as_bits=self.as_bits)

    @property
    def page_bytes(self) -> int:
        """Memory of a page on each device that has it."""
        return int(np.prod(self.shape(1))) * self.dtype.itemsize // self.num_parts

    @property
    def planned_bytes(self) -> int:
        """Memory that a page takes on each device that has it, in all caches."""
        return self.page_bytes + self.draft_bytes

    def cache_bytes(self, num_pages: int) -> int:
        """Memory that a cache of so many pages, and the draft model's, take on each device."""
        return num_pages // self.partitions.count * self.planned_bytes

    def pages_for(self, num_tokens: int) -> int:
        """Entries of one cache group's block table."""
        return -(-num_tokens // self.page_size)

    def most_pages(self, num_tokens: int, token_budget: int) -> int:
        """Pages of all cache groups that a sequence of so many tokens ever holds at once in one partition.

        A step of n of its tokens needs what the first of them sees and the n themselves: within a window of w, w - 1 +
        n tokens, which begin anywhere in a page.
        """
        whole, step = self.pages_for(num_tokens), min(num_tokens, token_budget)
        stripes = self.partitions.count if self.partitions.striped else 1
        return sum(
            -(-(min(whole, self.pages_for(window + step - 2) + 1) if window else whole) // stripes)
            for window in self.layout.windows
        )

    def useful_pages(self, num_tokens: int, num_sequences: int) -> int:
        """Pages of one partition that so many sequences of so many tokens fill, evenly spread."""
        rows, partitions = self.pages_for(num_tokens), self.partitions
        if partitions.striped:
            rows = -(-rows // partitions.count)
        else:
            num_sequences = -(-num_sequences // partitions.count)
        return rows * self.layout.num_groups * num_sequences


@dataclass(frozen=True)
class MemoryPlan:
    """How many pages the cache has, how long a sequence may be, and why."""

    num_pages: int
    max_model_len: int
    reason: str


def step_sizes(max_num_seqs: int, token_budget: int, *, max_programs: int = MAX_PROGRAMS) -> tuple[int, ...]:
    """Token counts that steps are padded to, in ascending order: 1, `max_num_seqs` and `token_budget`, and between
    them powers of two and their middles, as far as `max_programs` allow.

    What goes first, where they do not allow all, is the size whose absence adds least padding (`_padding_without`).
    """
    sizes = {1, max_num_seqs, token_budget}
    power = 2
    while power <= token_budget:
        sizes |= {power, power * 3 // 2} if power >= SMALLEST_SPLIT else {power}
        power *= 2
    ladder = sorted(size for size in sizes if size <= token_budget)
    while sum(len(_modes(size, max_num_seqs)) for size in ladder) > max_programs:
        _thin(ladder, (1, max_num_seqs, token_budget))
    return tuple(ladder)


def full_step_sizes(max_num_seqs: int, token_budget: int) -> tuple[int, ...]:
    """The same for steps of the FULL mode, each of which takes a draw besides: fewer, powers of `FULL_SIZE_STEP`."""
    sizes, power = {1, max_num_seqs, token_budget}, 1
    while power < token_budget:
        sizes.add(power)
        power *= FULL_SIZE_STEP
    ladder = sorted(sizes)
    while sum(1 + (size <= max_num_seqs) for size in ladder) > MAX_FULL_PROGRAMS:
        _thin(ladder, (1, max_num_seqs, token_budget))
    return tuple(ladder)


def _thin(ladder: list[int], fixed: Sequence[int]) -> None:
    """Remove the size whose absence adds least padding, but none of those that are `fixed`."""
    spare = [size for size in ladder if size not in fixed]
    ladder.remove(min(spare, key=lambda size: (_padding_without(size, ladder), size)))


def _padding_without(size: int, ladder: Sequence[int]) -> float:
    """Padding, as a share of its rows, that a step gains when `size` leaves the ladder, over steps that are as likely
    at every scale. Rounded: ladders of powers of two are full of ties.
    """
    index = ladder.index(size)
    below, above = ladder[index - 1], ladder[index + 1]
    return round((above / size - 1) * math.log(size / below), 9)


def _modes(size: int, max_num_seqs: int) -> Sequence[SamplingMode]:
    """Sampling modes that a step size is compiled for, FULL apart. Steps larger than `max_num_seqs` hold a chunk of a
    prompt, beside which the cost of drawing is small: one mode that can do both serves them all.
    """
    return LOOPING_MODES if size <= max_num_seqs else LOOPING_MODES[-1:]


def programs_of(config: EngineConfig, *, row_block: int | None, only_full: bool) -> tuple[Program, ...]:
    """Every program there will be of an engine; `row_block` and `only_full` as in `step_programs`."""
    limits, speculation = (config.max_num_seqs, config.token_budget), config.speculation
    with_drafts: tuple[Program, ...] = ()
    of_draft_model: tuple[Program, ...] = ()
    if speculation is not None:
        num_drafts = speculation.num_speculative_tokens
        with_drafts = draft_programs(*limits, num_drafts, row_block=row_block, only_full=only_full)
        if config.draft_model is not None:
            of_draft_model = draft_model_programs(*limits, speculation.num_speculative_tokens)
    if with_drafts and row_block is not None:
        return *with_drafts, *of_draft_model
    plain = step_programs(
        *limits,
        row_block=row_block,
        num_steps=config.num_scheduler_steps,
        only_full=only_full,
        max_programs=MAX_PROGRAMS - len(of_draft_model),
    )
    return *plain, *with_drafts, *of_draft_model


def step_programs(
    max_num_seqs: int,
    token_budget: int,
    *,
    row_block: int | None = None,
    num_steps: int = 1,
    only_full: bool = False,
    max_programs: int = MAX_PROGRAMS,
) -> tuple[Program, ...]:
    """Every step program there will be: step sizes, each with all the sequences that it can hold, in their modes.

    A step's cost follows its token rows; padding sequences cost next to nothing in attention, whose loops run over
    real lengths. Where steps run in blocks of `row_block` rows, their cost follows their blocks, and one program of
    whole blocks, in the mode that does everything, is all there is.

    The FULL mode has fewer sizes, or, with `only_full`, all of them to itself, and draws besides. With `num_steps`
    above 1 there are loops of so many steps besides, for decodes alone, at fewer sizes and not in the FULL mode.
    """
    if row_block is not None:
        bucket = Bucket(whole_blocks(token_budget, row_block), whole_blocks(max_num_seqs, row_block))
        return with_draws([Program(bucket, SamplingMode.FULL)])
    if only_full:
        sizes = step_sizes(max_num_seqs, token_budget)
        return with_draws([Program(Bucket(size, min(size, max_num_seqs)), SamplingMode.FULL) for size in sizes])
    kinds = [(1, size) for size in step_sizes(max_num_seqs, token_budget, max_programs=max_programs)]
    if num_steps > 1:
        loop_sizes = step_sizes(max_num_seqs, max_num_seqs, max_programs=MAX_LOOP_PROGRAMS)
        kinds += [(num_steps, size) for size in loop_sizes]
    full = [(1, size, SamplingMode.FULL) for size in full_step_sizes(max_num_seqs, token_budget)]
    return with_draws(
        [
            Program(Bucket(size, min(size, max_num_seqs)), mode, steps)
            for steps, size, mode in [
                *((steps, size, mode) for steps, size in kinds for mode in _modes(size, max_num_seqs)),
                *full,
            ]
        ]
    )


def with_draws(programs: Sequence[Program]) -> tuple[Program, ...]:
    """The programs, and behind them those that draw for them."""
    return tuple(dict.fromkeys((*programs, *(part for program in programs for part in program.parts))))


def draft_programs(
    max_num_seqs: int, token_budget: int, num_drafts: int, *, row_block: int | None = None, only_full: bool = False
) -> tuple[Program, ...]:
    """Step programs for ranges with up to `num_drafts` drafted tokens: those of one sequence, and from there on powers
    of two times as many rows up to the token budget, as far as `MAX_DRAFT_PROGRAMS` allow; in the FULL mode the first
    and the last of them, with their draws, or, with `only_full`, half as many as are allowed, and no others.

    Where steps run in blocks of `row_block` rows, the one program that does everything draws behind drafts, too: what
    a step has of them must not show in its numbers, and the same arithmetic in another program may end in other bits.
    """
    most, smallest = max_num_seqs * (1 + num_drafts), min(1 + num_drafts, token_budget)
    if row_block is not None:
        bucket = Bucket(whole_blocks(token_budget, row_block), whole_blocks(max_num_seqs, row_block))
        rows = whole_blocks(min(token_budget, most), row_block)
        return with_draws([Program(bucket, SamplingMode.FULL, draft_rows=rows)])
    ends = tuple(sorted({smallest, token_budget}))
    ladder = sorted({*(smallest * 2**power for power in range((token_budget // smallest).bit_length())), token_budget})
    while len(ladder) > (MAX_DRAFT_PROGRAMS // 2 if only_full else MAX_DRAFT_PROGRAMS - 2 * len(ends)):
        _thin(ladder, ends)
    others = () if only_full else ladder
    full = ladder if only_full else ends
    kinds = [*((size, LOOPING_MODES[-1]) for size in others), *((size, SamplingMode.FULL) for size in full)]
    return with_draws(
        [Program(Bucket(size, min(size, max_num_seqs)), mode, draft_rows=min(size, most)) for size, mode in kinds]
    )


def draft_model_programs(max_num_seqs: int, token_budget: int, num_drafts: int) -> tuple[Program, ...]:
    """Programs of the draft model: two tokens of each sequence, as are new to it after all its drafts were right, for
    one sequence and powers of two times as many; and the token budget, for prompts. At most `MAX_DRAFT_MODEL_PROGRAMS`.
    """
    most = min(2 * max_num_seqs, token_budget)
    ladder = sorted({*(min(2**power, most) for power in range(1, most.bit_length() + 1)), token_budget})
    while len(ladder) > MAX_DRAFT_MODEL_PROGRAMS:
        _thin(ladder, (ladder[0], token_budget))
    return tuple(
        Program(Bucket(size, min(-(-size // 2) if size < token_budget else size, max_num_seqs)), mode, num_drafts=count)
        for size, mode, count in ((size, SamplingMode.SAMPLE, num_drafts) for size in ladder)
    )


def largest_padding(sizes: Sequence[int]) -> float:
    """Share of a step's rows that are padding at worst, for step sizes in ascending order."""
    return max((above - below - 1) / above for below, above in zip((0, *sizes), sizes, strict=False))


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
    on a CPU, where it is host memory and a setting). No more pages are made than are of use (`most_pages_of_use`), nor,
    of a CPU's memory by default, than all sequences can fill.

    Raises:
        ValueError: the pages cannot hold one sequence of `max_model_len`; with the numbers and what would fit.
    """
    context = longest_context(config, model)
    if config.kv_cache_memory_bytes is not None:
        budget, reason = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    elif available is None:
        # Devices that a CPU pretends to be share its memory.
        budget = DEFAULT_CPU_CACHE_BYTES // (geometry.num_parts * geometry.partitions.count)
        reason = "the default on a CPU; kv_cache_memory_bytes sets it"
    else:
        budget, reason = available, f"what gpu_memory_utilization={config.gpu_memory_utilization} leaves"
    fits = max(0, budget) // geometry.planned_bytes
    useful, count = most_pages_of_use(config, context, geometry), geometry.partitions.count
    if config.kv_cache_memory_bytes is None and available is None:
        useful = geometry.useful_pages(context, config.max_num_seqs)
    least = geometry.most_pages(context, config.token_budget)
    if fits < least:
        holds = longest_sequence(geometry, fits, config.token_budget)
        if config.max_model_len is None and holds >= least_context(config, context):
            logger.warning("max_model_len lowered from %d to %d: the cache has room for no more", context, holds)
            return MemoryPlan(fits * count, holds, reason)
        needed = least * geometry.planned_bytes
        raise ValueError(
            f"max_model_len={context} needs {needed / 2**20:.1f} MiB of KV cache for one sequence, and there are "
            f"{max(0, budget) / 2**20:.1f} MiB ({reason}), room for {holds} tokens; "
            f"lower max_model_len to {max(holds, 1)} or less, or set kv_cache_memory_bytes to at least {needed}"
        )
    if useful is None or fits <= useful:
        return MemoryPlan(fits * count, context, reason)
    return MemoryPlan(useful * count, context, f"{config.max_num_seqs} sequences of {context} tokens")


def most_pages_of_use(config: EngineConfig, context: int, geometry: CacheGeometry) -> int | None:
    """Pages of one partition beyond which more would lie idle; None where later requests find them as prefixes."""
    # Pages that have left a window count, too: of what sequences fill, not of what they hold.
    return None if config.enable_prefix_caching else geometry.useful_pages(context, config.max_num_seqs)


def least_context(config: EngineConfig, context: int) -> int:
    """The context that there must be room for: what is configured, else as much of the model's own as is of use."""
    return context if config.max_model_len is not None else min(context, 2048)


def longest_sequence(geometry: CacheGeometry, num_pages: int, token_budget: int) -> int:
    """Tokens, in whole pages, of the longest sequence that `num_pages` of a partition suffice for."""
    size = geometry.page_size
    lengths = range(0, (num_pages * geometry.partitions.count + 1) * size, size)
    return lengths[bisect_right(lengths, num_pages, key=lambda length: geometry.most_pages(length, token_budget)) - 1]


def host_pages(config: EngineConfig, geometry: CacheGeometry) -> int:
    """Pages that the configured host memory holds.

    Raises:
        ValueError: not one.
    """
    page_bytes = geometry.page_bytes * geometry.num_parts * geometry.partitions.count  # each keeps a copy
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
