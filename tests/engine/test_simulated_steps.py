"""The simulator of `benchmarks/` plans what the engine plans: only its times are a model."""

from tiny_engine import core_request, run_requests

from jax_engine.core.core_client import InProcessCore
from jax_engine.scheduling.step_plan import SchedulerLimits
from simulate_cost import PRESETS
from simulate_engine import Simulation
from simulate_load import Lengths, Synthetic

# The tokens that name texts are below the tiny model's 101.
LOAD = Synthetic(
    num_requests=14,
    rate=float("inf"),
    prompt=Lengths(20, 0.8),
    output=Lengths(9, 0.6),
    max_model_len=256,
    num_prefixes=2,
    prefix_tokens=19,
)


def test_a_simulation_takes_the_engines_steps(core: InProcessCore) -> None:
    """Equal requests, all at once: as many steps, of as many rows and as much padding, with as many cached tokens."""
    conversations = LOAD.conversations()
    requests = [
        core_request(f"simulated-{c.number}", c.prompt(0), max_tokens=c.turns[0].output_tokens) for c in conversations
    ]
    assert core.reset_prefix_cache()
    before = core.stats()
    answers = run_requests(core, requests)
    after = core.stats()
    assert {len(answer) for answer in answers.values()} == {c.turns[0].output_tokens for c in conversations}
    limits = SchedulerLimits(
        core.info.num_pages, core.info.page_size, max_num_seqs=4, token_budget=32, step_sizes=core.info.step_sizes
    )
    simulated = Simulation(conversations, limits, PRESETS["cpu-demo"], max_model_len=256).run()
    assert simulated.counters.steps == after.steps_total - before.steps_total
    assert simulated.counters.token_rows == after.token_rows_total - before.token_rows_total
    assert simulated.counters.padding_rows == after.padding_tokens_total - before.padding_tokens_total
    assert simulated.scheduler.num_prompt_tokens == after.prompt_tokens_total - before.prompt_tokens_total
    hits = after.prefix_cache_hits_total - before.prefix_cache_hits_total
    assert simulated.scheduler.cache.counters.hits == hits > 0
