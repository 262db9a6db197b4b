"""What an engine's models have in common: devices, how they share a model, and what it runs with."""

from collections.abc import Sequence
from math import prod
from typing import TypedDict

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_engine.config import EngineConfig
from jax_engine.models.config import ModelConfig
from jax_engine.sharding.placed_model import resolve_cache_dtype, resolve_dtype
from jax_engine.sharding.sharding import make_mesh
from jax_engine.sharding.sharding_rules import strategy_of
from jax_engine.sharding.strategies import Strategy


class Surroundings(TypedDict):
    """What a draft model has in common with the model that it drafts for; see `PlacedModel.of`."""

    platform: str
    mesh: Mesh | None
    strategy: Strategy
    attention_backend: str
    dtype: DTypeLike
    page_size: int
    cache_dtype: DTypeLike
    calculate_kv_scales: bool
    scan_layers: bool


def surroundings_of(config: EngineConfig, model: ModelConfig, devices: Sequence[jax.Device]) -> Surroundings:
    """What the settings ask for, for a model on the first of these devices.

    Raises:
        ValueError: there are fewer devices, or the settings describe no strategy.
    """
    platform, strategy = devices[0].platform, strategy_of(config, model)
    shape = strategy.mesh_shape(*config.parallel_sizes, asked=config.mesh_shape)
    # Without a mesh, arrays are for this process's first device.
    needs_mesh = prod(shape.values()) > 1 or devices[0] not in jax.devices()
    on_cpu, dtype = platform == "cpu", resolve_dtype(config.dtype, model.dtype, platform)
    return {
        "platform": platform,
        "mesh": make_mesh(shape, devices) if needs_mesh else None,
        "strategy": strategy,
        "attention_backend": config.attention_backend,
        "dtype": dtype,
        "cache_dtype": resolve_cache_dtype(config.kv_cache_dtype, dtype),
        "calculate_kv_scales": config.calculate_kv_scales,
        "page_size": config.block_size or (8 if on_cpu else 64),
        # Elsewhere XLA copies a layer's weights out of the stack before it uses them: three times their traffic.
        "scan_layers": platform == "tpu" if config.scan_layers is None else config.scan_layers,
    }
