"""A tiny model with caches of several types, on one device and on meshes: hidden states, and what was measured."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny_engine import TINY, placed_model

from jax_engine.config import EngineConfig
from jax_engine.execution.kv_scales import load_weights
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.sharding.placed_model import PlacedModel, resolve_cache_dtype
from jax_engine.sharding.sharding import make_mesh
from jax_engine.sharding.strategies import STRATEGIES

BASE = TINY | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 104, "num_hidden_layers": 3}
LENGTH = 40  # of each of two sequences
TOKENS = np.random.default_rng(1).integers(0, 100, (2, LENGTH), np.int32)
# A strategy, devices that share a layer, and stages. Three layers in two stages leave one that no checkpoint has.
MESHES = {
    "stages": ("tensor", 2, 2),
    "copies of heads": ("tensor", 8, 1),
    "weights gathered": ("fully_sharded", 4, 1),
    "stripes": ("context", 4, 1),
    "owned pages": ("data_attention", 2, 1),
}


def placed_with(cache_dtype: str, hf: dict[str, Any] = BASE, **given: Any) -> PlacedModel:
    dtype = resolve_cache_dtype(cache_dtype, jnp.dtype(jnp.float32))
    return placed_model(hf=hf, **({"cache_dtype": dtype, "scan_layers": True} | given))


def near(found: np.ndarray, expected: np.ndarray) -> float:
    """The difference, as a share of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def hidden_states(placed: PlacedModel, leaves: tuple[jax.Array, ...]) -> np.ndarray:
    """Of two prompts in one step, and of one more token of each in the next."""
    geometry = placed.geometry
    shape = geometry.layout.num_groups, 2, geometry.pages_for(LENGTH)
    size = int(np.prod(shape))  # of a partition
    tables = np.zeros(shape, np.int32)
    for number, (group, row, index) in enumerate(np.ndindex(*shape)):
        tables[group, row, index] = geometry.partitions.of(row % geometry.partitions.count, index) * size + number
    num_pages = size * geometry.partitions.count

    def step(leaves: tuple[jax.Array, ...], cache: KVPages, tokens: np.ndarray, end: int) -> tuple[jax.Array, KVPages]:
        each = tokens.shape[1]
        table = SequenceTable.build(
            jnp.asarray(tables),
            jnp.arange(3, dtype=jnp.int32) * each,
            jnp.full(2, end, jnp.int32),
            jnp.int32(2 if each == 1 else 0),
            num_tokens=2 * each,
        )
        model = placed.structure.merge(leaves)
        hidden, written = model(jnp.asarray(tokens.reshape(-1)), table.positions, cache, table)
        assert isinstance(written, KVPages)
        return hidden, written

    @jax.jit
    def run(leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        cache = geometry.empty_cache(num_pages)
        first, cache = step(leaves, cache, TOKENS[:, :-1], LENGTH - 1)
        second, _ = step(leaves, cache, TOKENS[:, -1:], LENGTH)
        return first, second

    return np.concatenate([np.asarray(part) for part in run(leaves)])


def differences_on_mesh(name: str) -> tuple[float, float]:
    """Of what is measured, and of hidden states over pages of fp8, from those of one device."""
    model = ModelConfig.from_hf(BASE)
    config = EngineConfig(load_format="dummy", kv_cache_dtype="fp8", calculate_kv_scales=True)

    def results(**given: Any) -> tuple[np.ndarray, np.ndarray]:
        placed = placed_with("fp8", calculate_kv_scales=True, **given)
        leaves = load_weights(placed, model, Path(), config)
        scales = next(leaf for leaf, p in zip(leaves, placed.structure.parameters, strict=True) if p.is_kv_scales)
        of_layers = np.asarray(scales)[: model.num_hidden_layers, :, :: placed.placement.widening.kv_head_copies]
        return of_layers, hidden_states(placed, leaves)

    strategy, tensor, stages = MESHES[name]
    rules = STRATEGIES[strategy].in_stages() if stages > 1 else STRATEGIES[strategy]
    mesh = make_mesh(rules.mesh_shape(tensor, stages), jax.devices())
    expected, found = results(), results(mesh=mesh, strategy=rules)
    return near(found[0], expected[0]), near(found[1], expected[1])
