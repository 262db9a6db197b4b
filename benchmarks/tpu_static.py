"""What the real TPU compiler says of our kernels and step programs; needs no TPU and uses none.

    python benchmarks/tpu_static.py --fast               # what a commit should run: about a minute
    python benchmarks/tpu_static.py --json out.json      # every chip, number type, page size and layout of heads
    python benchmarks/tpu_static.py --chips v6e --no-steps

`pip install "jax-engine[tpu]"` brings the compiler (libtpu) to any Linux machine. Each job is compiled in a process of
its own, so that one that crashes the compiler is a row with its error. JAX's public kernel is compiled in the same run.

Bundles are what a core issues in a cycle: decode's are those of its main loop for 1,024 cached tokens of all kv heads,
prefill's for 1,024 cached tokens and 1,024 query rows (a row is one head of one token). "Short" is a whole sequence of
200 tokens in decode. They leave out waits for memory, so they bound the time and do not say it. Exits with 1 if a job
of ours is rejected or misses a limit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jax_engine.server.bench.figures import format_cell, format_table, write_json
from tpu_compile import HEADS, LOADS, KernelJob
from tpu_step import StepJob
from tpu_topology import CHIPS, compiler_environment

JOB_TIMEOUT_SECONDS = 600
DTYPES = ("bfloat16", "float32", "float8_e4m3fn", "int8")
PAGE_SIZES = (16, 64, 128)
COMMON = KernelJob("ours", "v6e", heads="llama-3-8b", dtype="bfloat16", page_size=128, load="decode")

# The best of the public kernels that were compiled and read by hand, for the same heads in decode.
BEST_PEER_BUNDLES = {("v6e", "bfloat16"): 1787, ("tpu7x", "bfloat16"): 1779, ("tpu7x", "float8_e4m3fn"): 1608}


@dataclass(frozen=True)
class Limits:
    """What our own jobs must keep; None: no limit."""

    compile_seconds: float
    decode_bundles: float | None = None
    short_bundles: float | None = None
    decode_spill_share: float | None = None
    prefill_spill_share: float | None = None
    cache_copies: int = 0  # each would cost as much memory as the cache, or a layer of it


DECODE_BUNDLES = {("v6e", "bfloat16"): 1250, ("tpu7x", "bfloat16"): 1250, ("tpu7x", "float8_e4m3fn"): 900}
SHORT_BUNDLES = {("v6e", "bfloat16"): 1500}  # less than half of what the peer takes, see its row
SMALLEST_TPU_PAGE = 64  # the default there; limits on bundles hold from it on
KERNEL_COMPILE_SECONDS = 15
SPILL_SHARE = 0.04  # a few registers kept in memory over a hundred bundles cost nothing; more is a loop gone wrong
STEP_COMPILE_SECONDS = 60

Job = KernelJob | StepJob


@dataclass(frozen=True)
class Outcome:
    """A job with its figures, or with the compiler's error; `misses` says which limits it does not keep."""

    job: Job
    figures: dict[str, Any] | None
    error: str | None
    misses: tuple[str, ...]

    @property
    def verdict(self) -> str:
        if self.error is not None:
            return f"rejected: {self.error}"
        return "; ".join(self.misses) or "ok"


def main() -> None:
    options = parse_arguments()
    if find_spec("libtpu") is None:
        sys.exit("the TPU compiler is not installed here; on Linux, pip install 'jax-engine[tpu]' brings it")
    kernels = kernel_jobs(options.chips, fast=options.fast) if options.kernels else []
    steps = step_jobs(options.chips, fast=options.fast) if options.steps else []
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(run_job, (*kernels, *steps)))
    for rows in (outcomes[: len(kernels)], outcomes[len(kernels) :]):
        if rows:
            print(format_table(*table(rows)), end="\n\n")
    if options.json:
        write_json(options.json, report(outcomes))
    failed = [outcome for outcome in outcomes if fails(outcome)]
    print(f"{len(outcomes)} programs compiled, {len(failed)} of ours rejected or past a limit")
    sys.exit(1 if failed else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=chip_names, default=tuple(CHIPS), help=f"of {','.join(CHIPS)} (default: all)")
    parser.add_argument("--kernels", action=argparse.BooleanOptionalAction, default=True, help="attention alone")
    parser.add_argument("--steps", action=argparse.BooleanOptionalAction, default=True, help="whole step programs")
    parser.add_argument("--fast", action="store_true", help="one job of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there, each loop's too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at once (default: %(default)s)")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1")
    return options


def chip_names(text: str) -> tuple[str, ...]:
    """The value of `--chips`."""
    names = tuple(text.split(","))
    if unknown := set(names) - set(CHIPS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CHIPS)}")
    return names


def kernel_jobs(chips: Sequence[str], *, fast: bool) -> list[KernelJob]:
    """Every chip with the common case, varied along one axis at a time; the peer where figures are compared."""
    if fast:
        changes: list[dict[str, Any]] = [
            {"chip": "v6e"},
            {"chip": "tpu7x", "dtype": "float8_e4m3fn"},
            {"chip": "v5e", "heads": "llama-3-70b tp8"},
            {"chip": "v6e", "subject": "peer"},
        ]
        return [job for change in changes if (job := replace(COMMON, **change)).chip in chips]
    axes = [("load", LOADS), ("dtype", DTYPES), ("page_size", PAGE_SIZES), ("heads", HEADS)]
    changes = [{axis: value} for axis, values in axes for value in values]
    # Quantized pages of the layouts that differ most, and the small pages of a sharded model.
    changes += [{"dtype": "float8_e4m3fn", "heads": heads} for heads in ("llama-3-70b tp8", "head_dim 64")]
    changes += [{"page_size": 16, "heads": "llama-3-70b tp8"}]
    changes += [{"subject": "peer", **change} for change in ({}, {"dtype": "float8_e4m3fn"}, {"load": "prefill"})]
    jobs = [replace(COMMON, chip=chip, **change) for chip in chips for change in changes]
    # A v4 computes with no 8-bit numbers, and our kernel says so.
    return [job for job in dict.fromkeys(jobs) if not (job.chip == "v4" and is_eight_bit(job))]


def step_jobs(chips: Sequence[str], *, fast: bool) -> list[StepJob]:
    """The models by the slice that they are served on."""
    jobs = [
        StepJob("llama-3-8b", "v6e", None, 1),
        StepJob("llama-3-8b", "v6e", None, 1, num_steps=8),
        StepJob("llama-3-8b", "v6e", None, 1, cache_dtype="float8_e4m3fn"),
        StepJob("llama-3-8b", "v5e", "v5e:2x2", 4),
        StepJob("llama-3-8b", "v5e", "v5e:2x2", 4, cache_dtype="float8_e4m3fn"),
        StepJob("llama-3-8b", "v5e", "v5e:2x2", 4, cache_dtype="int8"),
        StepJob("llama-3-8b", "v5p", None, 1),
        StepJob("llama-3-70b", "v6e", "v6e:2x4", 8),
        StepJob("qwen3-32b", "v6e", "v6e:2x2", 4),
    ]
    return [job for job in (jobs[:1] if fast else jobs) if job.chip in chips]


def run_job(job: Job) -> Outcome:
    """Compile in a process of its own, and say so when it is done: a full run takes a while."""
    outcome = compile_apart(job)
    print(*asdict(job).values(), outcome.verdict, file=sys.stderr)
    return outcome


def compile_apart(job: Job) -> Outcome:
    """The outcome of a job in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as folder:
        dump = Path(folder) if isinstance(job, KernelJob) else None
        environment = {**os.environ, **compiler_environment(dump)}
        request = json.dumps({"kind": type(job).__name__, **asdict(job)})
        command = [sys.executable, str(Path(__file__).with_name("tpu_compile.py"))]
        try:
            done = subprocess.run(
                command, input=request, env=environment, capture_output=True, text=True, timeout=JOB_TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            return Outcome(job, None, f"not compiled after {JOB_TIMEOUT_SECONDS} s", ())
    if done.returncode:
        return Outcome(job, None, error_line(done.stderr, done.returncode), ())
    figures = json.loads(done.stdout.splitlines()[-1])
    return Outcome(job, figures, None, misses(job, figures))


def error_line(text: str, code: int) -> str:
    """What went wrong, in one line: the exception if there is one, else the last words of a crash."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    raised = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    line = (raised or lines or [f"exit status {code}"])[-1]
    return re.sub(r"^(?:\w+\.)+(?=\w+:)", "", line)[:300]  # the exception's module says nothing


def limits_of(job: Job) -> Limits | None:
    """The limits of a job of ours; none for the peer."""
    if isinstance(job, StepJob):
        return Limits(STEP_COMPILE_SECONDS)
    if job.subject != COMMON.subject:
        return None
    compared = job.heads == COMMON.heads and job.page_size >= SMALLEST_TPU_PAGE
    bundles = DECODE_BUNDLES.get((job.chip, job.dtype)) if compared else None
    short = SHORT_BUNDLES.get((job.chip, job.dtype)) if compared else None
    spills: float | None = SPILL_SHARE
    if job.dtype == "float32" or (job.page_size == PAGE_SIZES[0] and is_eight_bit(job)):
        # Not for serving: six passes a product in float32, and pages of less than a register's rows in 8 bits.
        spills = None
    return Limits(KERNEL_COMPILE_SECONDS, bundles, short, decode_spill_share=spills, prefill_spill_share=spills)


def is_eight_bit(job: KernelJob) -> bool:
    return job.dtype in ("float8_e4m3fn", "int8")


def misses(job: Job, figures: dict[str, Any]) -> tuple[str, ...]:
    """What a job does not keep, in words."""
    limits = limits_of(job)
    if limits is None:
        return ()
    found = []
    for name, most in asdict(limits).items():
        value = figures.get(name)
        if most is not None and value is not None and value > most:
            found.append(f"{name} {format_cell(value)} > {format_cell(most)}")
    return tuple(found)


def fails(outcome: Outcome) -> bool:
    """Whether this outcome must fail the run: the peer's never does."""
    return limits_of(outcome.job) is not None and (outcome.error is not None or bool(outcome.misses))


def table(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[object]]]:
    """Header and rows of jobs of one kind."""
    if isinstance(outcomes[0].job, StepJob):
        return STEP_HEADER, [step_row(outcome.job, outcome) for outcome in outcomes if isinstance(outcome.job, StepJob)]
    rows = [kernel_row(outcome.job, outcome) for outcome in outcomes if isinstance(outcome.job, KernelJob)]
    return KERNEL_HEADER, rows


KERNEL_HEADER = [
    "chip", "kernel", "heads", "cache", "page", "load", "compile s", "VMEM MiB", "decode", "best peer", "spills",
    "short", "prefill", "spills", "temporaries MiB", "verdict",
]  # fmt: skip


def kernel_row(job: KernelJob, outcome: Outcome) -> list[object]:
    figures = outcome.figures or {}
    common = replace(job, chip=COMMON.chip, dtype=COMMON.dtype) == COMMON
    return [
        job.chip,
        job.subject,
        job.heads,
        job.dtype,
        job.page_size,
        job.load,
        figures.get("compile_seconds"),
        mebibytes(figures.get("vmem_bytes")),
        rounded(figures.get("decode_bundles")),
        BEST_PEER_BUNDLES.get((job.chip, job.dtype)) if common else None,
        figures.get("decode_spills"),
        rounded(figures.get("short_bundles")),
        rounded(figures.get("prefill_bundles")),
        figures.get("prefill_spills"),
        mebibytes(figures.get("temporary_bytes")),
        outcome.verdict,
    ]


STEP_HEADER = [
    "model",
    "on",
    "devices",
    "steps",
    "cache",
    "compile s",
    "temporaries MiB",
    "collectives a layer",
    "pages GiB",
    "verdict",
]


def step_row(job: StepJob, outcome: Outcome) -> list[object]:
    figures = outcome.figures or {}
    collectives = figures.get("collectives_per_layer")
    return [
        job.model,
        job.topology or CHIPS[job.chip].topology,
        job.tensor_parallel_size,
        job.num_steps,
        job.cache_dtype,
        figures.get("compile_seconds"),
        mebibytes(figures.get("temporary_bytes")),
        None if collectives is None else ", ".join(f"{n:g} {name}" for name, n in collectives.items()) or "none",
        None if not figures else figures["bytes_for_pages"] / 2**30,
        outcome.verdict,
    ]


def mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def rounded(value: float | None) -> int | None:
    return None if value is None else round(value)


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every figure, for programs."""
    return {"jobs": [{**asdict(outcome), "limits": asdict_or_none(limits_of(outcome.job))} for outcome in outcomes]}


def asdict_or_none(limits: Limits | None) -> dict[str, Any] | None:
    return None if limits is None else asdict(limits)


if __name__ == "__main__":
    main()
