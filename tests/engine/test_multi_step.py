"""Several tokens a request in one step: the same tokens as one at a time, and no step, page or iteration too many."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from tiny_engine import TINY, VOCAB_SIZE, collect, core_request, placed_model, run_requests

from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.compilation.planner import step_programs
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Abort, Add, CoreRequest
from jax_engine.execution.step_batch import NO_TOKEN, BatchLayout, Bucket, SlotParameters, pack_batch, page_updates_of
from jax_engine.execution.step_program import step_function
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.config import ModelConfig
from jax_engine.models.ops import select_ops
from jax_engine.models.registry import resolve_model
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import SchedulerLimits
from jax_engine.sharding.placed_model import StateSize

PAGE = 8


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()


PAGE_BYTES = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * TINY["head_dim"] * 4
CORES = {
    "8 steps": {"num_scheduler_steps": 8},
    "4 steps, few pages": {"num_scheduler_steps": 4, "kv_cache_memory_bytes": 16 * PAGE_BYTES, "max_model_len": 96},
}


@pytest.fixture(scope="module", params=CORES)
def looped(request: pytest.FixtureRequest, make_shared_core: Any) -> InProcessCore:
    """One core that draws up to eight tokens a step, and one that draws four and has few pages."""
    return make_shared_core(**CORES[request.param], compile_before_ready=True)


def num_steps_of(core: InProcessCore) -> int:
    return max(program.num_steps for program in core._core.runner.compiled.programs)


def assert_idle(core: InProcessCore) -> None:
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use, stats.num_tokens_in_pages) == (0, 0, 0, 0)
    assert stats.compiles_in_request_path_total == 0


@pytest.fixture(scope="module")
def mixture(core: InProcessCore) -> list[CoreRequest]:
    """Everything that ends a request, at offsets that no number of steps divides."""
    free = {
        "greedy": core_request("greedy", prompt(0, 13), 30),
        "seeded": core_request("seeded", prompt(1, 40), 30, temperature=1.0, top_p=0.9, prng_key=(1, 3)),
    }
    tokens = run_requests(core, list(free.values()))

    def ended(name: str, of: str, by: str, offset: int, **fields: Any) -> CoreRequest:
        asked = free[of]
        given = {key: getattr(asked, key) for key in ("temperature", "top_p", "prng_key")} | fields
        return core_request(name, asked.prompt_token_ids, 30, **given, **{by: (tokens[of][offset],)})

    return [
        *free.values(),
        ended("stop id", "greedy", "stop_token_ids", 6),
        ended("end of sequence", "seeded", "eos_token_ids", 11),
        ended("first token", "greedy", "eos_token_ids", 0),
        ended("held back", "greedy", "stop_token_ids", 3, min_tokens=9),
        ended("held back, seeded", "seeded", "eos_token_ids", 2, min_tokens=14),
        *(core_request(f"{count} tokens", prompt(2, 5), count) for count in (1, 2, 3, 9, 17)),
    ]


@pytest.mark.parametrize("at_once", [1, 4, 12])
def test_requests_end_where_they_do_a_token_at_a_time(core, looped, mixture, at_once):
    """Alone, as many as there are slots, and more: tokens, reasons and what is billed."""
    for first in range(0, len(mixture), at_once):
        some = mixture[first : first + at_once]
        expected, found = collect(core, some), collect(looped, some)
        for name in expected:
            tokens, again = (
                [t for output in outputs[name] for t in output.new_token_ids] for outputs in (expected, found)
            )
            assert again == tokens, name
            last, ours = expected[name][-1], found[name][-1]
            assert (ours.finish_reason, ours.stop_reason) == (last.finish_reason, last.stop_reason), name
            assert all(output.finish_reason is None for output in found[name][:-1])
    assert_idle(looped)


def test_several_tokens_come_at_once_and_no_row_is_run_for_nothing(looped):
    """Four requests of 17 tokens, in a program for four rows: the prompts, then 16 tokens in few steps."""
    num_steps, before = num_steps_of(looped), looped.stats()
    outputs = collect(looped, [core_request(name, prompt(0, 3), 17) for name in "abcd"])
    after = looped.stats()
    for given in outputs.values():
        assert [len(output.new_token_ids) for output in given] == [1] + [num_steps] * (16 // num_steps)
    assert after.steps_total - before.steps_total == 1 + 16 // num_steps
    assert after.generation_tokens_total - before.generation_tokens_total == 4 * 17
    assert after.token_rows_total - before.token_rows_total == 4 * 3 + 4 * 16
    assert after.padding_tokens_total == before.padding_tokens_total


def test_requests_that_join_leave_or_lose_their_pages_change_nothing(core, looped):
    requests = [core_request(f"r{i}", prompt(10 + i, 3 + 7 * i), 25) for i in range(8)]
    expected = run_requests(core, requests)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    left, steps = list(requests), 0
    while left or looped.has_work():
        if left and steps % 3 == 0:
            looped.send(Add([left.pop()]))
        if steps == 7:
            looped.send(Abort(["r7", "r5"]))
        for output in looped.step().outputs:
            tokens[output.request_id] += output.new_token_ids
        steps += 1
    for name in tokens:
        assert tokens[name] == (expected[name][: len(tokens[name])] if name in ("r7", "r5") else expected[name])
    assert len(tokens["r7"]) < 25
    assert_idle(looped)
    if looped.info.num_pages == 16:
        assert looped.stats().preemptions_total > 0


def test_a_request_that_the_host_must_watch_gets_its_tokens_one_by_one(core, looped):
    watched = core_request("watched", prompt(0, 9), 12, needs_host=True)
    other = core_request("other", prompt(1, 9), 12)
    expected = run_requests(core, [watched, other])
    outputs = collect(looped, [watched, other])
    assert {len(output.new_token_ids) for given in outputs.values() for output in given} == {1}
    assert run_requests(looped, [watched, other]) == expected


def test_what_follows_an_early_stop_in_the_cache_is_right(looped, core):
    """The page that the stop ends is full of tokens but not of keys and values: it must not be found."""
    drawn = {"temperature": 1.0, "prng_key": (5, 5)}
    tokens = run_requests(core, [core_request("a", prompt(3, 3), 20, **drawn)])["a"]
    offset = 2 * PAGE - 3 - 1
    assert tokens[offset] not in tokens[:offset], "another key is needed"
    looped.reset_prefix_cache()
    stopped = core_request("a", prompt(3, 3), 20, stop_token_ids=(tokens[offset],), **drawn)
    answer = run_requests(looped, [stopped])["a"]
    assert len(answer) == offset + 1
    turn = core_request("b", [*prompt(3, 3), *answer, 5, 6], 12)
    (again,) = collect(looped, [turn]).values()
    assert again[-1].num_cached_tokens == PAGE
    assert [token for output in again for token in output.new_token_ids] == run_requests(core, [turn])["b"]


def plan_of(scheduler: Scheduler, max_steps: int) -> list[tuple[int, int, int]]:
    plan = scheduler.schedule(max_steps)
    assert plan is not None
    return [(chunk.start, chunk.length, chunk.num_draws) for chunk in plan.chunks]


def scheduler_of(*requests: CoreRequest, **limits: int) -> Scheduler:
    given = {"num_pages": 64, "page_size": 4, "max_num_seqs": 2, "token_budget": 8, "watermark": 0.0} | limits
    scheduler = Scheduler(SchedulerLimits(**given))
    for request in requests:
        scheduler.add(request)
    return scheduler


def test_only_a_plan_of_decodes_while_nobody_waits_has_several_steps():
    scheduler = scheduler_of(core_request("a", [1, 2], 20), core_request("b", list(range(9)), 6))
    assert plan_of(scheduler, 4) == [(0, 2, 1), (0, 6, 0)]
    assert plan_of(scheduler, 4) == [(2, 1, 1), (6, 3, 1)], "a prompt is under way"
    assert plan_of(scheduler, 4) == [(3, 1, 4), (9, 1, 4)]
    scheduler.add(core_request("c", [1], 1))
    assert plan_of(scheduler, 4) == [(7, 1, 1), (13, 1, 1)], "somebody waits"
    scheduler.abort(["c"])
    assert plan_of(scheduler, 4) == [(8, 1, 4)], "the other may have no more"
    scheduler.add(core_request("d", [1], 9, needs_host=True))
    assert plan_of(scheduler, 4) == [(12, 1, 1)]


@pytest.mark.parametrize("tokens", [[5], [5, 6, 7], [5, 9, 7, 8], [5, 6, 7, 8, 9]], ids=str)
def test_a_device_that_ends_a_row_elsewhere_than_the_host_is_found_out(tokens):
    """Too few tokens without a stop, or more after one."""
    scheduler = scheduler_of(core_request("a", [1], 9, stop_token_ids=(9,)))
    scheduler.commit(scheduler.schedule(4), [[4]])
    plan = scheduler.schedule(4)
    with pytest.raises(AssertionError, match="host and device disagree on where a ends"):
        scheduler.commit(plan, [tokens])


class Steps:
    """A step program over four rows and two layers, and how often its loop has run. Its state is that of one plan."""

    def __init__(
        self, num_steps: int, *, backend: str = "xla", page_size: int = PAGE, scan_layers: bool = False
    ) -> None:
        self.num_runs, self.page_size = 0, page_size
        config = ModelConfig.from_hf(TINY)
        ops, _ = select_ops(backend, platform="cpu")

        def prepare(sequences: Any, cache: Any, **given: Any) -> Any:
            jax.debug.callback(self._count)
            return ops.prepare(sequences, cache, **given)

        placed = placed_model(backend, page_size=page_size, scan_layers=scan_layers)
        counted = {"ops": replace(ops, prepare=prepare), "dtype": jnp.float32, "scan_layers": scan_layers}
        structure = ModelStructure.of(resolve_model(config.architecture), config, **counted)
        self.layout = BatchLayout(Bucket(4, 4), page_size, num_slots=4)
        self.state = placed.zero_state(StateSize(num_pages=16, num_slots=4, max_pages=4))
        keys = jax.random.split(jax.random.key(0), len(structure.parameters))
        self.leaves = tuple(
            jax.random.normal(key, parameter.shape, parameter.dtype)
            for key, parameter in zip(keys, structure.parameters, strict=True)
        )
        mode = SamplingMode.GREEDY
        self.run = jax.jit(step_function(structure, self.layout, mode, placed.placement, num_steps=num_steps))

    def _count(self) -> None:
        self.num_runs += 1

    def drawn(self, requests: list[CoreRequest], num_draws: list[int]) -> np.ndarray:
        """[steps, 4]: what the first decode of these requests draws."""
        scheduler = scheduler_of(*requests, max_num_seqs=4, page_size=self.page_size, num_pages=16)
        parameters, chunks = SlotParameters(4, VOCAB_SIZE), scheduler.schedule().chunks
        for chunk in chunks:
            parameters.set(chunk.slot, chunk.request.asked)
        chunks = [
            msgspec.structs.replace(chunk, num_draws=count) for chunk, count in zip(chunks, num_draws, strict=True)
        ]
        buffer = pack_batch(chunks, page_updates_of(chunks, self.layout), self.layout, parameters)
        self.num_runs = 0
        _, drawn = self.run(self.leaves, self.state, buffer)
        jax.effects_barrier()
        return np.asarray(drawn)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps(num_steps=20)


@pytest.mark.parametrize("num_draws", [[1, 1, 1], [3, 1, 5], [20, 2, 7]], ids=str)
def test_the_loop_ends_with_its_last_row(steps, num_draws):
    drawn = steps.drawn([core_request(name, [position], 30) for position, name in enumerate("abc")], num_draws)
    assert (drawn != NO_TOKEN).sum(axis=0).tolist() == [*num_draws, 0]
    assert steps.num_runs == max(num_draws)


def test_a_row_that_stops_is_out_and_the_others_are_as_they_were(steps):
    free = [core_request(name, [position], 30) for position, name in enumerate("abc")]
    whole = steps.drawn(free, [20] * 3)
    offsets = [next(i for i in range(2 + row, 20) if whole[i, row] not in whole[:i, row]) for row in range(3)]
    stopping = [
        core_request(request.request_id, request.prompt_token_ids, 30, stop_token_ids=(int(whole[offset, row]),))
        for row, (request, offset) in enumerate(zip(free, offsets, strict=True))
    ]
    drawn = steps.drawn(stopping, [20] * 3)
    for row, offset in enumerate(offsets):
        assert drawn[: offset + 1, row].tolist() == whole[: offset + 1, row].tolist()
        assert set(drawn[offset + 1 :, row]) <= {NO_TOKEN}
    assert steps.num_runs == max(offsets) + 1


def test_the_interpreted_tpu_kernel_loops_over_the_same_tokens():
    """Its list of work follows the lengths, which change with every iteration, and the rows that are left."""
    requests, num_draws = [core_request(name, [position], 30) for position, name in enumerate("abc")], [5, 2, 4]
    expected = Steps(num_steps=5, page_size=16, scan_layers=True).drawn(requests, num_draws)
    kernel = Steps(num_steps=5, backend="pallas_tpu_interpret", page_size=16, scan_layers=True)
    assert kernel.drawn(requests, num_draws).tolist() == expected.tolist()


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_a_loop_makes_no_copy_of_the_cache(scan_layers):
    placed = placed_model(page_size=PAGE, scan_layers=scan_layers)
    layout, size = BatchLayout(Bucket(8, 8), PAGE, num_slots=8), StateSize(num_pages=4096, num_slots=8, max_pages=32)
    analysis = placed.lower(layout, SamplingMode.SAMPLE, size, num_steps=4).compile().memory_analysis()
    cache_bytes = 4096 * placed.geometry.page_bytes
    assert analysis.alias_size_in_bytes >= cache_bytes
    assert analysis.temp_size_in_bytes < cache_bytes / 4


WIDEST = SamplingMode.SAMPLE


class Uncompiled:
    """In place of a traced program, which takes a compiler."""

    def compile(self) -> None:
        return None


def test_loops_are_few_and_wait_for_their_bucket():
    """At the default limits; decodes go one by one until there is a loop in their own bucket for every mode."""
    config = EngineConfig()
    programs = step_programs(config.max_num_seqs, config.token_budget, num_steps=8)
    compiled: Any = CompiledSteps(programs, lambda program: Uncompiled())
    assert len(programs) <= 40
    loops = [program for program in compiled.programs if program.num_steps == 8]
    assert 2 <= len(loops) <= 8
    first = compiled.programs.index(loops[0])
    others = [program for program in compiled.programs[first:] if program.num_steps == 1]
    assert compiled.programs[first : first + len(loops)] == loops
    assert {program.mode for program in others} == {SamplingMode.FULL}, "loops come last but for what few requests need"
    for program in compiled.programs[:first]:
        compiled._compile(program)
        assert compiled.num_steps(1) == 1
    for program in sorted(loops):
        compiled._compile(program)
        ready = [loop.bucket.num_tokens for loop in loops if loop in compiled._executables and loop.mode is WIDEST]
        for num_decodes in (1, 7, 64):
            own = min(loop.bucket.num_tokens for loop in loops if loop.bucket.num_tokens >= num_decodes)
            assert compiled.num_steps(num_decodes) == (8 if own in ready else 1)
    assert (compiled.num_steps(7), compiled.num_steps(64)) == (8, 8)
    assert compiled.find(7, 7, SamplingMode.GREEDY, num_steps=5)[0].num_steps == 8
    assert compiled.find(7, 7, SamplingMode.GREEDY)[0].num_steps == 1


def test_a_number_of_steps_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"num_scheduler_steps=4 must be 1 with deterministic=True"):
        EngineConfig(num_scheduler_steps=4, deterministic=True)
    with pytest.raises(ValueError, match=r"num_scheduler_steps=33 must be .* between 1 and 32; 1 is one"):
        EngineConfig(num_scheduler_steps=33)
