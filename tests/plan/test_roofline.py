"""Times of steps: arithmetic against hand counts."""

from dataclasses import replace

import jax.numpy as jnp
import pytest
from tiny_engine import TINY, placed_model

from jax_engine.models.config import ModelConfig
from jax_engine.models.qwen2 import Qwen2ForCausalLM
from jax_engine.plan.chips import CHIPS, HOP_SECONDS
from jax_engine.plan.hlo_costs import Collective, Costs
from jax_engine.plan.roofline import AttentionCosts, Load, StepTime, attention_costs, communication_seconds, step_time
from jax_engine.planner import CacheGeometry

NOTHING = AttentionCosts(0.0, 0.0)


def test_a_step_waits_for_the_slower_of_products_and_memory_and_for_exchanges():
    v6e = CHIPS["v6e"]
    costs = Costs({"bf16": 918e12 * 2e-3}, 1638e9 * 3e-3)
    assert step_time(costs, NOTHING, v6e, "bf16").total == pytest.approx(3e-3)
    assert step_time(costs, AttentionCosts(918e12 * 4e-3, 0.0), v6e, "bf16").binds == "FLOPs"
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
    decode = attention_costs(placed, model, Load(num_sequences=3, new_tokens=1, past_tokens=99))
    assert decode.flops == layers * 3 * 100 * heads * head_dim * 4
    token_bytes = 2 * layers * kv_heads * head_dim * 4
    assert decode.num_bytes == 3 * (100 + 1) * token_bytes, "pages are read, and the new token is written"
    prefill = attention_costs(placed, model, Load(1, 10, 20))
    assert prefill.flops == layers * sum(range(21, 31)) * heads * head_dim * 4


def test_a_window_bounds_what_attention_sees():
    """Sixteen positions, of which the first tokens of a prompt see fewer."""
    hf = TINY | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 0}
    model = ModelConfig.from_hf(hf | {"use_sliding_window": True})
    geometry = CacheGeometry.of(model, Qwen2ForCausalLM.cache_layout(model), page_size=8, dtype=jnp.dtype("float32"))
    placed = replace(placed_model(), geometry=geometry)
    assert attention_costs(placed, model, Load(1, 1, 100)).flops == 2 * 16 * 4 * 8 * 4
    assert attention_costs(placed, model, Load(1, 20, 0)).flops == 2 * (sum(range(1, 17)) + 4 * 16) * 4 * 8 * 4
