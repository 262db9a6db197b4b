"""Coefficients for `simulate.py` from the real engine on the device at hand: times many steps, fits the cost model.

    python benchmarks/simulate_fit.py --json cost.json          # the built-in model
    python benchmarks/simulate_fit.py --model DIR --max-num-seqs 256 --json cost.json
    python benchmarks/simulate.py --cost cost.json

A step's time is that from its launch to its tokens, alone: packing and launching count, planning the next step, which
the engine does meanwhile, does not.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from jax_engine.config import EngineConfig
from jax_engine.core.engine_core import EngineCore
from jax_engine.core.messages import CoreRequest
from jax_engine.server.bench.figures import Percentiles
from simulate_cost import StepCost

REWEIGHTED = 10  # rounds of least squares


@dataclass(frozen=True)
class TimedStep:
    """What a step computed, and how long it took."""

    rows: int
    kv_tokens: int
    pairs: float
    seconds: float


def main() -> None:
    options = parse_arguments()
    core = EngineCore(
        EngineConfig(
            model=options.model,
            dtype=options.dtype,
            load_format=options.load_format,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            compile_before_ready=True,
            enable_prefix_caching=False,
        )
    )
    # Equal requests make equal steps, and whatever else the machine does only adds to a step's time.
    runs = [time_steps(core, options.requests) for _ in range(options.repeats)]
    steps = [min(same, key=lambda step: step.seconds) for same in zip(*runs, strict=True)]
    limits = core.scheduler.limits
    model = Path(options.model).name if options.model else "the built-in model"
    fitted_to = f"fitted to {len(steps):,} steps of {model} on {options.where}"
    cost = fit(steps, options.name or model, fitted_to, kv_tokens=limits.num_pages * limits.page_size)
    core.shutdown()
    print(cost)
    if options.json:
        cost.write(options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face name (default: the built-in model)")
    parser.add_argument("--dtype", default="auto", help="default: %(default)s")
    parser.add_argument("--load-format", default="auto", help="'dummy' times random weights of any config.json")
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="default: the engine's")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="to time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="a step's least time counts (default: 5)")
    parser.add_argument("--name", help="of the cost model (default: the model's)")
    parser.add_argument("--where", default="this machine", help="the device in words (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the coefficients there")
    return parser.parse_args()


def time_steps(core: EngineCore, num_requests: int) -> list[TimedStep]:
    """Every step of waves of requests, each wave of another size and other lengths; the same ones at every call."""
    limits = core.scheduler.limits
    steps: list[TimedStep] = []
    for wave in waves(num_requests, limits.max_num_seqs, core.info.max_model_len):
        for request in wave:
            core.scheduler.add(request)
        steps += time_wave(core, limits.step_sizes)
    return steps


def time_wave(core: EngineCore, sizes: Sequence[int]) -> Iterator[TimedStep]:
    """Run what has been added to its end, each step after the one before it has ended."""
    while core.scheduler.has_work:
        plan = core.scheduler.schedule()
        assert plan is not None, "requests wait and nothing runs"
        start = time.perf_counter()
        pending = core.runner.launch(plan)
        assert pending.tokens is not None, "nothing is held to a grammar"
        pending.tokens.block_until_ready()
        seconds = time.perf_counter() - start
        yield TimedStep(
            rows=next(rows for rows in sizes if rows >= plan.num_tokens),
            kv_tokens=sum(chunk.start + chunk.length for chunk in plan.chunks),
            pairs=sum(chunk.length * (2 * chunk.start + chunk.length + 1) / 2 for chunk in plan.chunks),
            seconds=seconds,
        )
        core.scheduler.commit(plan, core.runner.collect(pending))


def waves(num_requests: int, max_num_seqs: int, max_model_len: int) -> Iterator[list[CoreRequest]]:
    """`num_requests` in all, in waves of 1 to `max_num_seqs`, of short and long prompts."""
    rng = random.Random(0)
    made = 0
    while made < num_requests:
        size = min(round(max_num_seqs ** rng.random()), num_requests - made)
        prompt = round(max(8, (max_model_len * 0.9) ** rng.uniform(0.4, 1.0)))
        yield [random_request(rng, str(made + i), prompt, max_model_len) for i in range(size)]
        made += size


def random_request(rng: random.Random, request_id: str, prompt: int, max_model_len: int) -> CoreRequest:
    prompt = rng.randint(max(1, prompt // 2), prompt)
    return CoreRequest(
        request_id=request_id,
        prompt_token_ids=[rng.randrange(256) for _ in range(prompt)],
        max_tokens=min(rng.randint(4, 48), max_model_len - prompt),
        min_tokens=0,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        prng_key=(0, 0),
        eos_token_ids=(),
        stop_token_ids=(),
        arrival_time=0.0,
    )


def fit(steps: Sequence[TimedStep], name: str, source: str, *, kv_tokens: int) -> StepCost:
    """The coefficients of least squared relative error, none below 0.

    Under the weights' floor all rows cost the same; it is tried at every number of rows that occurs.
    """
    rows = np.array([step.rows for step in steps])
    others = np.array([(1.0, step.kv_tokens, step.pairs) for step in steps])
    seconds = np.array([step.seconds for step in steps])

    def solved(knee: int) -> tuple[float, np.ndarray, np.ndarray]:
        """(squared error, values, relative errors) with the floor at `knee` rows."""
        terms = np.column_stack([np.maximum(rows, knee), others])
        values, predicted = np.zeros(terms.shape[1]), seconds
        # Relative to the prediction of the round before: relative to the noisy times, too little would cost less than
        # too much, and the fit would lie below them.
        for _ in range(REWEIGHTED):
            scale = terms.max(axis=0)
            values = nnls(terms / scale / predicted[:, None], seconds / predicted)[0] / scale
            predicted = terms @ values
        errors = np.abs(predicted / seconds - 1)
        return float((errors**2).sum()), values, errors

    knee = min((0, *np.unique(rows)), key=lambda knee: solved(knee)[0])
    _, (row, step, kv_token, pair), errors = solved(knee)
    off = Percentiles.of(100 * errors)
    return StepCost(
        name=name,
        source=f"{source}; off by {off.p50:.0f}% (median), {off.p90:.0f}% (p90) of a step's time",
        step_seconds=float(step),
        weights_seconds=float(knee * row),
        row_seconds=float(row),
        kv_token_seconds=float(kv_token),
        pair_seconds=float(pair),
        kv_tokens=kv_tokens,
    )


if __name__ == "__main__":
    main()
