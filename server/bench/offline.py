"""`jax-engine bench throughput` and `bench latency`: an engine by itself, without HTTP."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jax_engine.config import EngineConfig
from jax_engine.frontend.processor import TokensPrompt
from jax_engine.llm import LLM
from jax_engine.sampling_params import SamplingParams
from jax_engine.server.bench.figures import Rates, WorkItem, format_table, mixed_workload, percentiles, write_json

SHARES = (10, 25, 50, 75, 90, 99)


def prompts_and_params(
    workload: Sequence[WorkItem], *, n: int = 1, temperature: float = 0
) -> tuple[list[TokensPrompt], list[SamplingParams]]:
    """What `LLM.generate` takes for a workload; every answer has exactly the tokens asked for."""
    prompts = [TokensPrompt(prompt_token_ids=list(item.prompt_token_ids)) for item in workload]
    params = [
        SamplingParams(n=n, temperature=temperature, max_tokens=item.output_tokens, ignore_eos=True)
        for item in workload
    ]
    return prompts, params


def bench_throughput(config: EngineConfig, workload: Sequence[WorkItem], *, n: int, output_json: Path | None) -> int:
    """Generate the whole workload at once and print the rates; returns the exit code.

    Raises:
        ValueError: the model, the settings or a request cannot be served.
    """
    settings = asdict(config)
    with LLM(settings.pop("model"), **settings) as llm:
        prompts, params = prompts_and_params(workload, n=n)
        begin = time.perf_counter()
        llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
    inputs = sum(len(item.prompt_token_ids) for item in workload)
    rates = Rates(seconds, len(workload), inputs, n * sum(item.output_tokens for item in workload))
    rows: list[list[object]] = [
        ["requests/s", rates.requests_per_second],
        ["input tokens/s", rates.input_tokens_per_second],
        ["output tokens/s", rates.output_tokens_per_second],
        ["all tokens/s", rates.input_tokens_per_second + rates.output_tokens_per_second],
        ["seconds", seconds],
    ]
    print(format_table(["", f"{len(workload)} requests"], rows))
    if output_json is not None:
        write_json(output_json, throughput_report(rates))
    return 0


def throughput_report(rates: Rates) -> dict[str, Any]:
    """vLLM's fields, and the rate of output tokens."""
    return {
        "elapsed_time": rates.seconds,
        "num_requests": rates.requests,
        "total_num_tokens": rates.input_tokens + rates.output_tokens,
        "requests_per_second": rates.requests_per_second,
        "tokens_per_second": (rates.input_tokens + rates.output_tokens) / rates.seconds,
        "output_tokens_per_second": rates.output_tokens_per_second,
    }


def bench_latency(
    config: EngineConfig,
    *,
    input_len: int,
    output_len: int,
    batch_size: int,
    n: int,
    num_warm_up: int,
    num_iterations: int,
    output_json: Path | None,
) -> int:
    """Generate one batch again and again and print how long it takes; returns the exit code. ValueError as above."""
    inputs, outputs = (input_len, input_len), (output_len, output_len)
    workload = mixed_workload(batch_size, prompt_tokens=inputs, output_tokens=outputs, vocab_size=256, seed=config.seed)
    prompts, params = prompts_and_params(workload, n=n, temperature=1)
    settings = asdict(config)
    latencies = []
    with LLM(settings.pop("model"), **settings) as llm, tqdm(total=num_iterations, desc="Batches", disable=None) as bar:
        for number in range(num_warm_up + num_iterations):
            begin = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            if number >= num_warm_up:
                latencies.append(time.perf_counter() - begin)
                bar.update(1)
    report = latency_report(latencies)
    rows: list[list[object]] = [["mean", report["avg_latency"]]]
    rows += [[f"p{share}", value] for share, value in report["percentiles"].items()]
    print(format_table(["", f"seconds for {batch_size} of {input_len} + {output_len} tokens"], rows))
    if output_json is not None:
        write_json(output_json, report)
    return 0


def latency_report(latencies: Sequence[float]) -> dict[str, Any]:
    """vLLM's fields, in seconds."""
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": list(latencies),
        "percentiles": percentiles(latencies, SHARES),
    }
