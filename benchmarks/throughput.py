"""Offline throughput: requests of mixed lengths, all at once, through `LLM.generate` and through `transformers`.

    python benchmarks/throughput.py                      # the built-in model, 64 requests
    python benchmarks/throughput.py --model DIR --json out.json
    python benchmarks/throughput.py --deterministic --no-peer       # what deterministic=True costs

Both sides get the same prompts and generate greedily exactly as many tokens as each request asks for; only those count.
`transformers` pads a batch to its longest prompt and generates to its longest answer, so requests are first sorted by
length, which wastes least, and every batch size given is measured; the best one is the figure to compare with.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_engine import LLM
from jax_engine.core.stats import EngineStats
from jax_engine.outputs import RequestMetrics, RequestOutput
from jax_engine.server.bench.figures import (
    Latencies,
    Percentiles,
    Rates,
    WorkItem,
    format_table,
    latency_rows,
    median_run,
    mixed_workload,
    workload_rates,
    write_json,
)
from jax_engine.server.bench.offline import prompts_and_params
from measure import add_workload_arguments, workload_from

if TYPE_CHECKING:
    from transformers_peer import PeerRun

STEADY_PROMPT_TOKENS = 32
STEADY_OUTPUT_TOKENS = 64


@dataclass(frozen=True)
class HostMicroseconds:
    """Mean host time of a step's parts; `wait` is the host idle while the device works, and no part of `total`."""

    schedule: float
    pack: float
    launch: float
    collect: float
    wait: float

    @property
    def total(self) -> float:
        return self.schedule + self.pack + self.launch + self.collect

    @classmethod
    def between(cls, before: EngineStats, after: EngineStats) -> "HostMicroseconds":
        first, last = before.host_time, after.host_time
        steps = max(last.steps - first.steps, 1)
        return cls(
            schedule=(last.schedule - first.schedule) / steps,
            pack=(last.pack - first.pack) / steps,
            launch=(last.launch - first.launch) / steps,
            collect=(last.collect - first.collect) / steps,
            wait=(last.wait - first.wait) / steps,
        )


@dataclass(frozen=True)
class EngineRun:
    """One workload through the engine: the repetition of median duration."""

    rates: Rates
    latencies: Latencies
    steps: int
    host: HostMicroseconds
    padding_share: float  # of the step programs' token rows
    page_waste: float  # mean share of the pages in use that held no token
    preemptions: int
    answers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class EngineReport:
    """All that is measured of the engine; `steady` keeps every step at `max_num_seqs` running sequences."""

    start_seconds: float
    mixed: EngineRun
    steady: EngineRun
    stats: EngineStats  # at the end
    step_sizes: tuple[int, ...]  # token rows of the step programs


def main() -> None:
    options = parse_arguments()
    workload = workload_from(options)
    engine = measure_engine(options, workload)
    peers = [] if options.no_peer else measure_transformers(options, workload)
    print(table(engine, peers))
    print(f"steps are padded to {', '.join(map(str, engine.step_sizes))} token rows")
    if peers:
        print(comparison(engine.mixed, peers))
    figures = report(engine, peers)
    if options.deterministic:
        deterministic = measure_engine(options, workload, deterministic=True)
        print("\ndeterministic=True", table(deterministic, []), cost(engine, deterministic), sep="\n")
        figures["deterministic"] = report(deterministic, [])
    if options.json:
        write_json(options.json, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face name (default: the built-in model)")
    parser.add_argument("--dtype", default="float32", help="of both sides (default: %(default)s)")
    parser.add_argument("--load-format", default="auto", help="'dummy' measures random weights of any config.json")
    add_workload_arguments(parser)
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="runs a side; the median counts (default: 3)"
    )
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="running at once (default: 64)")
    parser.add_argument(
        "--max-num-batched-tokens", type=int, metavar="N", help="a step may process (default: engine's)"
    )
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens a KV page (default: engine's)")
    sizes: dict[str, Any] = {"type": int, "nargs": "+", "default": (8, 16, 32, 64), "metavar": "N"}
    parser.add_argument("--peer-batch-sizes", help="of transformers (default: 8 16 32 64)", **sizes)
    parser.add_argument("--deterministic", action="store_true", help="measure deterministic=True too, for its cost")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


def measure_engine(
    options: argparse.Namespace, workload: Sequence[WorkItem], *, deterministic: bool = False
) -> EngineReport:
    """Start an engine with every step program compiled, run both workloads, end it."""
    steady = mixed_workload(
        options.max_num_seqs,
        prompt_tokens=(STEADY_PROMPT_TOKENS, STEADY_PROMPT_TOKENS),
        output_tokens=(STEADY_OUTPUT_TOKENS, STEADY_OUTPUT_TOKENS),
        vocab_size=options.vocab_size,
        seed=options.seed,
    )
    start = time.perf_counter()
    llm = LLM(
        model=options.model,
        dtype=options.dtype,
        load_format=options.load_format,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        block_size=options.block_size,
        max_model_len=max(len(item.prompt_token_ids) + item.output_tokens for item in (*workload, *steady)),
        deterministic=deterministic,
        compile_before_ready=True,
        enable_prefix_caching=False,  # timed runs repeat the same prompts
    )
    start_seconds = time.perf_counter() - start
    mixed_run = run_engine(llm, workload, options.repeats)
    steady_run = run_engine(llm, steady, options.repeats)
    stats, step_sizes = llm.get_metrics(), llm.info.step_sizes
    llm.shutdown()
    return EngineReport(start_seconds, mixed_run, steady_run, stats, step_sizes)


def run_engine(llm: LLM, workload: Sequence[WorkItem], repeats: int) -> EngineRun:
    """Generate the workload once to warm up and `repeats` times for the clock."""
    prompts, params = prompts_and_params(workload)

    def generate() -> tuple[list[RequestOutput], EngineStats, EngineStats]:
        before = llm.get_metrics()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return outputs, before, llm.get_metrics()

    seconds, (outputs, before, after) = median_run(generate, repeats=repeats)
    rows = after.token_rows_total - before.token_rows_total
    room = after.page_room_sampled_total - before.page_room_sampled_total
    return EngineRun(
        rates=workload_rates(workload, seconds),
        latencies=offline_latencies(outputs),
        steps=after.steps_total - before.steps_total,
        host=HostMicroseconds.between(before, after),
        padding_share=(after.padding_tokens_total - before.padding_tokens_total) / max(rows, 1),
        page_waste=(after.page_waste_sampled_total - before.page_waste_sampled_total) / max(room, 1),
        preemptions=after.preemptions_total - before.preemptions_total,
        answers=tuple(tuple(output.outputs[0].token_ids) for output in outputs),
    )


def offline_latencies(outputs: Sequence[RequestOutput]) -> Latencies:
    """From the engine's own clock; it keeps a request's first and last token only, so nothing is known between them."""
    first, per_token = [], []
    for output in outputs:
        metrics = output.metrics
        assert isinstance(metrics, RequestMetrics)
        assert metrics.first_token_time is not None
        assert metrics.last_token_time is not None
        first.append(1e3 * (metrics.first_token_time - metrics.arrival_time))
        if (later_tokens := len(output.outputs[0].token_ids) - 1) > 0:
            per_token.append(1e3 * (metrics.last_token_time - metrics.first_token_time) / later_tokens)
    return Latencies(Percentiles.of(first), Percentiles.of(per_token), Percentiles.of(()))


def measure_transformers(options: argparse.Namespace, workload: Sequence[WorkItem]) -> "list[PeerRun]":
    """The same workload through `transformers`, at every batch size that can be filled."""
    import transformers_peer

    folder = options.model or transformers_peer.folder_of_demo()
    model = transformers_peer.load(folder, dtype=options.dtype, random_weights=options.load_format == "dummy")
    sizes = [size for size in options.peer_batch_sizes if size <= len(workload)] or [len(workload)]
    return [transformers_peer.run(model, workload, batch_size=size, repeats=options.repeats) for size in sizes]


def table(engine: EngineReport, peers: "Sequence[PeerRun]") -> str:
    """One row a figure; one column for each engine workload and each of the peer's batch sizes."""
    runs = (engine.mixed, engine.steady)
    rates = [*(run.rates for run in runs), *(peer.rates for peer in peers)]
    nothing = [None] * len(peers)
    rows: list[list[object]] = [
        ["requests/s", *(rate.requests_per_second for rate in rates)],
        ["input tokens/s", *(rate.input_tokens_per_second for rate in rates)],
        ["output tokens/s", *(rate.output_tokens_per_second for rate in rates)],
    ]
    # Nothing is known between a request's tokens offline.
    latencies = [row for row in latency_rows([run.latencies for run in runs]) if not str(row[0]).startswith("ITL")]
    rows += [[*row, *nothing] for row in latencies]
    rows += [
        ["steps", *(run.steps for run in runs), *nothing],
        ["padding, % of token rows", *(100 * run.padding_share for run in runs), *nothing],
        ["KV page waste, mean %", *(100 * run.page_waste for run in runs), *nothing],
        ["preemptions", *(run.preemptions for run in runs), *nothing],
    ]
    for part in ("schedule", "pack", "launch", "collect", "wait"):
        rows.append([f"host {part}, us/step", *(asdict(run.host)[part] for run in runs), *nothing])
    rows.append(["host total without wait, us/step", *(run.host.total for run in runs), *nothing])
    rows += [[name, value, None, *nothing] for name, value in whole_life_figures(engine).items()]
    header = ["", "mixed lengths", "equal lengths", *(f"transformers, {peer.batch_size} a batch" for peer in peers)]
    return format_table(header, rows)


def whole_life_figures(engine: EngineReport) -> dict[str, float]:
    """What is known once an engine, not once a workload."""
    return {
        "start, s": engine.start_seconds,
        "programs compiled": engine.stats.programs_compiled,
        "compile time, s": engine.stats.compile_seconds_total,
        "compiles in a request's path": engine.stats.compiles_in_request_path_total,
    }


def comparison(mixed: EngineRun, peers: "Sequence[PeerRun]") -> str:
    """The engine against the peer's best batch size, and how many answers agree token for token."""
    best = max(peers, key=lambda peer: peer.rates.output_tokens_per_second)
    ratio = mixed.rates.output_tokens_per_second / best.rates.output_tokens_per_second
    equal = sum(ours == theirs for ours, theirs in zip(mixed.answers, best.answers, strict=True))
    return (
        f"{ratio:.2f} times the best throughput of transformers ({best.batch_size} a batch); "
        f"{equal} of {len(mixed.answers)} answers equal token for token"
    )


def cost(default: EngineReport, deterministic: EngineReport) -> str:
    """The throughput that `deterministic` keeps of the default's."""

    def kept(run: EngineRun, of: EngineRun) -> float:
        return run.rates.output_tokens_per_second / of.rates.output_tokens_per_second

    mixed, steady = kept(deterministic.mixed, default.mixed), kept(deterministic.steady, default.steady)
    return f"{mixed:.2f} times the throughput of the default with mixed lengths, {steady:.2f} times with equal lengths"


def report(engine: EngineReport, peers: "Sequence[PeerRun]") -> dict[str, Any]:
    """Every figure of the table, for programs."""

    def figures(run: EngineRun) -> dict[str, Any]:
        kept = {name: value for name, value in asdict(run).items() if name != "answers"}
        return {**kept, "rates": run.rates.as_dict(), "host": {**asdict(run.host), "total": run.host.total}}

    return {
        "mixed_lengths": figures(engine.mixed),
        "equal_lengths": figures(engine.steady),
        "engine": {**whole_life_figures(engine), "step sizes": engine.step_sizes},
        "transformers": [{"batch_size": peer.batch_size, **peer.rates.as_dict()} for peer in peers],
    }


if __name__ == "__main__":
    main()
