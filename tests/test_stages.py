"""Layers in stages: what a step says between devices, and that devices load the layers of their own stage alone.

That tokens are those of one device, `test_sharded_answers` tests; how layers are cut, `models/test_pipeline.py`. What
needs several devices runs in a child process over four that the CPU pretends to be.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tiny_engine import TINY

from jax_engine.config import EngineConfig
from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.loading.stacked_leaves import stack_layers
from jax_engine.models.config import ModelConfig
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import PlacedModel, StateSize
from jax_engine.sharding.sharding import make_mesh
from jax_engine.sharding.strategies import STRATEGIES, Strategy

COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")
HF = TINY | {"num_hidden_layers": 5, "vocab_size": 104}


def placed_in_stages(num_stages: int) -> PlacedModel:
    strategy = STRATEGIES["tensor"].in_stages()
    return PlacedModel.of(
        LlamaForCausalLM,
        ModelConfig.from_hf(HF),
        platform="cpu",
        mesh=make_mesh(strategy.mesh_shape(4 // num_stages, num_stages), jax.devices()),
        strategy=strategy,
        attention_backend="xla",
        dtype=jnp.float32,
        page_size=16,
        scan_layers=True,
    )


def collectives() -> dict[str, int]:
    """Of a step of five layers in two stages of two devices, in two microbatches."""
    layout = BatchLayout(Bucket(8, 8), page_size=16, num_slots=8)
    step = placed_in_stages(2).lower(layout, SamplingMode.GREEDY, StateSize(num_pages=64, num_slots=8, max_pages=8))
    found = COLLECTIVE.findall(step.compile().as_text())
    return {name: found.count(name) for name in sorted(set(found))}


def loads() -> dict[str, Any]:
    """Which devices were given which of five layers, in three stages, and the leaf that came of them."""
    strategy = STRATEGIES["tensor"].in_stages()
    mesh = make_mesh(strategy.mesh_shape(1, 3), jax.devices())
    given: list[tuple[int, list[int]]] = []

    def load(layer: int, sharding: Sharding) -> jax.Array:
        given.append((layer, sorted(device.id for device in sharding.device_set)))
        return jax.device_put(np.full(4, layer + 1, np.float32), sharding)

    of_leaf, of_layer = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["stage"], []))
    leaf = stack_layers(load, 5, (6, 4), np.float32, of_leaf, of_layer=of_layer)
    assert leaf.sharding == of_leaf
    return {"given": given, "leaf": np.asarray(leaf)[:, 0].tolist()}


def geometry() -> dict[str, Any]:
    placed = placed_in_stages(2)
    cache = placed.state_shapes(StateSize(num_pages=10, num_slots=8, max_pages=8)).cache.data
    assert isinstance(cache.sharding, NamedSharding)
    on_device = int(np.prod(cache.sharding.shard_shape(cache.shape))) * 4
    return {"cache": cache.shape, "on_device": on_device, "page_bytes": placed.geometry.page_bytes}


@pytest.fixture(scope="module")
def four_devices() -> Any:
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent / "engine")])
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    script = "import json, test_stages as t; print(json.dumps([t.collectives(), t.loads(), t.geometry()]))"
    settings = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_tick_sends_once_to_the_next_stage(four_devices):
    """And a layer sums over its stage's devices twice; outside of the loops are the embedding's sum, the last stage's
    hidden states for all, and the likeliest token, which is gathered from the shares of the vocabulary.
    """
    assert four_devices[0] == {"all-gather": 1, "all-reduce": 2 + 2, "collective-permute": 1}


def test_devices_load_the_layers_of_their_stage(four_devices):
    """Of five layers in three stages, the last has one, and zeros in place of another."""
    assert four_devices[1]["given"] == [[0, [0]], [1, [0]], [2, [1]], [3, [1]], [4, [2]]]
    assert four_devices[1]["leaf"] == [1, 2, 3, 4, 5, 0]


def test_a_page_takes_room_for_the_layers_of_one_stage(four_devices):
    """Three of six, and half of the heads."""
    sizes = four_devices[2]
    assert sizes["cache"][:2] == [6, 10]
    assert sizes["on_device"] == 10 * sizes["page_bytes"]
    assert sizes["page_bytes"] == 3 * 2 * (TINY["num_key_value_heads"] // 2) * 16 * 8 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scan_layers": False}, r"scan_layers=False unrolls the layers, and pipeline_parallel_size=2 stacks them"),
        (
            {"mesh_shape": {"tensor": 2}},
            r"mesh_shape=tensor=2 has 1 devices along 'stage' and pipeline_parallel_size=2",
        ),
        ({"pipeline_parallel_size": 0}, r"pipeline_parallel_size=0 must be a whole number"),
    ],
    ids=str,
)
def test_settings_that_contradict_stages_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"pipeline_parallel_size": 2} | settings)


def test_a_strategy_of_ones_own_runs_in_stages_unless_it_has_other_uses_for_them():
    mine = Strategy("mine", weights={"mlp": ("data",)}, activations={"vocab": ("data",)}, mesh=("data",))
    staged = mine.in_stages()
    assert staged.weights == {"layers": ("stage",), "mlp": ("data",)}
    assert staged.activations == {"cache_layers": ("stage",), "vocab": ("stage", "data")}
    assert staged.in_stages() is staged
    with pytest.raises(ValueError, match=r"'mine' splits something else than layers over 'stage'"):
        Strategy("mine", weights={"mlp": ("stage",)}).in_stages()
    with pytest.raises(ValueError, match=r"weights.layers and activations.cache_layers must both be over \['stage'\]"):
        Strategy("mine", weights={"layers": ("stage",)})
