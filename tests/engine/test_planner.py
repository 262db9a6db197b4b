"""Sizes that are derived before anything large is allocated."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import asked, limits, ranges
from tiny_engine import TINY

from jax_engine.compilation.compiled_steps import compile_order
from jax_engine.compilation.planner import (
    CacheGeometry,
    draft_model_programs,
    draft_programs,
    largest_padding,
    memory_for_pages,
    plan_memory,
    programs_of,
    step_programs,
    step_sizes,
)
from jax_engine.config import EngineConfig
from jax_engine.execution.step_batch import Bucket
from jax_engine.execution.step_program import Program
from jax_engine.kv_cache.page_partitions import PagePartitions
from jax_engine.models.config import ModelConfig
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.qwen3 import Qwen3ForCausalLM
from jax_engine.sampling.sampler import LOOPING_MODES, SamplingMode
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import SchedulerLimits
from jax_engine.server.bench.figures import mixed_workload
from jax_engine.server.bench.load import Load
from simulate_cost import StepCost
from simulate_engine import Simulation
from simulate_load import Conversation, Turn

MODEL = ModelConfig.from_hf(TINY)
GEOMETRY = CacheGeometry.of(MODEL, LlamaForCausalLM.cache_layout(MODEL), page_size=8, dtype=jnp.dtype("float32"))
MIB = 2**20


@given(max_num_seqs=st.integers(1, 4096), extra=st.integers(0, 2**20))
def test_every_step_the_scheduler_may_plan_fits_one_of_few_programs(max_num_seqs, extra):
    budget = max_num_seqs + extra
    programs = step_programs(max_num_seqs, budget)
    assert len(programs) == len(set(programs)) <= 24 + 8
    assert max(programs).bucket.holds(budget, max_num_seqs)
    for num_tokens in {1, max_num_seqs, budget, (1 + budget) // 2}:
        num_sequences = min(num_tokens, max_num_seqs)
        assert any(program.bucket.holds(num_tokens, num_sequences) for program in programs)


@given(max_num_seqs=st.integers(1, 256), extra=st.integers(0, 8192 - 256))
def test_at_usual_limits_padding_stays_under_60_percent_of_any_step(max_num_seqs, extra):
    assert largest_padding(step_sizes(max_num_seqs, max_num_seqs + extra)) < 0.6


def test_steps_with_a_chunk_have_one_program_and_decodes_one_for_each_mode():
    programs = step_programs(4, 16)
    assert [program.bucket for program in programs if program.is_draw] == [Bucket(1, 1), Bucket(4, 4)]
    assert [(program.bucket.num_tokens, program.mode) for program in programs if not program.is_draw] == [
        *((size, mode) for size in (1, 2, 4) for mode in LOOPING_MODES),
        *((size, SamplingMode.SAMPLE) for size in (8, 12, 16)),
        *((size, SamplingMode.FULL) for size in (1, 4, 16)),
    ]


@pytest.mark.parametrize("rate", [5.0, 20.0, 50.0, float("inf")])
def test_less_than_15_percent_of_the_rows_are_padding(rate):
    """Of the benchmarks' mixed load: requests at a rate from few to more than are finished, and all at once."""
    config = EngineConfig()
    workload = mixed_workload(96, prompt_tokens=(8, 200), output_tokens=(16, 128), vocab_size=256, seed=0)
    requests = [
        Conversation(number, (Turn(len(item.prompt_token_ids), item.output_tokens, due),))
        for number, (item, due) in enumerate(zip(workload, Load(rate, 1, 0).send_times(len(workload)), strict=True))
    ]
    sizes = step_sizes(config.max_num_seqs, config.token_budget)
    allowed = SchedulerLimits(2**14, 16, config.max_num_seqs, config.token_budget, step_sizes=sizes)
    cost = StepCost("hand", "made up", 1.5e-3, 0.0, 5e-5, 0.0, 0.0, kv_tokens=2**18)
    counters = Simulation(requests, allowed, cost, max_model_len=512).run().counters
    assert counters.padding_rows < 0.15 * counters.token_rows


def test_a_chunk_ends_where_a_step_program_does_if_that_puts_off_less_than_it_saves():
    sizes = {"step_sizes": (1, 4, 8, 16), "token_budget": 16}
    for num_prompt, first, rest in [(9, 7, 2), (12, 12, 1), (3, 3, 1), (2, 2, 1), (15, 15, 1), (40, 15, 15)]:
        scheduler = Scheduler(limits(**sizes))
        scheduler.add(asked("decodes", 2, 30))
        scheduler.schedule()
        scheduler.add(asked("prompt", num_prompt, 30))
        assert ranges(scheduler.schedule()) == [("decodes", 2, 1), ("prompt", 0, first)], num_prompt
        assert ranges(scheduler.schedule())[1] == ("prompt", first, rest), num_prompt


def test_a_prompt_alone_is_not_cut_to_a_step_program():
    """No other request needs the next step."""
    scheduler = Scheduler(limits(step_sizes=(1, 8, 16)))
    scheduler.add(asked("prompt", 9, 30))
    assert ranges(scheduler.schedule()) == [("prompt", 0, 9)]


@given(max_num_seqs=st.integers(1, 4096), extra=st.integers(0, 2**20), num_drafts=st.integers(1, 32))
def test_every_step_with_drafts_fits_one_of_few_programs(max_num_seqs, extra, num_drafts):
    budget = max_num_seqs + extra
    programs = draft_programs(max_num_seqs, budget, num_drafts)
    assert len(programs) == len(set(programs)) <= 8
    for mode in (SamplingMode.SAMPLE, SamplingMode.FULL):
        rows = max(program.draft_rows for program in programs if program.mode is mode)
        assert rows >= min(budget, max_num_seqs * (1 + num_drafts))
        assert any(program.bucket.holds(budget, max_num_seqs) for program in programs if program.mode is mode)


@given(max_num_seqs=st.integers(1, 4096), extra=st.integers(0, 2**20 - 4096), num_drafts=st.integers(1, 32))
def test_a_draft_model_has_programs_for_all_that_it_is_given_and_all_are_few(max_num_seqs, extra, num_drafts):
    budget = max(max_num_seqs + extra, num_drafts + 1)
    programs = draft_model_programs(max_num_seqs, budget, num_drafts)
    assert len(programs) <= 6
    assert all(program.num_drafts == num_drafts for program in programs)
    for num_tokens, num_sequences in ((1, 1), (min(2 * max_num_seqs, budget), max_num_seqs), (budget, max_num_seqs)):
        assert any(program.bucket.holds(num_tokens, num_sequences) for program in programs)
    speculation = {"method": "draft_model", "model": "m", "num_speculative_tokens": num_drafts}
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget}
    config = EngineConfig(speculative_config=speculation, **limits)
    assert len(set(programs_of(config, row_block=None, only_full=False))) <= 40


def test_steps_in_blocks_of_rows_have_one_program_and_its_draw():
    step = Program(Bucket(64, 32), SamplingMode.FULL)
    assert step_programs(5, 48, row_block=32) == (step, Program(Bucket(32, 32), SamplingMode.FULL, is_draw=True))
    ngram = {"method": "ngram", "num_speculative_tokens": 7}
    config = EngineConfig(max_num_seqs=5, max_num_batched_tokens=48, speculative_config=ngram)
    step = Program(Bucket(64, 32), SamplingMode.FULL, draft_rows=64)
    draw = Program(Bucket(64, 32), SamplingMode.FULL, draft_rows=64, is_draw=True)
    assert programs_of(config, row_block=32, only_full=False) == (step, draw)


@given(max_num_seqs=st.integers(1, 64), extra=st.integers(1, 512), num_drafts=st.integers(1, 7))
def test_the_program_that_serves_first_holds_every_step(max_num_seqs, extra, num_drafts):
    """Also where a draft model has programs, and where all programs are of one mode."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_seqs + extra + num_drafts}
    speculation = {"method": "draft_model", "model": "m", "num_speculative_tokens": num_drafts}
    config = EngineConfig(speculative_config=speculation, **limits)
    for row_block, only_full in ((None, False), (None, True), (32, False), (32, True)):
        largest, *_ = compile_order(programs_of(config, row_block=row_block, only_full=only_full))
        assert not largest.num_drafts
        assert largest.bucket.holds(config.token_budget, max_num_seqs)
        assert (largest.mode is SamplingMode.FULL) == (only_full or row_block is not None)


def test_a_page_is_what_the_layout_says():
    assert GEOMETRY.page_bytes == 2 * 2 * 2 * 8 * 8 * 4  # layers, K and V, heads, tokens, head size, bytes
    assert [GEOMETRY.pages_for(tokens) for tokens in (1, 8, 9)] == [1, 1, 2]


def test_pages_fill_the_budget_and_without_prefix_caching_stop_at_what_sequences_can_fill():
    """2 KiB each; what running sequences do not fill keeps prefixes. By default, a CPU's memory is for others, too."""
    caching, plain = (EngineConfig(max_num_seqs=4, enable_prefix_caching=kept) for kept in (True, False))
    assert plan_memory(caching, MODEL, GEOMETRY, MIB // 8).num_pages == 64
    assert plan_memory(caching, MODEL, GEOMETRY, 1000 * MIB).num_pages == 1000 * 512
    assert plan_memory(plain, MODEL, GEOMETRY, 1000 * MIB).num_pages == 4 * 256 // 8
    assert plan_memory(caching, MODEL, GEOMETRY, None).num_pages == 4 * 256 // 8
    asked = EngineConfig(max_num_seqs=4, kv_cache_memory_bytes=MIB)
    assert plan_memory(asked, MODEL, GEOMETRY, None).num_pages == 512


def test_the_context_shrinks_to_the_cache_only_when_nobody_asked_for_it():
    small = GEOMETRY.page_bytes * 4  # 32 tokens
    with pytest.raises(ValueError, match=r"room for 32 tokens; lower max_model_len to 32 or less, or set kv_cache_mem"):
        plan_memory(EngineConfig(max_model_len=64), MODEL, GEOMETRY, small)
    large = ModelConfig.from_hf(TINY | {"max_position_embeddings": 8192})
    plan = plan_memory(EngineConfig(), large, GEOMETRY, GEOMETRY.page_bytes * 500)
    assert (plan.max_model_len, plan.num_pages) == (4000, 500)


MIXED = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 12, "use_sliding_window": True}


def geometry_of(num_sliding: int, window: int) -> CacheGeometry:
    """Of twelve layers, all but the first see a window, as many as are asked for."""
    kinds = ["full_attention"] * (12 - num_sliding) + ["sliding_attention"] * num_sliding
    model = ModelConfig.from_hf(TINY | MIXED | {"sliding_window": window, "layer_types": kinds})
    return CacheGeometry.of(model, Qwen3ForCausalLM.cache_layout(model), page_size=8, dtype=jnp.dtype("float32"))


def test_a_window_bounds_what_a_sequence_takes():
    """Of 256 tokens in steps of 16: a window of 24 straddles 6 pages of 8, all layers else 32."""
    full, half, all_sliding = (geometry_of(count, 24) for count in (0, 6, 12))
    assert [geometry.most_pages(256, 16) for geometry in (full, half, all_sliding)] == [32, 32 + 6, 6]
    assert [geometry.most_pages(20, 16) for geometry in (full, half, all_sliding)] == [3, 6, 3]
    assert half.page_bytes * 2 == full.page_bytes == all_sliding.page_bytes
    assert full == geometry_of(12, 256), "a window that nothing outgrows is none"
    config = EngineConfig(max_model_len=256, max_num_batched_tokens=16, max_num_seqs=8, kv_cache_memory_bytes=MIB)
    assert plan_memory(config, MODEL, all_sliding, None).num_pages == MIB // all_sliding.page_bytes
    little = EngineConfig(max_model_len=256, max_num_batched_tokens=16, max_num_seqs=8)
    with pytest.raises(ValueError, match=rf"needs .* room for 96 tokens; .* at least {38 * half.page_bytes}$"):
        plan_memory(little, MODEL, half, half.page_bytes * 18)


def test_a_sequence_may_fill_all_stripes_and_one_owner():
    """On four devices with room for eight pages each: 32 pages of 8 tokens, or 8."""
    striped, owned = (replace(GEOMETRY, partitions=PagePartitions(4, kind)) for kind in (True, False))
    assert [geometry.most_pages(256, 16) for geometry in (striped, owned)] == [8, 32]
    room = 8 * GEOMETRY.page_bytes
    assert plan_memory(EngineConfig(max_model_len=256), MODEL, striped, room).num_pages == 32
    with pytest.raises(ValueError, match="room for 64 tokens; lower max_model_len to 64 or less"):
        plan_memory(EngineConfig(max_model_len=256), MODEL, owned, room)
    assert plan_memory(EngineConfig(max_model_len=64), MODEL, owned, room).num_pages == 32
    assert striped.cache_bytes(32) == room
    few = EngineConfig(max_model_len=64, max_num_seqs=6, enable_prefix_caching=False)  # no more pages than they fill
    plans = [plan_memory(few, MODEL, geometry, 100 * room).num_pages for geometry in (GEOMETRY, striped, owned)]
    assert plans == [6 * 8, 6 * 8, 4 * 2 * 8]


def test_memory_for_pages_is_what_weights_and_temporaries_leave():
    """Of a program with 4 MiB of weights, 2 MiB of donated cache and a temporary of at least 4 MiB."""

    def step(weights: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cache.at[0].set(1.0), jnp.sort(weights)[::2]

    shapes = [jax.ShapeDtypeStruct((n * MIB // 4,), jnp.float32) for n in (4, 2)]
    compiled = jax.jit(step, donate_argnums=1).lower(*shapes).compile()
    left = memory_for_pages(compiled, limit=100 * MIB, utilization=0.5, cache_bytes=2 * MIB)
    assert 50 * MIB - 16 * MIB < left <= 50 * MIB - (4 + 2) * MIB  # weights 4, output 2, temporaries
