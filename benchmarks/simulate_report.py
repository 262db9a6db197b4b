"""What a simulation comes to: one `Report` a policy and load, and tables of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jax_engine.server.bench.figures import Percentiles, Rates, format_table
from simulate_engine import Life, Outcome

RANKS = ("p50", "p90", "p99")
NUM_QUANTILES = 200  # of the distributions that are kept and plotted, besides the least value


@dataclass(frozen=True)
class Objectives:
    """What a request must meet to count as served well; milliseconds."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf

    def met_by(self, life: Life) -> bool:
        per_token = life.timing.time_per_output_token
        return 1e3 * life.timing.time_to_first_token <= self.ttft_ms and (
            per_token is None or 1e3 * per_token <= self.tpot_ms
        )


@dataclass(frozen=True)
class Distribution:
    """Milliseconds: percentiles for the table, and quantiles from 0 to 1 in equal steps for the plot."""

    percentiles: Percentiles
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution":
        ordered = sorted(values)
        ranks = (round(step * (len(ordered) - 1) / NUM_QUANTILES) for step in range(NUM_QUANTILES + 1))
        return cls(Percentiles.of(ordered), tuple(ordered[rank] for rank in ranks) if ordered else ())


@dataclass(frozen=True)
class Report:
    """One policy under one load. Rates are over the time from the first arrival to the last token."""

    policy: str
    load: str
    offered: float  # requests a second; of a closed loop, what it was set up for
    rates: Rates
    good_requests: int  # finished within the objectives
    gave_up: int
    ttft_ms: Distribution
    tpot_ms: Distribution
    ttft_ms_by_priority: Mapping[int, Percentiles]
    mean_queue: float  # requests that no step has had yet, on average over time
    hit_rate: float  # share of prompt tokens found in the prefix cache
    preemptions: int
    padding_share: float  # of the step programs' token rows
    page_waste: float  # share of the pages in use that holds nothing
    busy_share: float  # of the time, the device has a step to run
    steps: int
    schedule_us: float  # of a core of this machine a step, planning
    commit_us: float  # the same, taking tokens
    core_seconds: float  # of this machine, for all of the simulation

    @property
    def goodput(self) -> float:
        """Requests a second that met the objectives."""
        return self.good_requests / self.rates.seconds

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rates": self.rates.as_dict(), "goodput": self.goodput}


def report(
    outcome: Outcome, objectives: Objectives, *, policy: str, load: str, offered: float, core_seconds: float
) -> Report:
    lives, counters, scheduler = outcome.lives, outcome.counters, outcome.scheduler
    finished = [life for life in lives if not life.gave_up]
    begin = min(life.arrival for life in lives)
    seconds = max((life.finished for life in finished), default=math.nan) - begin
    waited = sum(life.scheduled - life.arrival for life in lives)
    per_token = [life.timing.time_per_output_token for life in finished]
    return Report(
        policy=policy,
        load=load,
        offered=offered,
        rates=Rates(
            seconds,
            len(finished),
            sum(life.prompt_tokens for life in finished),
            sum(life.num_tokens for life in finished),
        ),
        good_requests=sum(objectives.met_by(life) for life in finished),
        gave_up=len(lives) - len(finished),
        ttft_ms=Distribution.of([_ttft_ms(life) for life in finished]),
        tpot_ms=Distribution.of([1e3 * value for value in per_token if value is not None]),
        ttft_ms_by_priority=_by_priority(finished),
        mean_queue=waited / seconds,  # Little's law
        hit_rate=scheduler.cache.counters.hits / max(scheduler.cache.counters.queries, 1),
        preemptions=scheduler.num_preemptions,
        padding_share=counters.padding_rows / max(counters.token_rows, 1),
        page_waste=counters.page_tokens_unused / max(counters.page_tokens, 1),
        busy_share=counters.busy_seconds / seconds,
        steps=counters.steps,
        schedule_us=counters.schedule_us / max(counters.steps, 1),
        commit_us=counters.commit_us / max(counters.steps, 1),
        core_seconds=core_seconds,
    )


def _ttft_ms(life: Life) -> float:
    return 1e3 * life.timing.time_to_first_token


def _by_priority(lives: Sequence[Life]) -> dict[int, Percentiles]:
    levels = sorted({life.conversation.priority for life in lives})
    return {
        level: Percentiles.of(_ttft_ms(life) for life in lives if life.conversation.priority == level)
        for level in levels
    }


def table(reports: Sequence[Report]) -> str:
    """Of one load: a column for each policy."""
    rows: list[list[object]] = [
        ["goodput, requests/s", *(r.goodput for r in reports)],
        ["requests that meet both, %", *(100 * r.good_requests / (r.rates.requests + r.gave_up) for r in reports)],
        ["requests/s", *(r.rates.requests_per_second for r in reports)],
        ["output tokens/s", *(r.rates.output_tokens_per_second for r in reports)],
        *([f"TTFT {rank}, ms", *(getattr(r.ttft_ms.percentiles, rank) for r in reports)] for rank in RANKS),
        *([f"TPOT {rank}, ms", *(getattr(r.tpot_ms.percentiles, rank) for r in reports)] for rank in RANKS),
    ]
    levels = sorted({level for r in reports for level in r.ttft_ms_by_priority})
    if len(levels) > 1:
        nothing = Percentiles.of(())
        rows += [
            [f"TTFT p99 of priority {level}, ms", *(r.ttft_ms_by_priority.get(level, nothing).p99 for r in reports)]
            for level in levels
        ]
    if any(r.gave_up for r in reports):
        rows.append(["gave up", *(r.gave_up for r in reports)])
    rows += [
        ["mean queue", *(r.mean_queue for r in reports)],
        ["prefix hits, % of prompt tokens", *(100 * r.hit_rate for r in reports)],
        ["preemptions", *(r.preemptions for r in reports)],
        ["padding, % of token rows", *(100 * r.padding_share for r in reports)],
        ["page waste, %", *(100 * r.page_waste for r in reports)],
        ["device busy, %", *(100 * r.busy_share for r in reports)],
        ["steps", *(r.steps for r in reports)],
        ["host schedule, us/step", *(r.schedule_us for r in reports)],
        ["host commit, us/step", *(r.commit_us for r in reports)],
        ["simulated in, core s", *(r.core_seconds for r in reports)],
    ]
    return format_table(["", *(r.policy for r in reports)], rows)
