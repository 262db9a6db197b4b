"""The programs' order, threads and progress, with small functions in place of steps."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jax_engine.compilation.compiled_steps import CompiledSteps, compile_order
from jax_engine.compilation.planner import step_programs
from jax_engine.config import EngineConfig
from jax_engine.execution.step_batch import Bucket
from jax_engine.execution.step_program import Program
from jax_engine.sampling.sampler import SamplingMode

PROGRAMS = step_programs(4, 16)
GREEDY, SAMPLE, FULL = SamplingMode


def lower(program: Program) -> jax.stages.Lowered:
    """A function of the program's size."""
    return jax.jit(lambda x: x + program.bucket.num_tokens).lower(jnp.zeros(program.bucket.num_tokens))


def compiled(**changes) -> CompiledSteps:
    return CompiledSteps(PROGRAMS, **({"lower": lower, "threads": 2} | changes))


def sizes(programs: list[Program]) -> list[int]:
    return [program.bucket.num_tokens for program in programs]


def test_the_largest_comes_first_and_then_the_middle_of_the_widest_gap():
    order = compile_order(step_programs(8, 64))
    assert len(order) == len(set(order)) == len(step_programs(8, 64))
    wide = [program for program in order if program.mode is SAMPLE]
    assert sizes(wide) == [64, 1, 12, 4, 24, 2, 8, 16, 32, 48]
    narrow, full = ([program for program in order if program.mode is mode] for mode in (GREEDY, FULL))
    assert order == [*wide, *narrow, *full], "one that serves both modes first, and one that few requests need last"
    assert sizes([program for program in full if not program.is_draw]) == [64, 1, 8, 4, 16]
    draws = [program.is_draw for program in full]
    assert draws == [False, True, False, True, False, False, True, False], "what draws behind one comes with it"


def test_a_single_program_is_an_order():
    assert compile_order([Program(Bucket(1, 1), SAMPLE)]) == [Program(Bucket(1, 1), SAMPLE)]


def test_a_step_takes_the_smallest_program_that_is_ready():
    steps = compiled()
    steps.compile_largest()
    assert {steps.find(1, 1, mode)[0] for mode in (GREEDY, SAMPLE)} == {steps.largest}
    steps.compile_rest(background=False)
    assert steps.num_ready == len(PROGRAMS)
    assert steps.find(3, 2, GREEDY)[0] == Program(Bucket(4, 4), GREEDY)
    assert steps.find(3, 2, SAMPLE)[0] == Program(Bucket(4, 4), SAMPLE)
    assert steps.find(5, 2, GREEDY)[0] == Program(Bucket(8, 4), SAMPLE)
    assert steps.find(2, 2, FULL)[0] == Program(Bucket(4, 4), FULL)
    assert steps.find(5, 2, FULL)[0] == Program(Bucket(16, 4), FULL)
    assert steps.num_in_request_path == 0


def test_a_program_is_in_use_once_what_draws_behind_it_is_there():
    steps = CompiledSteps(PROGRAMS, lower)
    small, large = Program(Bucket(1, 1), FULL), Program(Bucket(16, 4), FULL)
    for program in (small, *large.parts):
        steps._compile(program)
    assert steps.find(1, 1, FULL)[0] == large
    steps._compile(small.draw)
    assert steps.find(1, 1, FULL)[0] == small
    assert steps.num_in_request_path == 0


def test_a_step_before_the_largest_program_counts_as_compiled_in_a_requests_path():
    steps = compiled()
    steps.find(1, 1, GREEDY)
    assert steps.num_in_request_path == 1
    assert steps.find(1, 1, FULL)[0] == Program(Bucket(16, 4), FULL)
    assert steps.num_in_request_path == 2


def test_memory_is_planned_with_the_largest_program_of_each_kind():
    steps = CompiledSteps(step_programs(4, 16, num_steps=4), lower)
    assert len(steps.compile_largest_of_each()) == 4
    ready = sorted((program.mode, program.num_steps) for program in steps._executables)
    assert ready == [(FULL, 1), (FULL, 1), (SAMPLE, 1), (SAMPLE, 4)], "what draws is one of them"


def test_what_is_left_out_is_not_compiled_and_its_steps_are_padded():
    steps = compiled()
    steps.leave_out(program for program in PROGRAMS if program.bucket.num_tokens not in (1, 16))
    steps.compile_largest()
    steps.compile_rest(background=False)
    assert {program.bucket.num_tokens for program in steps.executables} == {1, 16}
    assert steps.find(2, 2, GREEDY)[0] == steps.largest
    assert steps.num_in_request_path == 0


def test_a_mode_that_is_waited_for_comes_next():
    order, go_on = [], threading.Event()

    def trace(program: Program) -> jax.stages.Lowered:
        order.append(program)
        assert go_on.wait(60)
        return lower(program)

    steps = CompiledSteps(PROGRAMS, trace, threads=1)
    assert not steps.is_coming(FULL), "nothing compiles yet"
    steps.compile_rest(background=True)
    while not order:
        time.sleep(0.01)
    assert steps.is_coming(FULL)
    assert steps.is_coming(SAMPLE), "the thread is at it"
    go_on.set()
    steps.wait()
    full = Program(Bucket(16, 4), FULL)
    assert order[:3] == [steps.largest, full, full.draw]
    assert not steps.is_coming(FULL)


def test_programs_are_traced_one_at_a_time_and_compiled_side_by_side():
    tracing, both = threading.Lock(), threading.Barrier(2, timeout=60)

    class Slow:
        """A lowered program whose compilation ends only when another one runs."""

        def __init__(self, lowered: jax.stages.Lowered) -> None:
            self.lowered = lowered

        def compile(self) -> jax.stages.Compiled:
            both.wait()
            return self.lowered.compile()

    def trace(program: Program) -> Slow:
        assert tracing.acquire(blocking=False), "two threads trace at once"
        time.sleep(0.01)
        tracing.release()
        return Slow(lower(program))

    steps = CompiledSteps(PROGRAMS[-8:], trace, threads=2)
    steps.compile_rest(background=True)
    steps.wait()
    assert steps.num_ready == 8


def test_the_time_left_is_told_until_nothing_is_left():
    steps = compiled()
    assert steps.eta == 0
    steps.compile_largest()
    hold = threading.Event()
    steps._lower = lambda program: (hold.wait(60), lower(program))[1]
    steps.compile_rest(background=True)
    assert steps.eta > 0
    hold.set()
    steps.wait()
    assert steps.eta == 0


def test_stopping_ends_after_the_programs_at_hand():
    steps = compiled(lower=lambda program: (time.sleep(0.1), lower(program))[1])
    steps.compile_rest(background=True)
    steps.stop()
    assert steps.num_ready <= 2
    assert steps.eta == 0


def test_a_program_that_does_not_compile_is_missed_in_the_background_and_an_error_before_serving(caplog):
    def broken(program: Program) -> jax.stages.Lowered:
        if program.bucket.num_tokens == 4 and not program.is_draw:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: this one is too large")
        return lower(program)

    steps = compiled(lower=broken)
    steps.compile_rest(background=True)
    steps.wait()
    assert "4 tokens x 4 sequences, sample did not compile" in caplog.text
    assert steps.num_ready == len(PROGRAMS) - 3
    assert steps.find(3, 2, SAMPLE)[0].bucket.num_tokens == 8
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compiled(lower=broken).compile_rest(background=False)


def test_compiling_ends_before_the_process_has_all_memory_maps(caplog):
    steps = compiled(most_memory_maps=0.0)
    steps.compile_largest()
    steps.compile_rest(background=True)
    steps.wait()
    assert (steps.num_ready, steps.eta) == (1, 0)
    (warning,) = [record.message for record in caplog.records]
    assert f"{len(PROGRAMS) - 1} of {len(PROGRAMS)} step programs stay uncompiled" in warning
    assert "raise vm.max_map_count" in warning
    assert steps.find(3, 2, SAMPLE)[0] == steps.largest


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match=r"compile_threads=0 must be .*; leave it out for half of the processor's"):
        EngineConfig(compile_threads=0)
