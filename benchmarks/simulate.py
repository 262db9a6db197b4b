"""Scheduling policies compared without a device: the real scheduler in virtual time, with a model of what steps cost.

    python benchmarks/simulate.py --request-rate 20 30 40 --goodput ttft:1000 tpot:50 --plot policies.svg
    python benchmarks/simulate.py --num-prefixes 20 --prefix-len 1000 --mean-turns 4 --cost llama-3-8b-h100
    python benchmarks/simulate.py --trace BurstGPT.csv --speed 1 10 --num-requests 100000

A trace is a file of requests, one a line: `.jsonl` (objects) or `.csv` (with a header). Its fields are `timestamp`
(seconds, or a date and time), `prompt_tokens` and `output_tokens`, and if wanted `priority`, `prefix_group` (requests
of one group begin alike) and `prefix_tokens` (how far). BurstGPT's and the Azure LLM inference traces' column names
are understood too.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jax_engine.compilation.planner import step_sizes
from jax_engine.config import SCHEDULING_POLICIES, EngineConfig
from jax_engine.scheduling.step_plan import SchedulerLimits
from jax_engine.server.bench.figures import write_json
from simulate_cost import PRESETS, StepCost, find_cost
from simulate_engine import Simulation
from simulate_load import Conversation, Lengths, Synthetic, read_recorded
from simulate_plot import check_plot, draw
from simulate_report import Objectives, Report, report, table

# Destinations of the flags that a trace makes meaningless.
SYNTHETIC_FLAGS = {
    *("request_rate", "burstiness", "prompt_tokens", "output_tokens", "num_prefixes", "prefix_len", "mean_turns"),
    *("think_seconds", "priorities", "seed"),
}


@dataclass(frozen=True)
class Recorded:
    """The first `num_requests` requests of a trace, `speed` times as fast as they came."""

    path: Path
    speed: float
    num_requests: int
    max_model_len: int

    def conversations(self) -> list[Conversation]:
        return read_recorded(
            self.path, max_model_len=self.max_model_len, speed=self.speed, num_requests=self.num_requests
        )


@dataclass(frozen=True)
class Run:
    """One policy under one load: all that a process needs to simulate it."""

    load: Synthetic | Recorded
    limits: SchedulerLimits  # the policy among them
    cost: StepCost
    objectives: Objectives
    max_tokens: int | None
    patience: float

    def simulate(self) -> Report:
        start = time.process_time()
        conversations = self.load.conversations()
        outcome = Simulation(
            conversations,
            self.limits,
            self.cost,
            self.load.max_model_len,
            self.max_tokens,
            self.patience,
        ).run()
        offered = self.load.rate if isinstance(self.load, Synthetic) else mean_rate(conversations)
        name = "everything at once" if math.isinf(offered) else f"{offered:.4g} requests/s"
        return report(
            outcome,
            self.objectives,
            policy=self.limits.policy,
            load=name,
            offered=offered,
            core_seconds=time.process_time() - start,
        )


def mean_rate(conversations: Sequence[Conversation]) -> float:
    """Requests a second from the first arrival to the last; infinite if there is no time between them."""
    seconds = conversations[-1].turns[0].delay
    return len(conversations) / seconds if seconds else math.inf


def main() -> None:
    options = parse_arguments()
    print(options.cost)
    print(options.limits)
    start = time.perf_counter()
    reports = list(simulate_all(runs_of(options), options.jobs))
    for load in dict.fromkeys(r.load for r in reports):
        print(f"\n{load}\n" + table([r for r in reports if r.load == load]))
    print(f"\n{sum(r.rates.requests for r in reports):,} requests in {time.perf_counter() - start:.0f} s", flush=True)
    if options.json:
        given = {name: str(value) for name, value in vars(options).items()}
        write_json(
            options.json,
            {"options": given, "cost": asdict(options.cost), "runs": [r.as_dict() for r in reports]},
        )
    if options.plot:
        draw(options.plot, reports, options.objectives, f"a simulation: cost model {options.cost.name}")


def simulate_all(runs: Sequence[Run], jobs: int) -> Iterator[Report]:
    """In the order given; each is told of as it ends."""
    processes = (
        ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) if jobs > 1 else nullcontext()
    )
    with processes as pool:
        for run in pool.map(Run.simulate, runs) if pool else map(Run.simulate, runs):
            print(f"  {run.policy} at {run.load}: {run.rates.requests:,} requests", file=sys.stderr, flush=True)
            yield run


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Every policy under every load."""
    if options.trace:
        loads: list[Synthetic | Recorded] = [
            Recorded(options.trace, speed, options.num_requests, options.max_model_len) for speed in options.speed
        ]
    else:
        loads = [replace(options.load, rate=rate) for rate in options.request_rate]
    return [
        Run(
            load,
            replace(options.limits, policy=policy),
            options.cost,
            options.objectives,
            options.max_tokens,
            options.abandon_after,
        )
        for load in loads
        for policy in options.scheduling_policy
    ]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, and what they come to: `cost`, `load`, `limits` and `objectives`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    policies: dict[str, Any] = {"choices": SCHEDULING_POLICIES, "default": list(SCHEDULING_POLICIES)}
    parser.add_argument("--scheduling-policy", nargs="+", help="default: all", **policies)
    parser.add_argument("--cost", default="llama-3-8b-v6e", help=f"{', '.join(PRESETS)} or a JSON file of coefficients")
    add_load_arguments(parser)
    add_engine_arguments(parser)
    parser.add_argument(
        "--goodput", nargs="+", default=["ttft:1000", "tpot:50"], metavar="KEY:MS", help="default: ttft:1000 tpot:50"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw there: .svg, .png or .pdf")
    options = parser.parse_args(arguments)
    changed = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    try:
        refuse_both(changed)
        interpret(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return options


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    lengths: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("MEAN", "SIGMA")}
    group.add_argument("--num-requests", default=10_000, help="at most of a trace (default: %(default)s)", **number)
    rates: dict[str, Any] = {"type": float, "nargs": "+", "metavar": "R"}
    group.add_argument(
        "--request-rate", default=[20.0], help="requests a second; each is a load (default: 20)", **rates
    )
    group.add_argument("--burstiness", type=float, default=1.0, help="1 is Poisson, less is bursty (default: 1)")
    group.add_argument("--prompt-tokens", default=(512.0, 1.0), help="of a turn, lognormal (default: 512 1)", **lengths)
    group.add_argument(
        "--output-tokens", default=(128.0, 0.8), help="of a turn, lognormal (default: 128 0.8)", **lengths
    )
    group.add_argument("--max-tokens", help="that requests ask for, ending earlier (default: exactly theirs)", **number)
    group.add_argument("--num-prefixes", default=0, help="system prompts that conversations share", **number)
    group.add_argument("--prefix-len", default=0, help="tokens of each system prompt", **number)
    group.add_argument("--mean-turns", type=float, default=1.0, metavar="N", help="of a conversation (default: 1)")
    group.add_argument("--think-seconds", type=float, default=10.0, metavar="S", help="between turns (default: 10)")
    group.add_argument(
        "--priorities", nargs="+", default=["0:1"], metavar="PRIORITY:SHARE", help="lower is sooner (default: all 0)"
    )
    group.add_argument(
        "--abandon-after", type=float, default=math.inf, metavar="S", help="clients leave without a first token by then"
    )
    group.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    group.add_argument("--trace", type=Path, metavar="FILE", help="recorded requests, in place of drawn ones")
    group.add_argument("--speed", default=[1.0], help="of the trace; each is a load (default: 1)", **rates)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    defaults = EngineConfig()
    group.add_argument(
        "--max-num-seqs", default=defaults.max_num_seqs, help="running at once (default: %(default)s)", **number
    )
    group.add_argument("--max-num-batched-tokens", help="of a step (default: the engine's)", **number)
    group.add_argument("--max-model-len", default=8192, help="default: %(default)s", **number)
    group.add_argument("--block-size", default=64, help="tokens a page (default: %(default)s)", **number)
    group.add_argument("--num-gpu-blocks-override", help="pages (default: the cost model's room)", **number)
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)


def refuse_both(changed: set[str]) -> None:
    """A trace and what describes synthetic loads exclude each other, and neither is ignored."""
    described = sorted(changed & SYNTHETIC_FLAGS)
    if "trace" in changed and described:
        raise ValueError(f"{', '.join(described)} describe synthetic requests, and --trace gives its own; drop either")
    if "speed" in changed and "trace" not in changed:
        raise ValueError("speed is of a trace, and there is none; set --request-rate")


def interpret(options: argparse.Namespace) -> None:
    """Check the flags and put what they come to beside them.

    Raises:
        ValueError: a value outside its range.
    """
    options.cost = find_cost(options.cost)
    config = EngineConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        block_size=options.block_size,
    )
    num_pages = options.num_gpu_blocks_override or int(options.cost.kv_tokens) // options.block_size
    if num_pages * options.block_size < options.max_model_len:
        raise ValueError(
            f"{num_pages} pages of {options.block_size} tokens cannot hold one request of "
            f"max_model_len={options.max_model_len}; lower it"
        )
    options.limits = SchedulerLimits(
        num_pages,
        options.block_size,
        config.max_num_seqs,
        config.token_budget,
        enable_prefix_caching=options.enable_prefix_caching,
        step_sizes=step_sizes(config.max_num_seqs, config.token_budget),
    )
    options.objectives = objectives_of(options.goodput)
    for name in ("abandon_after", "jobs", "max_tokens", "num_requests"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
    for name in ("request_rate", "speed"):
        if not min(getattr(options, name)) > 0:
            raise ValueError(f"{name}={getattr(options, name)} must be above 0")
    if options.plot:
        check_plot(options.plot)
    if options.trace:
        return
    options.load = Synthetic(
        num_requests=options.num_requests,
        rate=options.request_rate[0],
        prompt=Lengths(*options.prompt_tokens),
        output=Lengths(*options.output_tokens),
        max_model_len=options.max_model_len,
        burstiness=options.burstiness,
        num_prefixes=options.num_prefixes,
        prefix_tokens=options.prefix_len,
        mean_turns=options.mean_turns,
        think_seconds=options.think_seconds,
        priorities=tuple(priority_share(text) for text in options.priorities),
        seed=options.seed,
    )


def objectives_of(given: Sequence[str]) -> Objectives:
    """From `ttft:MS` and `tpot:MS`, of which either may be left out."""
    limits = {}
    for text in given:
        name, _, value = text.partition(":")
        if name not in ("ttft", "tpot") or not (limit := number_or_nan(value)) > 0:
            raise ValueError(f"goodput={text!r} must be ttft:MS or tpot:MS, with milliseconds above 0")
        limits[f"{name}_ms"] = limit
    return Objectives(**limits)


def priority_share(text: str) -> tuple[int, float]:
    """From `PRIORITY:SHARE`."""
    level, _, share = text.partition(":")
    if not level.removeprefix("-").isdecimal() or not number_or_nan(share) > 0:
        raise ValueError(
            f"priorities={text!r} must be PRIORITY:SHARE, a whole number and a share above 0, such as 1:0.5"
        )
    return int(level), float(share)


def number_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


if __name__ == "__main__":
    main()
