"""Which step programs a plan compiles, and what it keeps of them."""

import logging
import time
from typing import Any

import jax

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.memory_check import DeviceMemory, bytes_of
from jax_engine.compilation.planner import MemoryPlan
from jax_engine.execution.step_batch import Bucket
from jax_engine.execution.step_program import Program
from jax_engine.models.pipeline import microbatch_rows, num_microbatches
from jax_engine.plan.figure_cache import FigureCache
from jax_engine.plan.figures import CompiledProgram
from jax_engine.plan.hlo_costs import program_costs
from jax_engine.sampling.sampler import SamplingMode

logger = logging.getLogger(__name__)


def programs_of_plan(blueprint: Blueprint) -> list[Program]:
    """What is compiled: the step of decodes, which takes the likeliest tokens, and the largest step, in the mode that
    most requests need.
    """
    own = sorted(
        program
        for program in blueprint.programs
        if (program.num_steps, program.num_drafts) == (1, 0) and not program.is_draw
    )
    plain = [program for program in own if not program.draft_rows] or own
    most = blueprint.config.max_num_seqs
    by_mode = {mode: [program for program in plain if program.mode is mode] for mode in SamplingMode}
    widest = by_mode[SamplingMode.SAMPLE] or by_mode[SamplingMode.FULL]
    narrow = by_mode[SamplingMode.GREEDY] or widest
    decodes = next(program for program in narrow if program.bucket.holds(most, most))
    return list(dict.fromkeys((decodes, widest[-1])))


def compile_program(blueprint: Blueprint, program: Program, cache: FigureCache) -> CompiledProgram:
    """Compile a program with the pages of one sequence: temporaries do not depend on their number. What it says is
    taken from the cache, if it is there.
    """
    needs = DeviceMemory.of(blueprint)
    num_pages = needs.least_pages * blueprint.placed.geometry.partitions.count
    memory = MemoryPlan(num_pages, blueprint.model.max_model_len, "provisional")
    start = time.perf_counter()
    lowered = blueprint.lower(program, memory)
    mesh = blueprint.placed.placement.mesh
    key = cache.key(lowered, list(mesh.devices.flat) if mesh is not None else [blueprint.device])
    figures = cache.read(key)
    if figures is None:
        figures = _figures(lowered, _num_blocks(blueprint, program))
        cache.write(key, figures)
    seconds = time.perf_counter() - start
    logger.info("compiled %s in %.1f s", program, seconds)
    predicted = argument_bytes(blueprint, program.bucket, memory)
    cache_bytes = needs.least_pages * needs.page
    return CompiledProgram(str(program), program.bucket.num_tokens, predicted, cache_bytes, seconds, **figures)


def _num_blocks(blueprint: Blueprint, program: Program) -> int | None:
    """Turns that a step of all its rows takes: the blocks or microbatches that it is cut into, and the ticks that the
    last stages of a pipeline wait; None of a step that is not cut.
    """
    placed, rows = blueprint.placed, program.bucket.num_tokens
    if placed.row_block is not None:
        return rows // placed.row_block
    stages = placed.geometry.num_stages
    return None if stages == 1 else num_microbatches(rows, microbatch_rows(blueprint.device.platform)) + stages - 1


def _figures(lowered: jax.stages.Lowered, num_blocks: int | None) -> dict[str, Any]:
    """What the compiler says of a program: the fields of `CompiledProgram` that depend on it alone."""
    compiled = lowered.compile()
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None and text is not None
    return {
        "argument_bytes": analysis.argument_size_in_bytes,
        "temporary_bytes": analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "code_bytes": analysis.generated_code_size_in_bytes,
        "costs": program_costs(text, num_blocks=num_blocks),
    }


def argument_bytes(blueprint: Blueprint, bucket: Bucket, memory: MemoryPlan) -> int:
    """What a program is given on each device, by arithmetic: weights, state and pages, the step's buffer."""
    placed = blueprint.placed
    state = jax.tree.leaves(placed.state_shapes(blueprint.state_size(memory)))
    return bytes_of(placed.leaf_shapes()) + bytes_of(state) + 4 * blueprint.layouts[bucket].size
