"""`jax-engine bench serve`: an OpenAI-compatible server under load, in vLLM's words."""

import asyncio
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jax_engine.server.bench.client import RequestError, Target, get
from jax_engine.server.bench.figures import RequestTiming, WorkItem, format_table, percentiles, write_json
from jax_engine.server.bench.load import Asking, Load, offer

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, kw_only=True)
class ServeBenchmark:
    """One measurement, as its command line describes it.

    Raises:
        ValueError: a value outside its range.
    """

    target: Target
    backend: str  # as the report has it
    endpoint: str
    model: str | None = None  # None: the server's first
    load: Load
    workload: Sequence[WorkItem]
    ignore_eos: bool = True
    num_warmups: int = 1
    percentile_metrics: tuple[str, ...] = ("ttft", "tpot", "itl")
    metric_percentiles: tuple[float, ...] = (99.0,)
    goodput: tuple[str, ...] = ()
    label: str | None = None
    save_result: bool = False
    save_detailed: bool = False
    result_dir: Path = Path()
    result_filename: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.percentile_metrics if name not in METRICS]:
            raise ValueError(f"percentile_metrics={unknown[0]!r} must be of {','.join(METRICS)}")
        if not all(0 < share < 100 for share in self.metric_percentiles):
            raise ValueError(f"metric_percentiles={self.metric_percentiles} must be above 0 and below 100")
        self.limits()

    def limits(self) -> dict[str, float]:
        """`goodput` as milliseconds by metric."""
        limits = {}
        for text in self.goodput:
            name, _, milliseconds = text.partition(":")
            try:
                limits[name] = float(milliseconds)
            except ValueError:
                limits[name] = -1.0
            if name not in ("ttft", "tpot", "e2el") or limits[name] < 0:
                raise ValueError(f"goodput={text!r} must be ttft:MS, tpot:MS or e2el:MS, such as ttft:200")
        return limits


def bench_serve(benchmark: ServeBenchmark) -> int:
    """Measure and print, and save what was asked for; returns the exit code, 1 when a request failed.

    Raises:
        ValueError: the server cannot be asked.
    """
    try:
        result = asyncio.run(measure(benchmark))
    except (RequestError, OSError, EOFError) as error:
        raise ValueError(f"the server at {benchmark.target.url} cannot be measured: {error}") from error
    print(format_table(["", "benchmark"], table_rows(result, benchmark)))
    if benchmark.save_result or benchmark.save_detailed:
        path = benchmark.result_dir / (benchmark.result_filename or default_name(result))
        path.parent.mkdir(parents=True, exist_ok=True)
        details = ("input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors")
        kept = {key: value for key, value in result.items() if benchmark.save_detailed or key not in details}
        write_json(path, kept)
        print(f"saved as {path}")
    errors = [error for error in result["errors"] if error]
    if errors:
        print(f"{len(errors)} requests failed; the first: {errors[0]}")
    return 1 if errors else 0


async def measure(benchmark: ServeBenchmark) -> dict[str, Any]:
    """Offer the workload, after requests that are not counted; the result in vLLM's fields."""
    target, load = benchmark.target, benchmark.load
    model = benchmark.model or json.loads(await get(target, "/v1/models"))["data"][0]["id"]
    asking = Asking(model, benchmark.endpoint, benchmark.ignore_eos)
    workload = benchmark.workload
    warm_ups = await offer(target, asking, workload[: benchmark.num_warmups], load)
    if failed := [outcome for outcome in warm_ups if isinstance(outcome, str)]:
        raise RequestError(failed[0])
    with tqdm(total=len(workload), desc="Requests", disable=None) as bar:
        begin = time.perf_counter()
        outcomes = await offer(target, asking, workload, load, lambda: bar.update(1))
        duration = time.perf_counter() - begin
    settings = {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": benchmark.backend,
        "label": benchmark.label,
        "model_id": model,
        "num_prompts": len(workload),
        "request_rate": "inf" if math.isinf(load.rate) else load.rate,
        "burstiness": load.burstiness,
        "max_concurrency": load.concurrency if load.concurrency < len(workload) else None,
    }
    return {**settings, **figures(benchmark, outcomes, duration)}


def figures(benchmark: ServeBenchmark, outcomes: Sequence[RequestTiming | str], duration: float) -> dict[str, Any]:
    """What was measured: rates, latencies in milliseconds, and for each request what it took, in seconds."""
    timings = [outcome for outcome in outcomes if isinstance(outcome, RequestTiming)]
    inputs, outputs = sum(t.prompt_tokens for t in timings), sum(t.output_tokens for t in timings)
    limits = benchmark.limits()
    good = sum(all(_milliseconds(t, name) <= limit for name, limit in limits.items()) for t in timings)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(timings),
        "failed": len(outcomes) - len(timings),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(timings) / duration,
        "request_goodput": good / duration if limits else None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "max_output_tokens_per_s": busiest_second(timings),
        "max_concurrent_requests": most_at_once(timings),
    }
    values = {
        "ttft": [t.time_to_first_token for t in timings],
        "tpot": [t.time_per_output_token for t in timings if t.time_per_output_token is not None],
        "itl": [gap for t in timings for gap in t.inter_token_latencies],
        "e2el": [t.end_to_end for t in timings],
    }
    for name in benchmark.percentile_metrics:
        result |= statistics_of(name, [1e3 * value for value in values[name]], benchmark.metric_percentiles)
    each = [None if isinstance(outcome, str) else outcome for outcome in outcomes]
    return {
        **result,
        "input_lens": [t.prompt_tokens if t else 0 for t in each],
        "output_lens": [t.output_tokens if t else 0 for t in each],
        "ttfts": [t.time_to_first_token if t else 0.0 for t in each],
        "itls": [list(t.inter_token_latencies) if t else [] for t in each],
        "generated_texts": [t.text if t else "" for t in each],
        "errors": [outcome if isinstance(outcome, str) else "" for outcome in outcomes],
    }


def _milliseconds(timing: RequestTiming, metric: str) -> float:
    seconds = {
        "ttft": timing.time_to_first_token,
        "tpot": timing.time_per_output_token or 0.0,
        "e2el": timing.end_to_end,
    }
    return 1e3 * seconds[metric]


def statistics_of(name: str, values: Sequence[float], shares: Iterable[float]) -> dict[str, float]:
    """vLLM's fields of one metric; NaN where nothing was measured."""
    result = {
        f"mean_{name}_ms": statistics.fmean(values) if values else math.nan,
        f"median_{name}_ms": statistics.median(values) if values else math.nan,
        f"std_{name}_ms": statistics.pstdev(values) if values else math.nan,
    }
    return result | {f"p{share}_{name}_ms": value for share, value in percentiles(values, shares).items()}


def busiest_second(timings: Sequence[RequestTiming]) -> float:
    """The most output tokens in one second of the clock, a request's tokens spread evenly over its pieces."""
    if not timings:
        return 0.0
    start = min(t.sent for t in timings)
    seconds: dict[int, float] = {}
    for timing in timings:
        for arrival in timing.arrivals:
            second = int(arrival - start)
            seconds[second] = seconds.get(second, 0.0) + timing.output_tokens / len(timing.arrivals)
    return max(seconds.values())


def most_at_once(timings: Sequence[RequestTiming]) -> int:
    """The most requests that were open at one time."""
    changes = sorted([(t.sent, 1) for t in timings] + [(t.arrivals[-1], -1) for t in timings])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def table_rows(result: dict[str, Any], benchmark: ServeBenchmark) -> list[list[object]]:
    """What is printed."""
    rows: list[list[object]] = [
        ["requests finished", result["completed"]],
        ["requests failed", result["failed"]],
        ["seconds", result["duration"]],
        ["requests/s", result["request_throughput"]],
        ["output tokens/s", result["output_throughput"]],
        ["all tokens/s", result["total_token_throughput"]],
        ["output tokens in the busiest second", result["max_output_tokens_per_s"]],
        ["most requests at once", result["max_concurrent_requests"]],
    ]
    if result["request_goodput"] is not None:
        rows.append(["requests/s within the limits", result["request_goodput"]])
    for name in benchmark.percentile_metrics:
        shares = [f"p{share:g}" for share in benchmark.metric_percentiles]
        named = ("mean", "median", *shares)
        rows += [[f"{name.upper()} {figure}, ms", result[f"{figure}_{name}_ms"]] for figure in named]
    return rows


def default_name(result: dict[str, Any]) -> str:
    """vLLM's file name."""
    concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] else ""
    model = str(result["model_id"]).rpartition("/")[2]
    return (
        f"{result['label'] or result['backend']}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}.json"
    )
