"""Everything that an NVIDIA GPU has to tell, in one command: are the kernels right, how fast are they, and the engine.

    python benchmarks/gpu.py --output DIR                     # about 8 minutes; also where nothing is installed but JAX
    python benchmarks/gpu.py --output DIR --sections engine peers --models llama-3-8b
    python benchmarks/gpu.py --tiny                           # a dry run in toy sizes, which is what a CPU does

Needs no network, and no part of the server. Kernels are checked against the float32 specification on random data that
is new each time, and timed, as whole engines with random weights are, against what this device is measured to do in
the same run; peers that are installed get the same requests. Every part has a process of its own and a limit of time: a
crash costs that part alone. What does not fit in the budget is named at the end. Ends with 1 if anything has failed.
"""

import argparse
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import checkout
from gpu_jobs import Job, Record, Runner, run_child
from gpu_models import MODELS
from gpu_peers import PEERS
from jax_engine.server.bench.figures import format_cell, format_table, write_json

SECTIONS = ("checks", "kernels", "engine", "peers")
BUDGET_SECONDS = 480.0
CHILD = "--run-one-job"
# That a kind of job takes at least on a GPU; with less left it is not begun.
LEAST_SECONDS = {"checks": 15, "kernels": 15, "engine": 90, "peers": 40}
CASE_SECONDS = 60.0  # of a kernel, its compilation included; it hangs if it takes longer
WORDS = {"measured": "", "passed": "pass", "failed": "FAIL", "skipped": "skipped"}
NOTE_WIDTH = 80
RATE = "tokens/s"  # the unit that engines and peers are compared in
RIVAL = "vllm"  # the peer that tells most


def main() -> int:
    if sys.argv[1:2] == [CHILD]:
        run_child(sys.argv[2:])
        return 0
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what there is by then is still saved
    with tempfile.TemporaryDirectory(prefix="jax_engine_gpu_") as scratch:
        command = (sys.executable, str(Path(__file__).resolve()), CHILD)
        runner = Runner(Path(scratch), command, budget_seconds=options.budget_seconds)
        results = Results(runner, options)
        runner.on_progress = results.save  # so that there is something also after an end without a warning
        try:
            measure(results, options, Path(scratch))
        finally:
            results.save()
    print(f"\n{results.table()}")
    if options.output:
        print(f"every figure is in {Path(options.output) / 'gpu.json'}")
    return 1 if any(record.status == "failed" for record in runner.records) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--sections", choices=SECTIONS, default=SECTIONS, help=f"of {', '.join(SECTIONS)}", **several)
    parser.add_argument("--models", choices=MODELS, default=MODELS, help=f"of {', '.join(MODELS)}", **several)
    parser.add_argument("--backends", help="values of attention_backend (default: what there is)", **several)
    parser.add_argument("--peers", choices=PEERS, default=PEERS, help=f"of {', '.join(map(repr, PEERS))}", **several)
    parser.add_argument(
        "--budget-seconds", type=float, default=BUDGET_SECONDS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--jobs", help="only those whose names have one of these words in them", **several)
    parser.add_argument("--output", metavar="DIR", help="for gpu.json, with every figure, gpu.txt and gpu.log")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of random data (default: new)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a dry run of everything")
    return parser.parse_args()


class Results:
    """What was found so far, in the folder that was asked for. Mutable; owned by the command."""

    def __init__(self, runner: Runner, options: argparse.Namespace) -> None:
        self.runner = runner
        self.device: dict[str, Any] = {}
        self._folder = Path(options.output) if options.output else None
        self._begin = time.monotonic()
        self._about = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv[1:],
            "seed": options.seed,
            "absent_packages": checkout.absent_packages(),
        }

    def save(self) -> None:
        """Write everything anew."""
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        about = {**self._about, "device": self.device, "seconds": time.monotonic() - self._begin}
        records = [asdict(record) for record in self.runner.records]
        report = {"about": about, "job_seconds": self.runner.seconds, "records": records}
        write_json(self._folder / "gpu.json", report)
        (self._folder / "gpu.log").write_bytes(self.runner.logs())
        (self._folder / "gpu.txt").write_text(self.table() + "\n")

    def table(self) -> str:
        """All in one: a row a case, but one for all checks of a kind that passed."""
        rows: list[list[Any]] = []
        for section in ("ceilings", *SECTIONS):
            own = [record for record in self.runner.records if record.section == section]
            if own:
                rows += [
                    [section.upper(), "", "", None, None, ""],
                    *map(row, passed_together(beside_ours(own, self.runner.records))),
                ]
        width = max((len(text) for _, text, *_ in rows), default=0)
        rows = [[name, text.rjust(width), *others] for name, text, *others in rows]
        header = ["", "result", "", "bandwidth %", "FLOPs %", "note"]
        counts = Counter(record.status for record in self.runner.records)
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        seconds = time.monotonic() - self._begin
        return f"{format_table(header, rows)}\n{said}; {seconds:.0f} s, seed {self._about['seed']}"


def beside_ours(records: Iterable[Record], everything: Iterable[Record]) -> Iterator[Record]:
    """Records, those of peers with how much faster our best engine was with the same requests."""
    best: dict[tuple[str, str], float] = {}
    for record in everything:
        if record.section == "engine" and record.unit == RATE:
            model, _, load = record.case.split(", ", 2)
            best[model, load] = max(best.get((model, load), 0), record.value or 0)
    for record in records:
        if record.section == "peers" and record.unit == RATE and record.value:
            model, _, load = record.case.split(", ", 2)
            if ours := best.get((model, load)):
                record = replace(record, note=f"ours: {ours / record.value:.2f} times that")
        yield record


def passed_together(records: Iterable[Record]) -> Iterator[Record]:
    """Records with those that passed joined by the first word of their names; all others as they are."""
    passed: dict[str, list[Record]] = {}
    for record in records:
        if record.status == "passed":
            passed.setdefault(record.case.partition(",")[0], []).append(record)
        else:
            yield record
    for name, some in passed.items():
        worst = max(some, key=lambda record: record.value or 0)
        yield replace(
            worst,
            case=f"{name}: {len(some)} check{'s' * (len(some) > 1)}",
            note=f"the worst is {worst.case.partition(', ')[2]}",
        )


def row(record: Record) -> list[Any]:
    """Of the table."""
    shares = [None if share is None else round(100 * share, 1) for share in (record.bandwidth, record.flops)]
    notes = [WORDS[record.status], record.note]
    note = ": ".join(text for text in notes if text)
    value = record.value
    text = "" if value is None else f"{value:.1e}" if 0 < value < 0.1 else format_cell(value)
    return [record.case, text, record.unit, *shares, note[:NOTE_WIDTH]]


def measure(results: Results, options: argparse.Namespace, scratch: Path) -> None:
    """Run every job that fits, and save after each."""
    first = Job("ceilings", "ceilings", "gpu_ceilings:measure", {"tiny": options.tiny}, 90)
    records = results.runner.run(first, least_seconds=0)
    results.device = next((dict(record.figures) for record in records if record.case == "device"), {})
    results.save()
    if not results.device:
        print("JAX has no working device, so nothing else is tried", file=sys.stderr)
        return
    tiny, ceilings = bool(results.device["tiny"]), best_of(records)
    backends: list[str] = options.backends or results.device["backends"]

    def run(jobs: Sequence[Job]) -> list[Record]:
        found = []
        for job in jobs:
            if not options.jobs or any(word in job.name for word in options.jobs):
                found += results.runner.run(job, least_seconds=1 if tiny else LEAST_SECONDS[job.section])
                results.save()
        return found

    jobs, timings = kernel_jobs(options, backends, ceilings, tiny=tiny)
    checked = run(jobs)
    wrong = {name for name in backends if any(r.status == "failed" and r.case.startswith(f"{name},") for r in checked)}
    # One that is wrong is measured last, if at all.
    backends = sorted(backends, key=lambda name: name in wrong)
    run(engine_jobs(options, backends, ceilings, scratch, timings, tiny=tiny))


def best_of(records: Sequence[Record]) -> dict[str, float | None]:
    """The arguments of `Ceilings`: the highest of each that was measured."""
    names = ("bytes_per_second", "flops_per_second")
    return {name: max((r.figures[name] for r in records if name in r.figures), default=None) for name in names}


def kernel_jobs(
    options: argparse.Namespace, backends: Sequence[str], ceilings: Mapping[str, float | None], *, tiny: bool
) -> tuple[list[Job], list[Job]]:
    """Checks of each attention backend and of what else there is, with timings; and timings of the other backends,
    which can wait.
    """
    sections = [section for section in options.sections if section in ("checks", "kernels")]
    given = {"seed": options.seed, "tiny": tiny, "ceilings": ceilings}

    def attention(name: str, *own: str) -> list[Job]:
        asked = [section for section in sections if section in own]
        arguments = {**given, "sections": asked, "backend": name}
        title = f"attention by {name}" + (", timings" if asked == ["kernels"] else "")
        return [Job(title, asked[0], "gpu_attention:measure", arguments, 110, CASE_SECONDS)] if asked else []

    first = attention(backends[0], "checks", "kernels")
    for name in backends[1:]:
        first += attention(name, "checks")
    if sections:
        arguments = {**given, "sections": sections}
        first.append(Job("other operations", sections[0], "gpu_ops:measure", arguments, 70, CASE_SECONDS))
    return first, [job for name in backends[1:] for job in attention(name, "kernels")]


def engine_jobs(
    options: argparse.Namespace,
    backends: Sequence[str],
    ceilings: Mapping[str, float | None],
    scratch: Path,
    timings: Sequence[Job],
    *,
    tiny: bool,
) -> list[Job]:
    """Engines, their starts and their peers, and what else is timed, what tells most first."""
    common = {"seed": options.seed, "tiny": tiny}
    models = sorted(options.models, key=MODELS.index, reverse=True)  # the largest tells most
    (largest, *others), (best, *rest) = models, backends
    folder = {"folder": str(scratch / "models")}

    def engine(model: str, backend: str) -> Job:
        own = {"model": model, "backend": backend, "cache": str(scratch / f"cache of {model} {backend}")}
        arguments = {**common, **folder, **own, "ceilings": ceilings}
        return Job(f"engine, {model}, {backend}", "engine", "gpu_engine:measure", arguments, 180, resumes=False)

    def start(model: str, kind: str) -> Job:
        own = {"model": model, "backend": best, "cache": str(scratch / "cache of starts"), "kind": kind, "tiny": tiny}
        return Job(f"{kind} start, {model}", "engine", "gpu_engine:start", {**folder, **own}, 90, resumes=False)

    def peer(model: str, name: str) -> Job:
        arguments = {**common, **folder, "model": model, "peer": name}
        return Job(f"{model}, {name}", "peers", "gpu_peers:measure", arguments, 150, resumes=False, may_fail=True)

    has_engine = "engine" in options.sections
    peers = [name for name in options.peers if "peers" in options.sections]
    rivals, slower = [name for name in peers if name == RIVAL], [name for name in peers if name != RIVAL]
    found = [engine(largest, best)] if has_engine else []
    found += [peer(largest, name) for name in rivals]
    found += [engine(model, best) for model in others] if has_engine else []
    found += [start(models[-1], kind) for kind in ("cold", "warm")] if has_engine else []
    found += [peer(model, name) for model in others for name in rivals]
    found += [*timings, *(peer(largest, name) for name in slower)]
    found += [engine(model, backend) for backend in rest for model in models] if has_engine else []
    return [*found, *(peer(model, name) for name in slower for model in others)]


if __name__ == "__main__":
    sys.exit(main())
