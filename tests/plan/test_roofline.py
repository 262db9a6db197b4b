"""Times of steps: arithmetic against hand counts."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from tiny_engine import TINY, TINY_MIXTURE, placed_model

from jax_engine.compilation.planner import CacheGeometry
from jax_engine.models.config import ModelConfig
from jax_engine.models.qwen2 import Qwen2ForCausalLM
from jax_engine.plan.chips import CHIPS, HOP_SECONDS
from jax_engine.plan.hlo_costs import Collective, Costs
from jax_engine.plan.roofline import (
    Load,
    StepTime,
    Work,
    attention_work,
    communication_seconds,
    expert_work,
    step_time,
)
from jax_engine.sharding.placed_model import PlacedModel
from jax_engine.sharding.sharding import place
from jax_engine.sharding.strategies import MESH_AXES, STRATEGIES

NOTHING = Work(0.0, 0.0)


def test_a_step_waits_for_the_slower_of_products_and_memory_and_for_exchanges():
    v6e = CHIPS["v6e"]
    costs = Costs({"bf16": 918e12 * 2e-3}, 1638e9 * 3e-3)
    assert step_time(costs, NOTHING, v6e, "bf16").total == pytest.approx(3e-3)
    assert step_time(costs, Work(918e12 * 4e-3, 0.0), v6e, "bf16").binds == "FLOPs"
    assert StepTime(1.0, 2.0, 4.0).total == 6.0
    assert StepTime(1.0, 2.0, 4.0).binds == "interconnect"


def test_an_all_reduce_sends_its_bytes_around_the_ring_twice_in_both_directions():
    one = Costs(collectives={Collective("all-reduce", 8, 1e6): 10.0})
    # Two of a v6e's four links, 100 GB/s each; 8 hops.
    assert communication_seconds(one, CHIPS["v6e"]) == pytest.approx(10 * (2 * 7 / 8 * 1e6 / 200e9 + 8 * HOP_SECONDS))
    # Through a switch, all of a GPU's 450 GB/s, and two hops.
    assert communication_seconds(one, CHIPS["h100"]) == pytest.approx(10 * (2 * 7 / 8 * 1e6 / 450e9 + 2 * HOP_SECONDS))


def test_attention_multiplies_every_token_with_what_it_sees():
    placed, model = placed_model(), ModelConfig.from_hf(TINY)
    layers, heads, head_dim, kv_heads = 2, 4, 8, 2
    decode = attention_work(placed, model, Load(num_sequences=3, new_tokens=1, past_tokens=99))
    assert decode.flops == layers * 3 * 100 * heads * head_dim * 4
    token_bytes = 2 * layers * kv_heads * head_dim * 4
    assert decode.num_bytes == 3 * (100 + 1) * token_bytes, "pages are read, and the new token is written"
    prefill = attention_work(placed, model, Load(1, 10, 20))
    assert prefill.flops == layers * sum(range(21, 31)) * heads * head_dim * 4


def test_a_window_bounds_what_attention_sees():
    """Sixteen positions, of which the first tokens of a prompt see fewer."""
    hf = TINY | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 0}
    model = ModelConfig.from_hf(hf | {"use_sliding_window": True})
    geometry = CacheGeometry.of(model, Qwen2ForCausalLM.cache_layout(model), page_size=8, dtype=jnp.dtype("float32"))
    placed = replace(placed_model(), geometry=geometry)
    assert attention_work(placed, model, Load(1, 1, 100)).flops == 2 * 16 * 4 * 8 * 4
    assert attention_work(placed, model, Load(1, 20, 0)).flops == 2 * (sum(range(1, 17)) + 4 * 16) * 4 * 8 * 4


def on_a_mesh(hf: dict, strategy: str, **sizes: int) -> PlacedModel:
    """A tiny model, laid out on a mesh without devices."""
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)
    placed, placement = placed_model(hf=hf), place(ModelConfig.from_hf(hf), mesh, STRATEGIES[strategy])
    geometry = replace(placed.geometry, partitions=placement.page_partitions)
    return replace(placed, placement=placement, geometry=geometry)


def test_rows_meet_the_experts_that_they_choose_and_read_each_that_any_chooses():
    """Of eight experts of three matrices [32, 16], each row chooses three; one row reads three, many read all."""
    placed, model = placed_model(hf=TINY_MIXTURE), ModelConfig.from_hf(TINY_MIXTURE)
    layers, matrices, row = 2, 3 * 32 * 16, 2 * 32
    one = expert_work(placed, model, Load(1, 1, 99), num_rows=1)
    assert one.flops == layers * 3 * 2 * matrices
    assert one.num_bytes == pytest.approx(layers * 4 * (3 * matrices + 3 * row))
    two = expert_work(placed, model, Load(2, 1, 99), num_rows=2)
    assert two.num_bytes == pytest.approx(layers * 4 * (8 * (1 - (5 / 8) ** 2) * matrices + 6 * row))
    many = expert_work(placed, model, Load(1, 1000, 0), num_rows=1000)
    assert many.flops == 1000 * one.flops
    assert many.num_bytes == pytest.approx(layers * 4 * (8 * matrices + 3000 * row))
    assert expert_work(placed_model(), ModelConfig.from_hf(TINY), Load(1, 1, 99), num_rows=1) == NOTHING


@pytest.mark.parametrize(
    ("strategy", "sizes", "matrices", "rows"),
    [
        ("expert", {"expert": 4}, 4, 4),  # two experts a device, and the rows that chose them
        ("tensor", {"tensor": 4}, 4, 1),  # a quarter of each expert, and all rows
        ("expert", {"expert": 2, "tensor": 4}, 8, 2),
        ("fully_sharded", {"tensor": 4}, 1, 4),  # all experts, for a quarter of the rows
    ],
)
def test_devices_share_experts_or_their_width_or_rows(strategy: str, sizes: dict[str, int], matrices: int, rows: int):
    hf, load = TINY_MIXTURE | {"num_attention_heads": 8}, Load(1000, 1, 0)
    work = expert_work(on_a_mesh(hf, strategy, **sizes), ModelConfig.from_hf(hf), load, num_rows=1000)
    assert work.flops == 2 * 1000 * 3 * 2 * 3 * 32 * 16 / max(matrices, rows)
    assert work.num_bytes == pytest.approx(2 * 4 * (8 * 3 * 32 * 16 / matrices + 3000 * 2 * 32 / rows))


@pytest.mark.parametrize(
    ("strategy", "sequences", "share"),
    [("context", 1, 1 / 2), ("data_attention", 1, 1), ("data_attention", 3, 2 / 3), ("data_attention", 8, 1 / 2)],
)
def test_devices_share_stripes_of_pages_and_own_whole_sequences(strategy: str, sequences: int, share: float):
    """Of two devices that own sequences, the one with more of them counts."""
    model, load = ModelConfig.from_hf(TINY), Load(sequences, 1, 99)
    work, whole = (
        attention_work(placed, model, load) for placed in (on_a_mesh(TINY, strategy, data=2), placed_model())
    )
    assert work.flops == pytest.approx(share * whole.flops)
    assert work.num_bytes == pytest.approx(share * whole.num_bytes)
