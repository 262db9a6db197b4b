"""The engine with random weights: its start, its throughput, its share of what the device can do, its host's time.

Driven at its core: token ids in and out, with no tokenizer, no server and no other process.
"""

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax

import checkout
from gpu_jobs import Report, Skipped, first_line
from gpu_models import Costs, Limits, Workload, cache_bytes, model_config, workloads, write_model
from gpu_timing import Ceilings
from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.compilation.gpu_settings import prepare_gpus
from jax_engine.config import EngineConfig
from jax_engine.core.engine_core import EngineCore
from jax_engine.core.messages import Abort, Add, CoreRequest
from jax_engine.core.stats import EngineStats
from jax_engine.execution.step_program import Program
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.server.bench.figures import WorkItem

# Rows of the programs that the workloads have use for; other steps are padded to these.
GREEDY_SIZES = {1, 2, 4, 16, 32, 64, 128, 256}
EDGE_STEPS = 3  # of a decode, first and last, that are not timed: others' prompts and ends are in them
SHARE_OF_MEMORY = 0.8  # for weights and pages, where the pages wanted are more
WARM_UP_TOKENS = 4
SECONDS_TO_RUN = 60.0  # of a job, that compiling leaves to the workloads


def settings(model: str, backend: str, cache: str, *, tiny: bool) -> dict[str, Any]:
    """Of every engine that is measured here."""
    limits = Limits.of(tiny=tiny)
    return {
        "model": model,
        "load_format": "dummy",
        "dtype": "float32" if tiny else "bfloat16",
        "attention_backend": backend,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_model_len": limits.max_model_len,
        "compilation_cache_dir": cache,
        "enable_prefix_caching": False,  # runs repeat the same prompts
    }


def start(report: Report, *, model: str, backend: str, folder: str, cache: str, kind: str, tiny: bool) -> None:
    """The job: an engine as a user starts it, to its first token; `kind` says what the compilation cache holds."""
    begun, imported = report.begun, time.monotonic()
    name = f"{model}, {backend}, {kind} start"
    with report.case(name):
        config = EngineConfig(**settings(write_model(model, Path(folder), tiny=tiny), backend, cache, tiny=tiny))
        core = started(config)
        ready = time.monotonic()
        run(core, [WorkItem((1, 2, 3), 1)], deadline=report.deadline)
        answered = time.monotonic()
        stats = core.stats()
        report.add(
            name,
            value=answered - begun,
            unit="s to the first token",
            note=f"{imported - begun:.1f} s of it imports, {ready - imported:.1f} the engine; "
            f"{stats.programs_planned} programs follow",
            figures={"import_seconds": imported - begun, "ready_seconds": ready - begun},
        )
    os._exit(0)  # the other programs, which compile in the background, are not waited for


def measure(
    report: Report,
    *,
    model: str,
    backend: str,
    folder: str,
    cache: str,
    seed: int,
    tiny: bool,
    ceilings: Mapping[str, float | None],
) -> None:
    """The job: one engine, and every workload through it."""
    config = model_config(model, tiny=tiny)
    costs = Costs.of(config, 4 if tiny else 2)
    loads = workloads(config, seed=seed, tiny=tiny)
    name = f"{model}, {backend}"
    with report.case(f"{name}, start"):
        begin = time.monotonic()
        given = settings(write_model(model, Path(folder), tiny=tiny), backend, cache, tiny=tiny)
        prepare_gpus(EngineConfig(**given))  # before JAX is asked how much memory there is
        core = started(EngineConfig(**given, kv_cache_memory_bytes=room(config, costs, loads)), watch=leave_out_others)
        ready = time.monotonic()
        wait_for_programs(core.runner.compiled, deadline=report.deadline - SECONDS_TO_RUN)
        gc.freeze()  # as a server's core does once it is ready
        stats, compiled = core.stats(), time.monotonic()
        wanted = len(wanted_programs(core.runner.compiled))
        report.add(
            f"{name}, start",
            value=compiled - begin,
            unit="s to all programs",
            note=f"{ready - begin:.1f} s to the first; {stats.programs_compiled} of {wanted} programs, "
            f"{stats.compile_seconds_total:.0f} thread-seconds; {stats.num_pages} pages",
            figures={"ready_seconds": ready - begin, "compile_seconds": stats.compile_seconds_total},
        )
        for load in loads:
            case = f"{name}, {load.name}"
            with report.case(case):
                measure_load(report, case, core, load, costs, Ceilings.of(ceilings))
        core.shutdown()


def started(config: EngineConfig, *, watch: Callable[[CompiledSteps], object] | None = None) -> EngineCore:
    """The engine core, if this machine has room for it and the kernel that it asks for."""
    try:
        return EngineCore(config, watch=watch)
    except ValueError as error:
        raise Skipped(first_line(error)) from error


def wait_for_programs(compiled: CompiledSteps, *, deadline: float) -> None:
    """Until all that are wanted are compiled, or there is just time left to run with those that are."""
    while compiled.eta and time.monotonic() < deadline:
        time.sleep(0.1)
    compiled.stop()


def room(config: dict[str, Any], costs: Costs, loads: Sequence[Workload]) -> int:
    """Bytes for pages: what the largest workload fills, or what the device has left."""
    wanted = max(cache_bytes(config, costs, load.items, page_size=64) for load in loads)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    embedding = costs.weight_bytes  # room for one that is apart from the head, and for a step
    return wanted if limit is None else int(min(wanted, max(1, SHARE_OF_MEMORY * limit - 1.3 * embedding)))


def wanted_programs(compiled: CompiledSteps) -> list[Program]:
    """What the workloads have use for: greedy decodes, and the steps that hold prompts."""
    budget, most = compiled.largest.bucket.num_tokens, compiled.largest.bucket.num_sequences

    def is_wanted(size: int, mode: SamplingMode) -> bool:
        if size > most:
            return mode is SamplingMode.SAMPLE and size in (2 * most, budget)
        return mode is SamplingMode.GREEDY and size in GREEDY_SIZES

    return [program for program in compiled.programs if is_wanted(program.bucket.num_tokens, program.mode)]


def leave_out_others(compiled: CompiledSteps) -> None:
    """Compile what is wanted and no more."""
    compiled.leave_out(set(compiled.programs) - set(wanted_programs(compiled)))


@dataclass(frozen=True)
class Steps:
    """What a workload took: seconds of each step, and how many requests got tokens in it."""

    seconds: float
    tokens: int
    intervals: tuple[tuple[float, int], ...]
    is_whole: bool  # or was cut off

    def typical(self, num_sequences: int) -> float | None:
        """Seconds of a step in which all of them decode, the median; None if there are too few."""
        full = [seconds for seconds, count in self.intervals if count == num_sequences]
        full = full[EDGE_STEPS:-EDGE_STEPS] or full
        return median(full) if full else None


def run(core: EngineCore, items: Sequence[WorkItem], *, deadline: float) -> Steps:
    """Give the core requests, greedy and of exact lengths, and step until all are done, or there is no time left."""
    requests = [
        CoreRequest(
            request_id=str(number),
            prompt_token_ids=list(item.prompt_token_ids),
            max_tokens=item.output_tokens,
            min_tokens=0,
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            prng_key=(0, number),
            eos_token_ids=(),
            stop_token_ids=(),
            arrival_time=time.monotonic(),
        )
        for number, item in enumerate(items)
    ]
    intervals, tokens = [], 0
    begin = before = time.perf_counter()
    core.handle(Add(requests))
    is_whole = True
    while core.has_work:
        outputs = core.step().outputs
        now = time.perf_counter()
        tokens += sum(len(output.new_token_ids) for output in outputs)
        intervals.append((now - before, len(outputs)))
        before = now
        if is_whole and time.monotonic() > deadline:
            is_whole = False
            core.handle(Abort([request.request_id for request in requests]))
    return Steps(before - begin, tokens, tuple(intervals), is_whole)


def measure_load(report: Report, name: str, core: EngineCore, load: Workload, costs: Costs, ceilings: Ceilings) -> None:
    """Run a workload for the clock, a decode shortly before to warm up; keep a record."""
    if load.num_sequences is not None:
        run(core, [WorkItem(item.prompt_token_ids, WARM_UP_TOKENS) for item in load.items], deadline=report.deadline)
    before = core.stats()
    steps = run(core, load.items, deadline=report.deadline - 2)
    after = core.stats()
    num_steps = after.steps_total - before.steps_total
    figures: dict[str, Any] = {"steps": num_steps, "seconds": steps.seconds, **engine_figures(before, after)}
    notes = [f"host {figures['host_us_a_step']:.0f} us a step", f"padding {100 * figures['padding_share']:.0f} %"]
    if figures["compiles_in_request_path"]:
        notes.append(f"{figures['compiles_in_request_path']} compiles in a request's path")
    shares: dict[str, Any] = {}
    if load.num_sequences is None:
        if steps.is_whole:
            num_bytes, flops = costs.workload(load.items, num_steps)
            shares = ceilings.shares(steps.seconds, num_bytes=num_bytes, flops=flops)
    elif (step := steps.typical(load.num_sequences)) is not None:
        item = load.items[0]
        num_bytes, flops = costs.decode(load.num_sequences, len(item.prompt_token_ids) + item.output_tokens / 2)
        shares = ceilings.shares(step, num_bytes=num_bytes, flops=flops)
        figures |= {"step_seconds": step, "decode_tokens_per_second": load.num_sequences / step}
        notes.insert(0, f"{1e3 * step:.2f} ms a step")
    if not steps.is_whole:
        notes.insert(0, f"cut off after {steps.tokens} of {load.output_tokens} tokens")
    if "msgspec" in checkout.absent_packages():
        notes.append("host without msgspec")
    report.add(
        name, value=steps.tokens / steps.seconds, unit="tokens/s", note=", ".join(notes), figures=figures, **shares
    )


def engine_figures(before: EngineStats, after: EngineStats) -> dict[str, Any]:
    """Of the time between two snapshots."""
    first, last = before.host_time, after.host_time
    steps = max(last.steps - first.steps, 1)
    parts = {
        part: (getattr(last, part) - getattr(first, part)) / steps
        for part in ("schedule", "pack", "launch", "collect", "wait")
    }
    rows = after.token_rows_total - before.token_rows_total
    return {
        "host_us_a_step": sum(us for part, us in parts.items() if part != "wait"),
        "host_us": parts,
        "padding_share": (after.padding_tokens_total - before.padding_tokens_total) / max(rows, 1),
        "preemptions": after.preemptions_total - before.preemptions_total,
        "compiles_in_request_path": after.compiles_in_request_path_total,
    }
