"""`jax-engine bench ...`: what each benchmark takes, with vLLM's names, and how it begins."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_engine.sampling_params import integer, number
from jax_engine.server.cli.flags import Flag, Options, count, engine_config, engine_groups
from jax_engine.server.cli.parser import Command
from jax_engine.server.logs import set_up_logging

if TYPE_CHECKING:
    from jax_engine.server.bench.figures import WorkItem

BACKENDS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}

SERVE_EPILOG = """\
examples:
  jax-engine bench serve --base-url http://localhost:8000 --request-rate 10 --num-prompts 200
  jax-engine bench serve --max-concurrency 64 --random-input-len 512 --random-output-len 64 --save-result
"""

OUTPUT_JSON = Flag("output_json", "write the figures there too", metavar="FILE", type=Path)


def positive_number(text: str) -> float:
    """A number above 0, or inf."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f"{text!r} must be a number above 0, or inf")
    return value


def names(text: str) -> tuple[str, ...]:
    """Words between commas."""
    return tuple(filter(None, (word.strip() for word in text.split(","))))


def shares(text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(word) for word in names(text))
    except ValueError:
        raise ValueError(f"{text!r} must be numbers between commas, such as 50,90,99") from None


SERVER_FLAGS = (
    Flag("base_url", "the server, instead of --host and --port", metavar="URL"),
    Flag("host", "the server's machine", metavar="ADDRESS", default="127.0.0.1"),
    Flag("port", "the server's port", type=int, metavar="PORT", default=8000),
    Flag("backend", "what the server is asked for", choices=tuple(BACKENDS), default="openai"),
    Flag("endpoint", "the route, if it is another than the backend's", metavar="PATH"),
    Flag("model", "the model to ask for; the server's first if left out", metavar="MODEL"),
    Flag("api_key", "the server's API key", metavar="KEY"),
)
LOAD_FLAGS = (
    Flag("num_prompts", "requests", type=count, metavar="N", default=1000),
    Flag("request_rate", "requests a second, Poisson's; inf: all at once", positive_number, "RATE", default="inf"),
    Flag("burstiness", "1: Poisson's arrivals; less: in bursts", positive_number, "B", default=1.0),
    Flag("max_concurrency", "requests open at once; without, no limit", type=count, metavar="N"),
    Flag("random_input_len", "tokens of a prompt", type=count, metavar="TOKENS", default=1024),
    Flag("random_output_len", "tokens of an answer", type=count, metavar="TOKENS", default=128),
    Flag("random_range_ratio", "lengths vary by this share, up and down", type=float, metavar="SHARE", default=0.0),
    Flag("random_prefix_len", "tokens that all prompts begin with, besides", type=count, metavar="TOKENS", default=0),
    Flag("ignore_eos", "go on to exactly that many tokens; by default it does", type=bool),
    Flag("num_warmups", "requests before the clock starts", type=count, metavar="N", default=1),
    Flag("seed", "equal seeds give equal requests", type=int, metavar="N", default=0),
)
REPORT_FLAGS = (
    Flag("percentile_metrics", "of ttft,tpot,itl,e2el", type=names, metavar="NAMES", default="ttft,tpot,itl"),
    Flag("metric_percentiles", "percentiles that are told", type=shares, metavar="NUMBERS", default="99"),
    Flag("goodput", "limits that a good request keeps, such as ttft:200 tpot:50", metavar="METRIC:MS", nargs="+"),
    Flag("label", "begins the name of the file", metavar="TEXT"),
    Flag("save_result", "write the figures to a JSON file", type=bool),
    Flag("save_detailed", "the same with those of every request", type=bool),
    Flag("result_dir", "folder of that file; the current one if left out", metavar="DIR", type=Path),
    Flag("result_filename", "name of that file; made of the settings and the date if left out", metavar="NAME"),
)
LENGTH_FLAGS = (
    Flag("input_len", "tokens of a prompt", type=count, metavar="TOKENS"),
    Flag("output_len", "tokens of an answer", type=count, metavar="TOKENS", default=128),
    Flag("n", "answers for each prompt", type=count, metavar="N", default=1),
    OUTPUT_JSON,
)
MODEL = Flag("model", "a folder, a Hugging Face name, or nothing for the small built-in demo model", metavar="MODEL")
THROUGHPUT_FLAGS = (
    MODEL,
    Flag("num_prompts", "requests", type=count, metavar="N", default=1000),
    Flag("random_range_ratio", "lengths vary by this share, up and down", type=float, metavar="SHARE", default=0.0),
    replace(LENGTH_FLAGS[0], default=1024),
    *LENGTH_FLAGS[1:],
)
LATENCY_FLAGS = (
    MODEL,
    Flag("batch_size", "prompts in the batch", type=count, metavar="N", default=8),
    Flag("num_iters_warmup", "batches before the clock starts", type=count, metavar="N", default=10),
    Flag("num_iters", "batches that are timed", type=count, metavar="N", default=30),
    replace(LENGTH_FLAGS[0], default=32),
    *LENGTH_FLAGS[1:],
)
STARTUP_FLAGS = (
    MODEL,
    Flag("num_iters_cold", "starts with an empty compilation cache", type=count, metavar="N", default=3),
    Flag("num_iters_warmup", "starts before the warm ones, not counted", type=count, metavar="N", default=1),
    Flag("num_iters_warm", "starts with that cache", type=count, metavar="N", default=3),
    OUTPUT_JSON,
)


def bench_commands() -> tuple[Command, ...]:
    """The benchmarks."""

    def command(name: str, summary: str, run: Callable[[Options], int], flags: tuple[Flag, ...]) -> Command:
        groups = {"benchmark": flags, **engine_groups()}
        return Command(f"bench {name}", summary, run, groups=groups)

    serve = Command(
        "bench serve",
        "Measure a running server: rates, times to first and later tokens, at a request rate or a concurrency.",
        run_serve,
        groups={"server": SERVER_FLAGS, "load": LOAD_FLAGS, "report": REPORT_FLAGS},
        epilog=SERVE_EPILOG,
    )
    return (
        serve,
        command(
            "throughput", "Measure an engine without HTTP: all requests at once.", run_throughput, THROUGHPUT_FLAGS
        ),
        command("latency", "Measure how long one batch takes, again and again.", run_latency, LATENCY_FLAGS),
        command(
            "startup", "Measure starts of the server, with and without compiled programs.", run_startup, STARTUP_FLAGS
        ),
    )


def given_or_default(options: Options, flags: Iterable[Flag]) -> dict[str, Any]:
    """The value of every flag: what was given, else its default."""
    return {flag.field: flag.default if options[flag.field] is None else options[flag.field] for flag in flags}


def workload(
    num_prompts: int, *, input_len: int, output_len: int, ratio: float, seed: int, prefix_len: int = 0
) -> "list[WorkItem]":
    """Random requests whose lengths vary by the share `ratio`; ValueError for what cannot be."""
    from jax_engine.server.bench.figures import mixed_workload

    integer("num_prompts", num_prompts, low=1, high=2**31, remedy="it is how many requests are sent")
    number("random_range_ratio", ratio, low=0, high=1, remedy="0 makes all lengths equal")

    def around(length: int) -> tuple[int, int]:
        return max(1, math.floor(length * (1 - ratio))), max(1, math.ceil(length * (1 + ratio)))

    return mixed_workload(
        num_prompts,
        prompt_tokens=around(input_len),
        output_tokens=around(output_len),
        vocab_size=256,
        seed=seed,
        prefix_tokens=prefix_len,
    )


def run_serve(options: Options) -> int:
    from jax_engine.server.bench.client import Target
    from jax_engine.server.bench.load import Load
    from jax_engine.server.bench.serve import ServeBenchmark, bench_serve

    server, load = given_or_default(options, SERVER_FLAGS), given_or_default(options, LOAD_FLAGS)
    num_prompts, rate = load["num_prompts"], float(load["request_rate"])
    if load["max_concurrency"] is not None:
        integer("max_concurrency", load["max_concurrency"], low=1, high=2**20, remedy="leave it out for no limit")
    requests = workload(
        num_prompts,
        input_len=load["random_input_len"],
        output_len=load["random_output_len"],
        ratio=load["random_range_ratio"],
        seed=load["seed"],
        prefix_len=load["random_prefix_len"],
    )
    benchmark = ServeBenchmark(
        target=Target(server["base_url"] or f"http://{server['host']}:{server['port']}", server["api_key"]),
        backend=server["backend"],
        endpoint=server["endpoint"] or BACKENDS[server["backend"]],
        load=Load(rate, load["max_concurrency"] or num_prompts, load["seed"], load["burstiness"]),
        workload=requests,
        num_warmups=load["num_warmups"],
        goodput=tuple(options["goodput"] or ()),
        **options.of(["model", "ignore_eos", "percentile_metrics", "metric_percentiles"]),
        **options.of(["label", "save_result", "save_detailed", "result_dir", "result_filename"]),
    )
    return bench_serve(benchmark)


def run_throughput(options: Options) -> int:
    set_up_logging("warning")
    from jax_engine.server.bench.offline import bench_throughput

    asked = given_or_default(options, THROUGHPUT_FLAGS)
    config = engine_config(measured(options))
    lengths = {"input_len": asked["input_len"], "output_len": asked["output_len"]}
    requests = workload(asked["num_prompts"], **lengths, ratio=asked["random_range_ratio"], seed=config.seed)
    return bench_throughput(config, requests, n=asked["n"], output_json=asked["output_json"])


def run_latency(options: Options) -> int:
    set_up_logging("warning")
    from jax_engine.server.bench.offline import bench_latency

    asked = given_or_default(options, LATENCY_FLAGS)
    integer("num_iters", asked["num_iters"], low=1, high=2**31, remedy="30 is the default")
    return bench_latency(
        engine_config(measured(options)),
        input_len=asked["input_len"],
        output_len=asked["output_len"],
        batch_size=asked["batch_size"],
        n=asked["n"],
        num_warm_up=asked["num_iters_warmup"],
        num_iterations=asked["num_iters"],
        output_json=asked["output_json"],
    )


def run_startup(options: Options) -> int:
    from jax_engine.server.bench.startup import bench_startup

    asked = given_or_default(options, STARTUP_FLAGS)
    if "compilation_cache_dir" in options.values:
        raise ValueError("compilation_cache_dir=... has no place here: every start is given its own; leave it out")
    arguments = as_arguments(asdict(engine_config(options)), options, asked["model"])
    return bench_startup(
        arguments,
        num_cold=asked["num_iters_cold"],
        num_warm=asked["num_iters_warm"],
        num_warm_up=asked["num_iters_warmup"],
        output_json=asked["output_json"],
    )


def measured(options: Options) -> Options:
    """The options for measuring an engine: everything is compiled before, and no prompt is found in the cache."""
    defaults = {"compile_before_ready": True, "enable_prefix_caching": False}
    return Options({**defaults, **options.values}, options.sources)


def as_arguments(settings: dict[str, Any], options: Options, model: str | None) -> list[str]:
    """The engine's settings among the options as `jax-engine serve` takes them."""
    arguments = [model] if model else []
    for flag in (flag for flags in engine_groups().values() for flag in flags):
        if flag.field not in options.values:
            continue
        value = settings[flag.field]
        if flag.type is bool:
            arguments.append(flag.option if value else flag.names[-1])
        elif flag.is_list:
            arguments += [flag.option, *value]
        else:
            text = json.dumps(value) if flag.takes_json else ",".join(value) if isinstance(value, tuple) else str(value)
            arguments.append(f"{flag.option}={text}")
    return arguments
