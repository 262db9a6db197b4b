"""`jax-engine bench startup`: seconds from the command to the first answer over HTTP, cold and warm.

Cold is a start with an empty compilation cache, warm one with that which the last cold start, and those to warm up,
have filled; both begin with the process and end with the last byte of a short greedy answer.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jax_engine.server.bench.client import RequestError, Target, stream
from jax_engine.server.bench.figures import format_table, percentiles, write_json
from jax_engine.server.bench.metrics import metrics
from jax_engine.server.bench.process import ENGINE, START_SECONDS, ended_afterwards, free_port

BODY = {"prompt": "What is 17 + 25?", "max_tokens": 8, "temperature": 0, "stream": True}
POLL_SECONDS = 0.02
HELP_RUNS = 3
SHARES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True)
class Start:
    """One start of a server, in seconds since its command began."""

    listening: float  # any HTTP answer, also one that says to wait
    first_answer: float
    all_compiled: float  # the last step program is ready
    compilation: float  # what its compile threads were busy for, all together


def bench_startup(
    arguments: Sequence[str], *, num_cold: int, num_warm: int, num_warm_up: int, output_json: Path | None
) -> int:
    """Start `jax-engine serve ARGUMENTS` again and again, and print how long it took; returns the exit code."""
    helps = [command_seconds([ENGINE, "--help"]) for _ in range(HELP_RUNS)]
    cold: list[Start] = []
    warm: list[Start] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=num_cold + num_warm_up + num_warm, desc="Starts", disable=None) as bar,
    ):
        caches = [f"{folder}/{number}" for number in range(max(num_cold, 1))]
        for cache in caches[:num_cold]:
            cold.append(start(arguments, cache))
            bar.update(1)
        for number in range(num_warm_up + num_warm):
            run = start(arguments, caches[-1])
            bar.update(1)
            if number >= num_warm_up:
                warm.append(run)
    print(format_table(["", "cold, s", "warm, s"], table_rows(cold, warm, helps)))
    if output_json is not None:
        write_json(output_json, {**report("cold", cold), **report("warm", warm), "help_times": helps})
    return 0


def table_rows(cold: Sequence[Start], warm: Sequence[Start], helps: Sequence[float]) -> list[list[object]]:
    """The median of each figure, and the whole range of the one that a user waits for."""
    figures = {
        "HTTP answers that the engine is starting": lambda run: run.listening,
        "first answer": lambda run: run.first_answer,
        "every step program compiled": lambda run: run.all_compiled,
        "compile threads busy": lambda run: run.compilation,
    }
    rows: list[list[object]] = [
        [text, *(statistics.median(map(figure, runs)) if runs else None for runs in (cold, warm))]
        for text, figure in figures.items()
    ]
    for text, pick in (("first answer, quickest start", min), ("first answer, slowest start", max)):
        rows.append([text, *(pick(run.first_answer for run in runs) if runs else None for runs in (cold, warm))])
    return [*rows, ["jax-engine --help", None, statistics.median(helps)]]


def report(kind: str, runs: Sequence[Start]) -> dict[str, Any]:
    """vLLM's fields for the starts of a kind, and our own: until the port answers, until all is compiled."""
    if not runs:
        return {}
    startups, compilations = [run.first_answer for run in runs], [run.compilation for run in runs]
    return {
        f"avg_{kind}_startup_time": statistics.fmean(startups),
        f"avg_{kind}_compilation_time": statistics.fmean(compilations),
        f"{kind}_startup_times": startups,
        f"{kind}_compilation_times": compilations,
        f"{kind}_startup_percentiles": percentiles(startups, SHARES),
        f"{kind}_compilation_percentiles": percentiles(compilations, SHARES),
        f"{kind}_listening_times": [run.listening for run in runs],
        f"{kind}_all_compiled_times": [run.all_compiled for run in runs],
    }


def command_seconds(command: Sequence[str]) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def start(arguments: Sequence[str], cache: str) -> Start:
    """Start a server with the compilation cache `cache`, time it until all is compiled, and end it."""
    port = free_port()
    command = [ENGINE, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen([*command, "--compilation-cache-dir", cache], stdout=log, stderr=subprocess.STDOUT)
        with ended_afterwards(process):
            try:
                return asyncio.run(watch(Target(f"http://127.0.0.1:{port}"), process, begin))
            except TimeoutError:
                log.seek(0)
                sys.exit(f"the server did not answer; its log ends:\n{log.read()[-4000:]}")


async def watch(target: Target, process: "subprocess.Popen[bytes]", begin: float) -> Start:
    """Ask until the server answers, then until everything is compiled.

    Raises:
        TimeoutError: the process has ended, or `START_SECONDS` are over.
    """
    listening = first_answer = None
    while process.poll() is None and time.perf_counter() - begin < START_SECONDS:
        try:
            if first_answer is None:
                async for _ in stream(target, "/v1/completions", BODY):
                    pass
                first_answer = time.perf_counter() - begin
            elif (compilation := await compile_seconds(target)) is not None:
                assert listening is not None
                return Start(listening, first_answer, time.perf_counter() - begin, compilation)
            else:
                await asyncio.sleep(10 * POLL_SECONDS)
        except RequestError:  # 503: not ready
            listening = listening or time.perf_counter() - begin
            await asyncio.sleep(POLL_SECONDS)
        except (OSError, EOFError):  # not even listening
            await asyncio.sleep(POLL_SECONDS)
    raise TimeoutError


async def compile_seconds(target: Target) -> float | None:
    """How long the server says that compiling took; None while it has not compiled everything."""
    samples = await metrics(target)
    if samples["jax_engine:programs_compiled"] == samples["jax_engine:programs_planned"] > 0:
        return samples["jax_engine:compile_seconds_total"]
    return None
