"""Sizes that are derived before anything large is allocated."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import TINY

from jax_engine.config import EngineConfig
from jax_engine.models.config import ModelConfig
from jax_engine.planner import CacheGeometry, bucket_lattice, memory_for_pages, plan_memory
from jax_engine.step_batch import Bucket

MODEL = ModelConfig.from_hf(TINY)
GEOMETRY = CacheGeometry.of(MODEL, page_size=8, dtype=jnp.dtype("float32"))
MIB = 2**20


@given(max_num_seqs=st.integers(1, 300), extra=st.integers(0, 3000))
def test_every_step_the_scheduler_may_plan_fits_a_bucket(max_num_seqs, extra):
    budget = max_num_seqs + extra
    buckets = bucket_lattice(max_num_seqs, budget)
    assert max(buckets).holds(budget, max_num_seqs)
    assert len(buckets) <= 17
    for num_tokens in {1, max_num_seqs, budget, (1 + budget) // 2}:
        num_sequences = min(num_tokens, max_num_seqs)
        smallest = min(bucket for bucket in buckets if bucket.holds(num_tokens, num_sequences))
        assert smallest.num_tokens < max(2 * num_tokens, 9)


def test_steps_in_blocks_of_rows_have_one_shape():
    assert bucket_lattice(5, 48, row_block=32) == (Bucket(64, 32),)


def test_a_page_is_what_the_layout_says():
    assert GEOMETRY.page_bytes == 2 * 2 * 2 * 8 * 8 * 4  # layers, K and V, heads, tokens, head size, bytes
    assert [GEOMETRY.pages_for(tokens) for tokens in (1, 8, 9)] == [1, 1, 2]


def test_pages_follow_the_budget_and_stop_at_what_sequences_can_fill():
    config = EngineConfig(max_num_seqs=4)
    assert plan_memory(config, MODEL, GEOMETRY, MIB // 8).num_pages == 64  # 2 KiB each
    assert plan_memory(config, MODEL, GEOMETRY, 1000 * MIB).num_pages == 4 * 256 // 8


def test_the_context_shrinks_to_the_cache_only_when_nobody_asked_for_it():
    small = GEOMETRY.page_bytes * 4  # 32 tokens
    with pytest.raises(ValueError, match=r"room for 32 tokens; lower max_model_len to 32 or less, or set kv_cache_mem"):
        plan_memory(EngineConfig(max_model_len=64), MODEL, GEOMETRY, small)
    large = ModelConfig.from_hf(TINY | {"max_position_embeddings": 8192})
    plan = plan_memory(EngineConfig(), large, GEOMETRY, GEOMETRY.page_bytes * 500)
    assert (plan.max_model_len, plan.num_pages) == (4000, 500)


def test_memory_for_pages_is_what_weights_and_temporaries_leave():
    """Of a program with 4 MiB of weights, 2 MiB of donated cache and a temporary of at least 4 MiB."""

    def step(weights: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cache.at[0].set(1.0), jnp.sort(weights)[::2]

    shapes = [jax.ShapeDtypeStruct((n * MIB // 4,), jnp.float32) for n in (4, 2)]
    compiled = jax.jit(step, donate_argnums=1).lower(*shapes).compile()
    left = memory_for_pages(compiled, limit=100 * MIB, utilization=0.5, cache_bytes=2 * MIB)
    assert 50 * MIB - 16 * MIB < left <= 50 * MIB - (4 + 2) * MIB  # weights 4, output 2, temporaries
