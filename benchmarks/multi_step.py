"""Several tokens a step: what `num_scheduler_steps` gains in decode, and what it costs a request that arrives then.

    python benchmarks/multi_step.py                          # the built-in model; 1, 8 and 64 rows; 1, 4 and 8 steps
    python benchmarks/multi_step.py --rows 8 --steps 1 16 --json out.json

Engines that differ in `num_scheduler_steps` alone take turns, round by round, so that a busy machine slows all of them.
Requests have equal prompt lengths and generate greedily the same number of tokens, past end of sequence.
A newcomer is a prompt of 16 tokens that arrives at a random moment while all other rows decode.
"""

import argparse
import asyncio
import math
import random
import statistics
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax_engine import LLM, AsyncLLM, EngineConfig, SamplingParams, TokensPrompt
from jax_engine.server.bench.figures import format_table, write_json

PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Result:
    """One engine with one number of rows: medians over the rounds."""

    rows: int
    steps: int
    tokens_per_second: float
    gain: float  # over the first number of steps: the median of the rounds' ratios
    newcomer_ms: float  # to its first token
    newcomer_delay: float  # over the first number of steps: the ratio of the medians


def main() -> None:
    options = parse_arguments()
    results = [result for rows in options.rows for result in measure(options, rows)]
    header = ["rows", "steps", "output tokens/s", "gain", "newcomer's TTFT, ms", "ratio"]
    print(format_table(header, [list(asdict(result).values()) for result in results]))
    if options.json:
        write_json(options.json, {"results": [asdict(result) for result in results]})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face name (default: the built-in model)")
    parser.add_argument("--load-format", default="auto", help="'dummy' measures random weights of any config.json")
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--rows", default=(1, 8, 64), help="requests at once (default: 1 8 64)", **numbers)
    parser.add_argument("--steps", default=(1, 4, 8), help="num_scheduler_steps (default: 1 4 8)", **numbers)
    parser.add_argument("--output-tokens", type=int, default=129, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of all engines (default: %(default)s)")
    parser.add_argument("--newcomers", type=int, default=10, metavar="N", help="each (default: %(default)s; 0: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


def measure(options: argparse.Namespace, rows: int) -> list[Result]:
    """Every number of steps with this many rows."""
    rates = decode_rates(options, rows)
    nothing = [[math.nan] for _ in rates]
    newcomers = asyncio.run(newcomer_times(options, rows)) if options.newcomers and rows > 1 else nothing
    delays = [statistics.median(times) for times in newcomers]
    return [
        Result(
            rows,
            steps,
            tokens_per_second=statistics.median(own),
            gain=statistics.median(rate / base for rate, base in zip(own, rates[0], strict=True)),
            newcomer_ms=1e3 * delay,
            newcomer_delay=delay / delays[0],
        )
        for steps, own, delay in zip(options.steps, rates, delays, strict=True)
    ]


def settings(options: argparse.Namespace, rows: int, steps: int) -> dict[str, Any]:
    return {
        "model": options.model,
        "load_format": options.load_format,
        "max_num_seqs": rows,
        "max_num_batched_tokens": PROMPT_TOKENS + rows,
        "enable_prefix_caching": False,  # rounds repeat the same prompts
        "compile_before_ready": True,
        "num_scheduler_steps": steps,
    }


def prompt(number: int) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=random.Random(number).choices(range(256), k=PROMPT_TOKENS))


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def decode_rates(options: argparse.Namespace, rows: int) -> list[list[float]]:
    """Output tokens a second of each engine in each round, from the last first token to the first last one."""
    prompts, params = [prompt(number) for number in range(rows)], greedy(options.output_tokens)

    def rate(llm: LLM) -> float:
        times = [output.metrics for output in llm.generate(prompts, params, use_tqdm=False)]
        start = max(time.first_token_time for time in times if time and time.first_token_time)
        end = min(time.last_token_time for time in times if time and time.last_token_time)
        return rows * (options.output_tokens - 1) / (end - start)

    with ExitStack() as stack:
        engines = [stack.enter_context(LLM(**settings(options, rows, steps))) for steps in options.steps]
        for llm in engines:
            rate(llm)
        rounds = [[rate(llm) for llm in engines] for _ in range(options.rounds)]
    return [list(own) for own in zip(*rounds, strict=True)]


async def newcomer_times(options: argparse.Namespace, rows: int) -> list[list[float]]:
    """Seconds to the first token of each newcomer to each engine, which takes the last row while all others decode."""
    async with AsyncExitStack() as stack:
        engines = []
        for steps in options.steps:
            engine = await AsyncLLM.start(EngineConfig(**settings(options, rows, steps)))
            stack.push_async_callback(engine.shutdown)
            engines.append(engine)
        times: list[list[float]] = [[] for _ in engines]
        for number in range(options.newcomers):
            for engine, own in zip(engines, times, strict=True):
                own.append(await newcomer_time(engine, rows - 1, number))
        return times


async def newcomer_time(engine: AsyncLLM, rows: int, number: int) -> float:
    """Let so many rows decode, and time one more request to its first token."""
    length = engine.info.max_model_len - PROMPT_TOKENS
    others = [await engine.add_request(f"{number} row {row}", prompt(row), greedy(length)) for row in range(rows)]
    readers = [asyncio.create_task(drain(stream)) for stream in others]
    try:
        await asyncio.sleep(0.1 + 0.2 * random.Random(number).random())
        start = time.perf_counter()
        async for _ in engine.generate(prompt(-number), greedy(1), f"{number} newcomer"):
            return time.perf_counter() - start
        raise RuntimeError("the engine answered nothing")
    finally:
        for stream in others:
            stream.abort()
        await asyncio.gather(*readers)


async def drain(stream: Any) -> None:
    async for _ in stream:
        pass


if __name__ == "__main__":
    main()
