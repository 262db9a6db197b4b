"""Jobs in processes of their own: what one leaves behind, also when it crashes, hangs or runs out of time.

A job is a function of a module here, given a `Report`. It names each case before it begins, and what it finds is on
disk at once. A case that ends its process, or takes longer than it may, has failed; the job goes on after it in a new
process, if it can.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

MAX_PROCESSES = 4  # of one job: each begins with importing JAX
POLL_SECONDS = 0.2
END_SECONDS = 5.0  # that a process has to end once it was asked to
NO_TIME, INTERRUPTED = "no time was left for it", "it was interrupted"
KEPT_LINES = 12  # of what a process printed last, when it fails


@dataclass(frozen=True)
class Record:
    """One line of the result."""

    section: str
    case: str
    status: str = "measured"  # or passed, failed, skipped
    value: float | None = None
    unit: str = ""
    bandwidth: float | None = None  # share of the bytes a second that were measured, 0 to 1
    flops: float | None = None  # share of the operations a second that were measured
    note: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)  # more, for programs


class Skipped(Exception):  # noqa: N818 - no error
    """Raised by a case that this machine, or this shape, is not for; says why."""


@dataclass(frozen=True)
class Job:
    """What one process, or a few after each other, do."""

    name: str
    section: str
    function: str  # module:function
    arguments: Mapping[str, Any]
    seconds: float  # for all of it, at most
    case_seconds: float | None = None  # for one case, at most
    resumes: bool = True  # a new process goes on after a case that ended the one before it
    may_fail: bool = False  # a failure is no failure of this project's


class Report:
    """Where a job writes what it finds, line by line. Mutable; owned by the job's process."""

    def __init__(self, path: Path, section: str, *, begun: float, deadline: float, may_fail: bool = False) -> None:
        """`begun`, when the process was started, and `deadline` are on the monotonic clock, which is the machine's."""
        self.begun, self.deadline = begun, deadline
        self._path = path
        self._section = section
        self._may_fail = may_fail
        self._known = {line["begin"] for line in read_lines(path) if "begin" in line}
        self.is_resumed = bool(self._known)  # a process of the same job has ended before its time

    def add(self, case: str, *, section: str | None = None, **fields: Any) -> None:
        """Keep a record, and show it."""
        record = Record(section or self._section, case, **fields)
        self._write({"record": asdict(record)})
        print(f"[{record.section}] {describe(record)}", flush=True)

    @contextmanager
    def case(self, name: str, *, section: str | None = None) -> Iterator[None]:
        """Around a case, whose errors become records. Use `wants` before."""
        self._write({"begin": name, "section": section or self._section})
        try:
            yield
        except Skipped as reason:
            self.add(name, section=section, status="skipped", note=str(reason))
        except Exception as error:  # a benchmark goes on with the next case, whatever went wrong
            traceback.print_exc()
            status = "skipped" if self._may_fail else "failed"
            self.add(name, section=section, status=status, note=f"{type(error).__name__}: {first_line(error)}")
            if not device_works():
                raise SystemExit(1) from error  # a new process goes on
        self._write({"end": name})

    def wants(self, name: str) -> bool:
        """Whether a case was not begun by a process before this one."""
        return name not in self._known

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def _write(self, line: Mapping[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def describe(record: Record) -> str:
    """In a line of a log."""
    parts = [record.case, record.status if record.status != "measured" else ""]
    parts.append("" if record.value is None else f"{record.value:.5g} {record.unit}")
    for name, share in (("bandwidth", record.bandwidth), ("FLOPs", record.flops)):
        parts.append("" if share is None else f"{100 * share:.0f} % of {name}")
    return ", ".join(part for part in (*parts, record.note) if part)


def device_works() -> bool:
    """Whether JAX still computes: an illegal access, for one, ends all that a process can do with its GPU."""
    if "jax" not in sys.modules:
        return True
    import jax
    import jax.numpy as jnp

    try:
        return float(jnp.ones(8).sum()) == 8
    except jax.errors.JaxRuntimeError:
        return False


def first_line(error: Exception) -> str:
    """Of its message, cut to what fits in a table."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a job has written; a last line that is not whole is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def records_of(lines: Sequence[Mapping[str, Any]]) -> list[Record]:
    return [Record(**line["record"]) for line in lines if "record" in line]


def places_of_jax() -> list[Path]:
    """Where JAX looks for CUDA's programs."""
    beside_jax = util.find_spec("nvidia")
    locations = beside_jax.submodule_search_locations if beside_jax else None
    return [Path("/usr/local/cuda"), *(folder for place in locations or () for folder in Path(place).glob("*"))]


def tools(places: Sequence[Path]) -> Mapping[str, str]:
    """Environment that says where CUDA's assembler is, if it is on the path and in none of these places: kernels are
    compiled with it.
    """
    found = shutil.which("ptxas")
    if found is None or os.environ.get("CUDA_ROOT") or any((place / "bin" / "ptxas").exists() for place in places):
        return {}
    return {"CUDA_ROOT": str(Path(found).resolve().parents[1])}


def run_child(arguments: Sequence[str]) -> None:
    """In the child: run a job's function."""
    order = json.loads(arguments[0])
    module, _, name = order["function"].partition(":")
    function: Callable[..., None] = getattr(importlib.import_module(module), name)
    times = {"begun": order["begun"], "deadline": order["deadline"]}
    report = Report(Path(order["path"]), order["section"], **times, may_fail=order["may_fail"])
    function(report, **order["arguments"])


class Runner:
    """Runs jobs one after another within a budget. Mutable; owned by the command."""

    def __init__(self, folder: Path, command: Sequence[str], *, budget_seconds: float) -> None:
        """`command` with an order as its last argument runs `run_child`; files go to `folder`."""
        self._folder = folder
        self._command = tuple(command)
        self.deadline = time.monotonic() + budget_seconds
        self.on_progress: Callable[[], None] = lambda: None  # called with every line of the running job's
        self._kept: list[Record] = []
        self._running: list[Record] = []  # of the job that runs
        self.seconds: dict[str, float] = {}  # that each job took

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def records(self) -> list[Record]:
        """All so far."""
        return [*self._kept, *self._running]

    def run(self, job: Job, *, least_seconds: float) -> list[Record]:
        """What a job finds; where the budget has less than `least_seconds` left, that it was skipped."""
        if self.seconds_left < least_seconds:
            note = f"{max(0, self.seconds_left):.0f} s of the budget were left, of {least_seconds:.0f} at least"
            return self._keep([Record(job.section, job.name, "skipped", note=note)])
        start = time.monotonic()
        path = self._folder / f"job-{len(self.seconds):02d}.jsonl"
        deadline = min(self.deadline, start + job.seconds)
        print(f"--- {job.name}: at most {deadline - start:.0f} s", flush=True)
        ends: list[str] = []
        try:
            while not ends or (ends[-1] and job.resumes and len(ends) < MAX_PROCESSES):
                ends.append(self._run_process(job, path, deadline))
                if time.monotonic() > deadline - 1:
                    break
        finally:  # what there is counts when the whole run is ended, too
            self.seconds[job.name] = time.monotonic() - start
            lines = read_lines(path)
            found = self._keep([*records_of(lines), *self._unfinished(job, lines, ends)])
        return found

    def logs(self) -> bytes:
        """What the jobs have said beside their records."""
        return b"".join(
            b"--- %s\n%s" % (log.name.encode(), log.read_bytes()) for log in sorted(self._folder.glob("*.log"))
        )

    def _keep(self, records: list[Record]) -> list[Record]:
        self._running = []
        self._kept += records
        return records

    def _unfinished(self, job: Job, lines: Sequence[Mapping[str, Any]], ends: Sequence[str]) -> Iterator[Record]:
        """Records of cases that ended their process, each in its turn."""
        ended = {line["end"] for line in lines if "end" in line}
        failed = {line["record"]["case"] for line in lines if "record" in line}
        broken = [line for line in lines if "begin" in line and line["begin"] not in ended | failed]
        reasons = [end for end in ends if end]
        for number, line in enumerate(broken):
            reason = reasons[min(number, len(reasons) - 1)] if reasons else INTERRUPTED
            yield Record(line["section"], line["begin"], _status(job, reason), note=reason)
        if reasons and not broken:
            yield Record(job.section, job.name, _status(job, reasons[-1]), note=reasons[-1])

    def _run_process(self, job: Job, path: Path, deadline: float) -> str:
        """Run a process of a job to its end; why that was no good end, or ""."""
        order = {
            "function": job.function,
            "section": job.section,
            "path": str(path),
            "begun": time.monotonic(),
            "deadline": deadline,
            "may_fail": job.may_fail,
            "arguments": dict(job.arguments),
        }
        log = path.with_suffix(".log")
        with log.open("ab") as errors:
            begin = errors.tell()
            process = subprocess.Popen(
                [*self._command, json.dumps(order)],
                stderr=errors,
                env={**os.environ, **tools(places_of_jax())},
                start_new_session=True,  # so that what it starts ends with it
            )
            try:
                reason = self._watch(process, job, path, deadline)
            finally:
                end(process)
        if reason or not process.returncode:
            return reason
        said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()[-KEPT_LINES:]
        print("\n".join(said), file=sys.stderr, flush=True)
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        return f"the process ended with {how}" + (f": {said[-1][:160]}" if said else "")

    def _watch(self, process: subprocess.Popen[bytes], job: Job, path: Path, deadline: float) -> str:
        """Wait for the end, of its time too; why it has to be ended, or ""."""
        size = path.stat().st_size if path.exists() else 0
        since: float | None = None  # it wrote last; before its first case, it imports
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            if (grown := path.stat().st_size if path.exists() else 0) != size:
                size, since = grown, now
                self._running = records_of(read_lines(path))
                self.on_progress()
            if now > deadline:
                return NO_TIME
            if job.case_seconds is not None and since is not None and now - since > job.case_seconds:
                return f"it took longer than {job.case_seconds:.0f} s"
        return ""


def _status(job: Job, reason: str) -> str:
    return "skipped" if job.may_fail or reason in (NO_TIME, INTERRUPTED) else "failed"


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        if process.poll() is not None:
            continue
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()
    # What it had started may still hold the GPU's memory, which the next process is to have.
    given_up = time.monotonic() + END_SECONDS
    while _has_members(process.pid) and time.monotonic() < given_up:
        time.sleep(POLL_SECONDS / 4)


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
