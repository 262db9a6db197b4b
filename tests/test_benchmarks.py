"""The benchmarks' own arithmetic, their client, and one tiny run of each from the command line."""

import argparse
import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jax_engine.models.demo
from host_overhead import CORE_STAGES, TEXT_STAGES
from jax_engine.server.bench.client import RequestError, Target, get, stream
from jax_engine.server.bench.figures import (
    Latencies,
    Percentiles,
    Rates,
    RequestTiming,
    WorkItem,
    format_table,
    median_run,
    mixed_workload,
    write_json,
)
from jax_engine.server.bench.load import Asking, Load, complete, offer
from jax_engine.server.bench.metrics import HOST_PARTS, parse_metrics, server_figures
from measure import add_workload_arguments, workload_from

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_equal_arguments_give_an_equal_workload() -> None:
    def workload(seed: int) -> list[WorkItem]:
        return mixed_workload(20, prompt_tokens=(3, 9), output_tokens=(2, 5), vocab_size=50, seed=seed)

    assert workload(1) == workload(1)
    assert workload(1) != workload(2)
    for item in workload(1):
        assert 3 <= len(item.prompt_token_ids) <= 9
        assert 2 <= item.output_tokens <= 5
        assert all(0 <= token < 50 for token in item.prompt_token_ids)
    assert {len(item.prompt_token_ids) for item in workload(1)} >= {3, 9}, "both ends of the range occur"


def test_workload_refuses_an_empty_range() -> None:
    with pytest.raises(ValueError, match=r"output_tokens is 5\.\.4"):
        mixed_workload(1, prompt_tokens=(1, 2), output_tokens=(5, 4), vocab_size=2, seed=0)


def test_workload_flags_default_to_the_published_workload() -> None:
    parser = argparse.ArgumentParser()
    add_workload_arguments(parser)
    expected = mixed_workload(64, prompt_tokens=(8, 200), output_tokens=(16, 128), vocab_size=256, seed=0)
    assert workload_from(parser.parse_args([])) == expected


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count)
    ours = Percentiles.of(values.tolist())
    np.testing.assert_allclose([ours.p50, ours.p90, ours.p99], np.percentile(values, [50, 90, 99]))


def test_percentiles_of_nothing_are_not_a_number() -> None:
    assert math.isnan(Percentiles.of([]).p99)


def test_latencies_of_a_known_stream() -> None:
    """Four tokens in three pieces: first after 0.5 s, then 0.1 s and 0.3 s later."""
    timing = RequestTiming(sent=10.0, arrivals=(10.5, 10.6, 10.9), prompt_tokens=8, output_tokens=4)
    latencies = Latencies.of([timing])
    assert latencies.ttft_ms.p50 == pytest.approx(500)
    assert latencies.tpot_ms.p50 == pytest.approx(1e3 * 0.4 / 3)
    assert latencies.itl_ms.p50 == pytest.approx(200)


def test_an_answer_of_one_token_has_no_time_per_later_token() -> None:
    timing = RequestTiming(sent=0.0, arrivals=(1.0,), prompt_tokens=1, output_tokens=1)
    assert math.isnan(Latencies.of([timing]).tpot_ms.p50)


def test_rates_divide_by_wall_time() -> None:
    rates = Rates(seconds=4.0, requests=2, input_tokens=40, output_tokens=8)
    assert (rates.requests_per_second, rates.input_tokens_per_second, rates.output_tokens_per_second) == (0.5, 10, 2)


def test_median_run_warms_up_and_returns_one_of_the_timed_runs() -> None:
    calls = iter(range(10))
    _, result = median_run(lambda: next(calls), repeats=3)
    assert result in {1, 2, 3}
    assert next(calls) == 4


def test_table_aligns_numbers_and_shows_what_is_missing() -> None:
    lines = format_table(["", "ours", "peer"], [["tokens/s", 12345.6, None], ["share", 0.125, math.nan]]).splitlines()
    assert lines[0].split() == ["ours", "peer"]
    assert lines[2].split() == ["tokens/s", "12,346", "-"]
    assert lines[3].split() == ["share", "0.12", "-"]
    assert len({len(line) for line in lines[1:]}) == 1


def test_json_report_is_valid_without_measurements(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"ttft": [math.nan, 1.5]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"ttft": [None, 1.5]}


def test_metrics_add_up_labels_but_keep_parts() -> None:
    exposition = (
        "# HELP vllm:prompt_tokens_total Tokens.\n"
        'vllm:request_success_total{reason="a \\"}b"} 2.0\n'
        'vllm:request_success_total{reason="length"} 3.0\n'
        'jax_engine:host_seconds_total{model="m",part="pack"} 0.5\n'
        "jax_engine:steps_total 7 1700000000\n"
    )
    assert parse_metrics(exposition) == {
        "vllm:request_success_total": 5.0,
        "jax_engine:host_seconds_total{pack}": 0.5,
        "jax_engine:steps_total": 7.0,
    }


def test_server_figures_are_of_the_time_between_two_readings() -> None:
    parts = [f"jax_engine:host_seconds_total{{{part}}}" for part in HOST_PARTS]
    before = {"jax_engine:steps_total": 10.0, "jax_engine:token_rows_total": 100.0, **dict.fromkeys(parts, 1.0)}
    after = {"jax_engine:steps_total": 30.0, "jax_engine:token_rows_total": 300.0, **dict.fromkeys(parts, 1.004)}
    padding, compiled = "jax_engine:padding_tokens_total", "jax_engine:programs_compiled"
    figures = server_figures({**before, padding: 10.0, compiled: 3}, {**after, padding: 40.0, compiled: 4})
    assert figures["steps"] == 20
    assert figures["padding, % of token rows"] == pytest.approx(15)
    assert figures["programs compiled"] == 4
    assert figures["host pack, us/step"] == pytest.approx(200)
    room, waste = "jax_engine:kv_page_room_sampled_total", "jax_engine:kv_page_waste_sampled_total"
    figures = server_figures({room: 100.0, waste: 10.0}, {room: 600.0, waste: 25.0})
    assert figures == {"KV page waste, mean %": pytest.approx(3)}


def test_a_server_without_our_metrics_has_no_figures() -> None:
    assert server_figures({}, {"vllm:num_preemptions_total": 2.0, "other": 1.0}) == {"preemptions": 2.0}


def test_requests_are_offered_at_the_rate_and_repeatably() -> None:
    times = Load(rate=20.0, concurrency=1, seed=3).send_times(2000)
    assert times == sorted(times)
    assert times[-1] == pytest.approx(100, rel=0.1)
    assert times == Load(rate=20.0, concurrency=9, seed=3).send_times(2000)
    assert set(Load(rate=math.inf, concurrency=1, seed=3).send_times(5)) == {0.0}


def test_peer_batches_hold_every_request_once_and_similar_lengths_together() -> None:
    transformers_peer = pytest.importorskip("transformers_peer")
    workload = mixed_workload(10, prompt_tokens=(1, 9), output_tokens=(1, 9), vocab_size=5, seed=0)
    batches = list(transformers_peer.batches_by_length(workload, 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    lengths = [workload[i].output_tokens for batch in batches for i in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(i for batch in batches for i in batch) == list(range(10))


def test_peer_answers_do_not_depend_on_its_batches(tmp_path: Path) -> None:
    """A wrong mask or position would make padded rows differ, and the peer's speed a comparison with nothing."""
    transformers_peer = pytest.importorskip("transformers_peer")
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(vocab_size=64, eos_token_id=1, **shape).save_pretrained(tmp_path)
    model = transformers_peer.load(str(tmp_path), dtype="float32", random_weights=True)
    workload = mixed_workload(5, prompt_tokens=(1, 6), output_tokens=(1, 7), vocab_size=64, seed=0)
    together = transformers_peer.run(model, workload, batch_size=5, repeats=1)
    alone = transformers_peer.run(model, workload, batch_size=1, repeats=1)
    assert [len(answer) for answer in together.answers] == [item.output_tokens for item in workload]
    assert together.answers == alone.answers


Responder = Callable[[dict[str, Any]], tuple[int, list[dict[str, Any]]]]


@asynccontextmanager
async def tiny_server(respond: Responder) -> AsyncIterator[Target]:
    """A completions endpoint in a few lines: `respond` maps a request's JSON to a status and the events to stream."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length:")[2].split()[0])
        status, events = respond(json.loads(await reader.readexactly(length) or "{}"))
        writer.write(f"HTTP/1.1 {status} X\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for data in (*(json.dumps(event) for event in events), "[DONE]"):
            # Cut within the line, as a network may.
            for piece in (b"da", f"ta: {data}\n\n".encode()):
                writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


def generated(request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
    """One event a token, then why it ended, then the usage: what an OpenAI-compatible server streams."""
    count = request["max_tokens"]
    tokens = [{"choices": [{"text": f"{i} ", "finish_reason": None}]} for i in range(count)]
    end = {"choices": [{"text": "", "finish_reason": "length"}]}
    usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": count}
    return 200, [*tokens, end, {"choices": [], "usage": usage}]


async def test_a_streamed_completion_is_timed_piece_by_piece() -> None:
    async with tiny_server(generated) as target:
        timing = await complete(target, Asking("m"), WorkItem((1, 2, 3), 5))
    assert (timing.prompt_tokens, timing.output_tokens, len(timing.arrivals)) == (3, 5, 5)
    assert timing.sent <= timing.arrivals[0]
    assert list(timing.arrivals) == sorted(timing.arrivals)


async def test_an_answer_of_the_wrong_length_is_a_failure() -> None:
    """A server that stops at the end of sequence must not look fast."""
    async with tiny_server(lambda request: generated({**request, "max_tokens": 2})) as target:
        with pytest.raises(RequestError, match="2 tokens came, 5 were asked for"):
            await complete(target, Asking("m"), WorkItem((1,), 5))


async def test_failed_requests_are_reported_beside_the_rest() -> None:
    def refuse_long(request: dict[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        return generated(request) if request["max_tokens"] < 4 else (400, [])

    async with tiny_server(refuse_long) as target:
        load = Load(rate=math.inf, concurrency=2, seed=0)
        answers = await offer(target, Asking("m"), [WorkItem((1,), 2), WorkItem((1,), 4), WorkItem((1,), 3)], load)
    assert [isinstance(answer, RequestTiming) for answer in answers] == [True, False, True]
    assert "status 400" in str(answers[1])


async def test_an_error_inside_a_stream_is_raised() -> None:
    async with tiny_server(lambda _: (200, [{"error": {"message": "engine died"}}])) as target:
        with pytest.raises(RequestError, match="engine died"):
            [event async for event in stream(target, "/v1/completions", {})]


async def test_a_plain_answer_is_read_to_its_end() -> None:
    async with tiny_server(lambda _: (200, [{"a": 1}])) as target:
        assert await get(target, "/metrics") == 'data: {"a": 1}\n\ndata: [DONE]\n'


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_a_base_url_that_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must look like http://localhost:8000"):
        Target(url)


def run_benchmark(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    # The benchmarks find each other as a user's would: in the folder of the script.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One random layer with the built-in tokenizer: compiles in seconds, and both sides can load it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny_model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=1024, max_position_embeddings=128, initializer_range=0.3, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(jax_engine.models.demo.__file__).with_name(name), folder)
    return str(folder)


WORKLOAD = ("--num-requests", "4", "--prompt-tokens", "2", "9", "--output-tokens", "2", "4")
SMALL_ENGINE = ("--max-num-seqs", "4", "--max-num-batched-tokens", "16")


def test_throughput_prints_the_engine_beside_its_peer(tiny_model: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--model", tiny_model, "--repeats", "1", "--peer-batch-sizes", "2", "--json", str(report))
    printed = run_benchmark("throughput.py", *WORKLOAD, *SMALL_ENGINE, *options, "--deterministic")
    assert "times the best throughput of transformers (2 a batch); 4 of 4 answers equal" in printed
    figures = json.loads(report.read_text())
    assert figures["mixed_lengths"]["rates"]["requests"] == 4
    assert figures["deterministic"]["engine"]["programs compiled"] == 2  # a step, and its draw
    assert "times the throughput of the default with mixed lengths" in printed
    assert figures["engine"]["compiles in a request's path"] == 0
    assert figures["engine"]["step sizes"] == [1, 2, 4, 8, 12, 16]
    assert "steps are padded to 1, 2, 4, 8, 12, 16 token rows" in printed
    assert figures["mixed_lengths"]["host"]["total"] > 0


def bench(*arguments: str) -> str:
    command = [sys.executable, "-m", "jax_engine.server.cli", "bench", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_startup_times_a_cold_and_a_warm_start(tiny_model: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    once = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "1")
    printed = bench("startup", "--model", tiny_model, *once, "--output-json", str(report), *SMALL_ENGINE)
    figures = json.loads(report.read_text())
    for kind in ("cold", "warm"):
        (listening,), (first_answer,) = figures[f"{kind}_listening_times"], figures[f"{kind}_startup_times"]
        (all_compiled,) = figures[f"{kind}_all_compiled_times"]
        assert 0 < listening <= first_answer <= all_compiled
        assert figures[f"avg_{kind}_startup_time"] == figures[f"{kind}_startup_percentiles"]["50"] == first_answer
    assert figures["avg_warm_compilation_time"] < figures["avg_cold_compilation_time"]
    assert "jax-engine --help" in printed


@pytest.mark.slow
def test_offline_benchmarks_report_in_vllms_fields(tiny_model: str, tmp_path: Path) -> None:
    report, lengths = tmp_path / "report.json", ("--input-len", "6", "--output-len", "4", "--model", tiny_model)
    options = (*lengths, "--output-json", str(report), *SMALL_ENGINE)
    printed = bench("throughput", "--num-prompts", "5", *options)
    figures = json.loads(report.read_text())
    assert (figures["num_requests"], figures["total_num_tokens"]) == (5, 50)
    assert figures["tokens_per_second"] == pytest.approx(50 / figures["elapsed_time"])
    assert "output tokens/s" in printed
    printed = bench("latency", "--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "3", *options)
    figures = json.loads(report.read_text())
    assert len(figures["latencies"]) == 3
    assert set(figures["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert figures["avg_latency"] == pytest.approx(sum(figures["latencies"]) / 3)
    assert "seconds for 2 of 6 + 4 tokens" in printed


def test_serving_measures_a_server_that_it_starts_itself(tiny_model: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--start-server", "--model", tiny_model, "--json", str(report))
    printed = run_benchmark("serving.py", *WORKLOAD, *options, "--", *SMALL_ENGINE)
    (server,) = json.loads(report.read_text())["servers"]
    assert server["failures"] == []
    assert server["rates"]["requests"] == 4
    assert server["latencies"]["ttft_ms"]["p50"] > 0
    assert server["server"]["compiles in a request's path"] == 0
    assert server["server"]["steps"] > 0
    assert "output tokens/s" in printed


@pytest.mark.slow
def test_host_overhead_measures_every_stage_and_checks_every_answer(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    sizes = ("--sequences", "1", "3", "--contexts", "20", "--steps", "4", "--streams", "2", "--output-tokens", "8")
    small = ("--max-num-seqs", "2", "--max-num-batched-tokens", "8", "--api-server-count", "2")
    printed = run_benchmark("host_overhead.py", *sizes, "--json", str(report), "--", *small)
    figures = json.loads(report.read_text())
    assert [(costs["sequences"], costs["context"]) for costs in figures["core"]] == [(1, 20), (3, 20)]
    for costs in figures["core"]:
        assert set(costs["stages"]) == {*CORE_STAGES, *TEXT_STAGES, "wait"}
        assert all(microseconds > 0 for microseconds in costs["stages"].values())
        assert 0 < costs["core"] < sum(costs["stages"].values())
    (rates,) = figures["http"]
    assert (rates["streams"], rates["tokens"]) == (2, 16)
    assert "core, a sequence" in printed and "output tokens/s" in printed


def test_loading_compares_both_formats_of_the_same_weights(tmp_path: Path) -> None:
    """On two devices, with the files in the page cache; a child fails here if the leaves differ."""
    report = tmp_path / "report.json"
    options = ("--devices", "2", "--cache", "warm", "--repeats", "1", "--folder", str(tmp_path), "--json", str(report))
    printed = run_benchmark("loading.py", "--gigabytes", "0.003", *options)
    assert "times as fast" in printed
    figures = json.loads(report.read_text())
    (row,) = figures["rows"]
    assert (row["devices"], row["cache"]) == (2, "warm")
    assert {run["bytes"] for run in figures["runs"]} == {figures["bytes"]}
    assert row["ratio"] == pytest.approx(row["safetensors"]["seconds"] / row["orbax"]["seconds"])
    assert list(tmp_path.iterdir()) == [report], "the checkpoints are gone"
