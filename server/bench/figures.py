"""What measuring needs: a repeatable workload, the arithmetic of rates and latencies, one table."""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class WorkItem:
    """One request: a prompt of token ids and the exact number of tokens to generate (end of sequence is ignored)."""

    prompt_token_ids: tuple[int, ...]
    output_tokens: int


def mixed_workload(
    num_requests: int,
    *,
    prompt_tokens: tuple[int, int],
    output_tokens: tuple[int, int],
    vocab_size: int,
    seed: int,
    prefix_tokens: int = 0,
) -> list[WorkItem]:
    """Random prompts with lengths drawn evenly from two inclusive ranges, all of them behind one prefix; equal
    arguments give an equal workload.
    """
    for name, (low, high) in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if not 1 <= low <= high:
            raise ValueError(f"{name} is {low}..{high}; give two lengths of at least 1, the smaller first")
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(count))

    prefix = tokens(prefix_tokens)
    return [
        WorkItem(prefix + tokens(rng.randint(*prompt_tokens)), rng.randint(*output_tokens)) for _ in range(num_requests)
    ]


@dataclass(frozen=True)
class Percentiles:
    """Of any quantity, in its own unit; NaN when there was nothing to measure."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Percentiles":
        """Linear interpolation between closest ranks, as numpy.percentile does by default."""
        ordered = sorted(values)
        return cls(*(quantile(ordered, share) for share in (0.5, 0.9, 0.99)))


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie; NaN of none."""
    if not ordered:
        return math.nan
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def percentiles(values: Iterable[float], of_hundred: Iterable[float]) -> dict[str, float]:
    """Several percentiles, each under its number, as vLLM's reports have them."""
    ordered = sorted(values)
    return {f"{share:g}": quantile(ordered, share / 100) for share in of_hundred}


@dataclass(frozen=True)
class RequestTiming:
    """When a request was sent and when each piece of its answer came, in seconds of one clock.

    A piece is whatever arrives at once: one token mostly, several when the network or the engine joins them.
    """

    sent: float
    arrivals: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    text: str = ""

    @property
    def time_to_first_token(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def end_to_end(self) -> float:
        return self.arrivals[-1] - self.sent

    @property
    def time_per_output_token(self) -> float | None:
        """Mean seconds a token after the first; None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.output_tokens - 1)

    @property
    def inter_token_latencies(self) -> tuple[float, ...]:
        """Seconds between one piece and the next."""
        return tuple(later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False))


@dataclass(frozen=True)
class Latencies:
    """Milliseconds over all requests: to the first token, a later token (mean of each request), between pieces."""

    ttft_ms: Percentiles
    tpot_ms: Percentiles
    itl_ms: Percentiles

    @classmethod
    def of(cls, timings: Sequence[RequestTiming]) -> "Latencies":
        per_token = [1e3 * t.time_per_output_token for t in timings if t.time_per_output_token is not None]
        between = [1e3 * gap for t in timings for gap in t.inter_token_latencies]
        first = [1e3 * t.time_to_first_token for t in timings]
        return cls(Percentiles.of(first), Percentiles.of(per_token), Percentiles.of(between))


def latency_rows(columns: Sequence[Latencies]) -> list[list[object]]:
    """Nine table rows: first token, later tokens and gaps, each at three percentiles."""
    return [
        [f"{label} {rank}, ms", *(asdict(column)[name][rank] for column in columns)]
        for label, name in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"))
        for rank in ("p50", "p90", "p99")
    ]


@dataclass(frozen=True)
class Rates:
    """What was finished in `seconds` of wall time; only tokens that a request asked for count."""

    seconds: float
    requests: int
    input_tokens: int
    output_tokens: int

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds

    @property
    def input_tokens_per_second(self) -> float:
        return self.input_tokens / self.seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    def as_dict(self) -> dict[str, float]:
        return {
            **asdict(self),
            "requests_per_second": self.requests_per_second,
            "input_tokens_per_second": self.input_tokens_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
        }


def workload_rates(workload: Sequence[WorkItem], seconds: float) -> Rates:
    """The rates of a whole workload finished in `seconds`."""
    inputs = sum(len(item.prompt_token_ids) for item in workload)
    return Rates(seconds, len(workload), inputs, sum(item.output_tokens for item in workload))


def median_run(work: Callable[[], Result], *, repeats: int) -> tuple[float, Result]:
    """(seconds, result) of the repetition of median duration, after one that is not timed."""
    work()
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        runs.append((time.perf_counter() - start, result))
    median = statistics.median_low(seconds for seconds, _ in runs)
    return next(run for run in runs if run[0] == median)


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, numbers to the right; a float with three significant digits or more."""
    cells = [list(header), *([format_cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    right = [all(not isinstance(row[column], str) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            text.rjust(width) if r else text.ljust(width) for text, width, r in zip(line, widths, right, strict=True)
        )
        for line in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(line.rstrip() for line in (lines[0], rule, *lines[1:]))


def format_cell(value: object) -> str:
    """Text as it is, integers with thousands separators, floats in about three digits, nothing measured as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: Path, report: dict[str, Any]) -> None:
    """The figures of the table and more, for programs; NaN (not valid JSON) becomes null."""
    path.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
