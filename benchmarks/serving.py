"""Serving under load: streamed completions at a request rate or a concurrency, from any OpenAI-compatible server.

    python benchmarks/serving.py --start-server                          # our own, with the built-in model
    python benchmarks/serving.py --base-url http://localhost:8000 --request-rate 20
    python benchmarks/serving.py --start-server --max-concurrency 64 -- --max-num-seqs 64

Every request asks for an exact number of tokens (`ignore_eos`), greedily, streamed. Give `--base-url` several times to
measure several servers one after the other with the same requests. What follows `--` goes to the started server, which
compiles everything before the first request (`-- --no-compile-before-ready` measures a cold start instead).
"""

import argparse
import asyncio
import json
import math
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from http_client import RequestError, Target, get, stream
from measure import (
    Latencies,
    Rates,
    RequestTiming,
    WorkItem,
    add_workload_arguments,
    format_table,
    latency_rows,
    workload_from,
    write_json,
)

WARM_UP_REQUESTS = 4
# One line of Prometheus' text format; label values may hold anything but a bare quote.
SAMPLE = re.compile(r'(?P<name>[^\s{#]+)(?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})? (?P<value>\S+)(?: \S+)?')
PART_LABEL = re.compile(r'\bpart="([^"]*)"')
HOST_PARTS = ("schedule", "pack", "launch", "collect", "wait")
GROWING = {
    "steps": "jax_engine:steps_total",
    "preemptions": "vllm:num_preemptions_total",
    "compiles in a request's path": "jax_engine:compiles_in_request_path_total",
}
START_SECONDS = 600
STOP_SECONDS = 60


@dataclass(frozen=True)
class Load:
    """How requests are offered: Poisson arrivals at `rate` a second (infinite: at once), at most `concurrency` open."""

    rate: float
    concurrency: int
    seed: int

    def send_times(self, count: int) -> list[float]:
        """Seconds after the start at which each request is due."""
        rng, now, times = random.Random(self.seed), 0.0, []
        for _ in range(count):
            times.append(now)
            now += 0.0 if math.isinf(self.rate) else rng.expovariate(self.rate)
        return times


@dataclass(frozen=True)
class Measurement:
    """One server under one load."""

    url: str
    rates: Rates
    latencies: Latencies
    failures: tuple[str, ...]
    server: dict[str, float]  # what the server's own metrics tell of itself; empty where they tell nothing


def main() -> None:
    options = parse_arguments()
    measurements = []
    if options.start_server:
        with running_server(options.model, options.server_arguments) as url:
            measurements.append(asyncio.run(measure(Target(url, options.api_key), None, options)))
    targets = [Target(url, options.api_key) for url in options.base_url]
    measurements += [asyncio.run(measure(target, options.model, options)) for target in targets]
    print(format_table(["", *(m.url for m in measurements)], table_rows(measurements)))
    if options.json:
        write_json(options.json, {"servers": [{**asdict(m), "rates": m.rates.as_dict()} for m in measurements]})
    failures = [failure for m in measurements for failure in m.failures]
    if failures:
        sys.exit(f"{len(failures)} requests failed; the first: {failures[0]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start-server", action="store_true", help="start `jax-engine serve` for this run")
    parser.add_argument("--base-url", action="append", default=[], metavar="URL", help="a running server; repeatable")
    parser.add_argument("--model", help="to start the server with, or to ask a running one for (default: its first)")
    parser.add_argument("--api-key")
    rate: dict[str, Any] = {"type": float, "default": math.inf, "metavar": "R"}
    parser.add_argument("--request-rate", help="requests a second, Poisson (default: all at once)", **rate)
    parser.add_argument("--max-concurrency", type=int, metavar="N", help="requests open at once (default: no limit)")
    add_workload_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("server_arguments", nargs="*", metavar="-- FLAGS", help="passed to the started server")
    options = parser.parse_args()
    if not options.start_server and not options.base_url:
        parser.error("nothing to measure: give --start-server, --base-url URL, or both")
    if options.request_rate <= 0:
        parser.error(f"--request-rate {options.request_rate} must be above 0")
    return options


async def measure(target: Target, model: str | None, options: argparse.Namespace) -> Measurement:
    """Offer the workload to one server, after a few requests that are not counted."""
    model = model or json.loads(await get(target, "/v1/models"))["data"][0]["id"]
    workload = workload_from(options)
    load = Load(options.request_rate, options.max_concurrency or len(workload), options.seed)
    await offer(target, model, workload[:WARM_UP_REQUESTS], load)
    before = await metrics(target)
    start = time.perf_counter()
    answers = await offer(target, model, workload, load)
    seconds = time.perf_counter() - start
    after = await metrics(target)
    timings = [answer for answer in answers if isinstance(answer, RequestTiming)]
    return Measurement(
        url=target.url,
        rates=Rates(
            seconds, len(timings), sum(t.prompt_tokens for t in timings), sum(t.output_tokens for t in timings)
        ),
        latencies=Latencies.of(timings),
        failures=tuple(answer for answer in answers if isinstance(answer, str)),
        server=server_figures(before, after),
    )


async def offer(target: Target, model: str, workload: Sequence[WorkItem], load: Load) -> list[RequestTiming | str]:
    """Send every request when it is due; each ends in its timing, or in what went wrong."""
    free = asyncio.Semaphore(load.concurrency)
    start = time.perf_counter()

    async def one(item: WorkItem, due: float) -> RequestTiming | str:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        async with free:
            try:
                return await complete(target, model, item)
            except (RequestError, OSError, EOFError, ValueError) as error:
                return f"{type(error).__name__}: {error}"

    due_times = load.send_times(len(workload))
    return await asyncio.gather(*(one(item, due) for item, due in zip(workload, due_times, strict=True)))


async def complete(target: Target, model: str, item: WorkItem) -> RequestTiming:
    """One streamed completion; connecting counts, as it does for a user."""
    body = {
        "model": model,
        "prompt": list(item.prompt_token_ids),
        "max_tokens": item.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent, arrivals, usage = time.perf_counter(), [], None
    async for arrival, event in stream(target, "/v1/completions", body):
        usage = event.get("usage") or usage
        # A last chunk without text only says why the answer ended.
        if any(choice["text"] or choice["finish_reason"] is None for choice in event["choices"]):
            arrivals.append(arrival)
    if not arrivals or usage is None:
        raise RequestError(f"the stream ended after {len(arrivals)} pieces, with usage {usage}")
    if usage["completion_tokens"] != item.output_tokens:
        raise RequestError(f"{usage['completion_tokens']} tokens came, {item.output_tokens} were asked for")
    return RequestTiming(sent, tuple(arrivals), usage["prompt_tokens"], usage["completion_tokens"])


async def metrics(target: Target) -> dict[str, float]:
    """The server's Prometheus samples; empty where it has none."""
    try:
        return parse_metrics(await get(target, "/metrics"))
    except RequestError:
        return {}


def parse_metrics(exposition: str) -> dict[str, float]:
    """Samples in Prometheus' text format by name, a label `part` kept as `name{part}` and all other labels added up."""
    totals: dict[str, float] = {}
    for line in exposition.splitlines():
        if (sample := SAMPLE.fullmatch(line)) is None:
            continue
        part = PART_LABEL.search(sample["labels"] or "")
        name = f"{sample['name']}{{{part[1]}}}" if part else sample["name"]
        totals[name] = totals.get(name, 0.0) + float(sample["value"])
    return totals


def server_figures(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Compile count, waste and host time between two readings of our own metrics; of a peer's, what they share."""
    growth = {name: value - before.get(name, 0.0) for name, value in after.items()}
    figures: dict[str, float] = {label: int(growth[name]) for label, name in GROWING.items() if name in growth}
    if "jax_engine:programs_compiled" in after:
        figures["programs compiled"] = int(after["jax_engine:programs_compiled"])
    if rows := growth.get("jax_engine:token_rows_total"):
        figures["padding, % of token rows"] = 100 * growth["jax_engine:padding_tokens_total"] / rows
    if room := growth.get("jax_engine:kv_page_room_sampled_total"):
        figures["KV page waste, mean %"] = 100 * growth["jax_engine:kv_page_waste_sampled_total"] / room
    if steps := growth.get("jax_engine:steps_total"):
        for part in HOST_PARTS:
            figures[f"host {part}, us/step"] = 1e6 * growth[f"jax_engine:host_seconds_total{{{part}}}"] / steps
    return figures


def table_rows(measurements: Sequence[Measurement]) -> list[list[object]]:
    """One row a figure, one column a server; what only some servers tell comes last."""
    rows: list[list[object]] = [
        ["requests finished", *(m.rates.requests for m in measurements)],
        ["requests failed", *(len(m.failures) for m in measurements)],
        ["seconds", *(m.rates.seconds for m in measurements)],
        ["requests/s", *(m.rates.requests_per_second for m in measurements)],
        ["input tokens/s", *(m.rates.input_tokens_per_second for m in measurements)],
        ["output tokens/s", *(m.rates.output_tokens_per_second for m in measurements)],
    ]
    rows += latency_rows([m.latencies for m in measurements])
    told = dict.fromkeys(label for m in measurements for label in m.server)
    return rows + [[label, *(m.server.get(label) for m in measurements)] for label in told]


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(model: str | None, arguments: Sequence[str]) -> Iterator[str]:
    """The address of a `jax-engine serve` of this environment, ready for requests; ended by SIGTERM afterwards."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("jax-engine")), "serve", *([model] if model else [])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--compile-before-ready", "--no-enable-prefix-caching"]
    command += arguments
    with (
        tempfile.TemporaryFile("w+") as log,
        ended_afterwards(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        if not asyncio.run(becomes_healthy(Target(url), process)):
            log.seek(0)
            sys.exit(f"the server did not become ready; its log ends:\n{log.read()[-4000:]}")
        yield url


@contextmanager
def ended_afterwards(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """The process, ended by SIGTERM, and after `STOP_SECONDS` by SIGKILL."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def becomes_healthy(target: Target, process: "subprocess.Popen[bytes]") -> bool:
    """Whether `/health` answers before the process ends or the time for starting is over."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            await get(target, "/health")
        except (RequestError, OSError, EOFError):
            await asyncio.sleep(0.2)
        else:
            return True
    return False


if __name__ == "__main__":
    main()
