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
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax_engine.server.bench.client import Target, get
from jax_engine.server.bench.figures import (
    Latencies,
    Rates,
    RequestTiming,
    format_table,
    latency_rows,
    write_json,
)
from jax_engine.server.bench.load import Asking, Load, offer
from jax_engine.server.bench.metrics import metrics, server_figures
from jax_engine.server.bench.process import running_server
from measure import add_workload_arguments, workload_from

WARM_UP_REQUESTS = 4


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
    asking, workload = Asking(model), workload_from(options)
    load = Load(options.request_rate, options.max_concurrency or len(workload), options.seed)
    await offer(target, asking, workload[:WARM_UP_REQUESTS], load)
    before = await metrics(target)
    start = time.perf_counter()
    answers = await offer(target, asking, workload, load)
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


if __name__ == "__main__":
    main()
