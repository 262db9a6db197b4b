"""What an engine needs of each device's memory, by arithmetic: known before anything is compiled or read."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.planner import least_context, longest_sequence
from jax_engine.sharding.placed_model import StateSize
from jax_engine.sharding.unsplit_weights import unsplit_giants

_MOST_GIANTS = 3  # that an error names


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on each device."""

    weights: int
    state: int  # what steps keep and are given, besides pages
    temporaries: int  # of the largest step: what it must hold at once, at least
    page: int  # one, of all caches
    page_tokens: int
    least_context: int  # tokens that a sequence must have room for
    least_pages: int  # that it takes, of a partition

    @classmethod
    def of(cls, blueprint: Blueprint) -> "DeviceMemory":
        """Of an engine under its settings."""
        placed, config = blueprint.placed, blueprint.config
        geometry, context = placed.geometry, blueprint.model.max_model_len
        size = StateSize(geometry.partitions.count, config.max_num_seqs, geometry.pages_for(context))
        state = bytes_of(jax.tree.leaves(placed.state_shapes(size))) - geometry.planned_bytes
        state += bytes_of(jax.tree.leaves(placed.full_state_shapes(config.max_num_seqs)))
        least = least_context(config, context)
        weights = bytes_of(placed.leaf_shapes()) + (blueprint.draft.num_bytes if blueprint.draft else 0)
        return cls(
            weights,
            state,
            _temporaries(blueprint),
            geometry.planned_bytes,
            geometry.page_size,
            least,
            geometry.most_pages(least, config.token_budget),
        )

    @property
    def fixed(self) -> int:
        """All but pages."""
        return self.weights + self.state + self.temporaries

    @property
    def least(self) -> int:
        """With the smallest cache that is of use."""
        return self.fixed + self.least_pages * self.page


def host_memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_of(shapes: Iterable[Any]) -> int:
    """Bytes of arrays' shapes on each device, by their shardings."""
    return sum(
        prod(one.shape if one.sharding is None else one.sharding.shard_shape(one.shape)) * one.dtype.itemsize
        for one in shapes
    )


def expert_bytes(blueprint: Blueprint) -> int:
    """Of the weights, those of experts, on each device."""
    placed = blueprint.placed
    shapes = zip(placed.structure.parameters, placed.leaf_shapes(), strict=True)
    return bytes_of(shape for parameter, shape in shapes if "experts" in parameter.logical_axes)


def split_weights(blueprint: Blueprint) -> int:
    """Of the weights, bytes on each device that more devices would divide: those that are split, or all on one."""
    shapes = blueprint.placed.leaf_shapes()
    if prod(blueprint.config.parallel_sizes) == 1:
        return bytes_of(shapes)
    return bytes_of(shape for shape in shapes if not shape.sharding.is_fully_replicated)


def _temporaries(blueprint: Blueprint) -> int:
    """Of the largest step: the residual stream before and after a block, what the feed-forward makes of every row, and
    the logits.
    """
    model, placed = blueprint.model, blueprint.placed
    bucket = max(blueprint.layouts)
    partition, itemsize = placed.placement.activations, placed.dtype.itemsize
    widths = 2 * model.hidden_size + model.intermediate_size // partition.num_parts("mlp")
    logits = 4 * bucket.num_sequences * model.vocab_size // partition.num_parts("vocab")
    return bucket.num_tokens * widths * itemsize + logits


def check_memory(blueprint: Blueprint, limit: int | None) -> None:
    """Refuse an engine that cannot fit in its devices' memory of `limit` bytes each, before anything is compiled or
    read. On a CPU, whose devices share it, the limit is this machine's memory; elsewhere None is no limit.

    Raises:
        ValueError: weights, the temporaries of a step and the cache of one sequence are more; with what would fit.
    """
    config, needs = blueprint.config, DeviceMemory.of(blueprint)
    if blueprint.device.platform == "cpu":
        usable, where = host_memory_bytes() // prod(config.parallel_sizes), "this machine's memory"
    elif limit is not None:
        usable = int(limit * config.gpu_memory_utilization)
        where = f"gpu_memory_utilization={config.gpu_memory_utilization} of {gib(limit)}"
    else:
        return
    cache = config.kv_cache_memory_bytes or needs.least_pages * needs.page
    if needs.fixed + cache > usable:
        reason = shortage(blueprint, needs, usable, where=where, cache=cache)
        found = remedies(blueprint, needs, usable)
        raise ValueError(f"model={config.model or 'demo'!r} {reason}; {'; or '.join(found)}")


def shortage(blueprint: Blueprint, needs: DeviceMemory, usable: int, *, where: str, cache: int) -> str:
    """Why an engine does not fit in `usable` bytes of each device; `where` says what they are of."""
    sizes = (needs.weights, needs.state + needs.temporaries, cache, needs.fixed + cache, usable)
    weights, step, pages, total, there = (gib(size) for size in sizes)
    reason = (
        f"needs {total} of each device and there are {there} ({where}): {weights} of weights, {step} for steps, "
        f"{pages} of KV cache for one sequence of {needs.least_context} tokens"
    )
    giants = unsplit_giants(blueprint.placed, needs.fixed + cache - usable)
    others = [f"and {len(giants) - _MOST_GIANTS} smaller ones"] if len(giants) > _MOST_GIANTS else []
    return "; ".join([reason, *(giant.describe() for giant in giants[:_MOST_GIANTS]), *others])


def shorter(blueprint: Blueprint, needs: DeviceMemory, usable: int) -> list[str]:
    """What to lower so that one sequence fits; nothing, where not even the weights do."""
    given, left = blueprint.config.kv_cache_memory_bytes, usable - needs.fixed
    if given is not None:
        return [f"lower kv_cache_memory_bytes to {left} or less"] if left > 0 else []
    pages = max(0, left) // needs.page
    tokens = longest_sequence(blueprint.placed.geometry, pages, blueprint.config.token_budget)
    return [f"lower max_model_len to {tokens} or less"] if tokens > 0 else []


def remedies(blueprint: Blueprint, needs: DeviceMemory, usable: int) -> list[str]:
    """What to change so that an engine fits; over more devices, each has less of weights and pages."""
    size, spread = blueprint.config.tensor_parallel_size, split_weights(blueprint) + needs.least_pages * needs.page
    kept = needs.least - spread
    enough = next((factor for factor in (2, 4, 8, 16, 32, 64) if kept + spread / factor <= usable), None)
    more = "use devices with more memory"
    if enough is not None:
        more = f"share it between more devices: tensor_parallel_size={size * enough} is about enough"
    return [*shorter(blueprint, needs, usable), more]


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
