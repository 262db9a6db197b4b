"""`jax-engine bench`: the arithmetic of its reports, and one measurement of the shared server."""

import json
import math
import subprocess
import sys
from itertools import pairwise

import pytest

from jax_engine.server.bench.client import Target
from jax_engine.server.bench.figures import RequestTiming, percentiles
from jax_engine.server.bench.load import Asking, Load, piece_of
from jax_engine.server.bench.serve import ServeBenchmark, busiest_second, figures, most_at_once
from jax_engine.server.cli.bench import workload
from jax_engine.server.cli.root import main

FIRST = RequestTiming(sent=0.0, arrivals=(0.1, 0.2, 0.4), prompt_tokens=10, output_tokens=3, text="abc")
SECOND = RequestTiming(sent=0.3, arrivals=(1.3,), prompt_tokens=20, output_tokens=1, text="d")


def benchmark(**settings):
    load = Load(math.inf, 2, 0)
    target = Target("http://127.0.0.1:9")
    return ServeBenchmark(
        target=target, backend="openai", endpoint="/v1/completions", load=load, workload=(), **settings
    )


def test_the_report_has_vllms_fields_and_what_they_mean():
    names = ("ttft", "tpot", "itl", "e2el")
    asked = benchmark(percentile_metrics=names, metric_percentiles=(50.0, 99.0), goodput=("ttft:500", "e2el:450"))
    report = figures(asked, [FIRST, "RequestError: no", SECOND], duration=2.0)
    assert (report["completed"], report["failed"]) == (2, 1)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (30, 4)
    assert (report["request_throughput"], report["output_throughput"], report["total_token_throughput"]) == (1, 2, 17)
    assert report["request_goodput"] == 0.5, "the second one's first token was late"
    assert report["mean_ttft_ms"] == pytest.approx(550)
    assert report["median_tpot_ms"] == pytest.approx(150), "an answer of one token has no later ones"
    assert report["p50_itl_ms"] == pytest.approx(150)
    assert report["p99_e2el_ms"] == pytest.approx(1000 - 0.01 * 600)
    assert report["std_ttft_ms"] == pytest.approx(450)
    assert report["ttfts"] == pytest.approx([0.1, 0, 1.0])
    assert report["itls"][0] == pytest.approx([0.1, 0.2])
    assert report["errors"] == ["", "RequestError: no", ""]
    assert report["generated_texts"] == ["abc", "", "d"]


def test_a_report_of_nothing_but_failures_has_no_times():
    report = figures(benchmark(), ["OSError: gone"], duration=1.0)
    assert (report["completed"], report["max_concurrent_requests"], report["max_output_tokens_per_s"]) == (0, 0, 0)
    assert math.isnan(report["p99_ttft_ms"])


def test_peaks_are_of_the_clock():
    assert most_at_once([FIRST, SECOND]) == 2
    assert busiest_second([FIRST, SECOND]) == pytest.approx(3)


def test_percentiles_are_named_by_their_number():
    assert percentiles([3.0, 1.0, 2.0], (50, 99.9)) == {"50": 2.0, "99.9": pytest.approx(2.998)}


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 5.0])
def test_bursts_keep_the_rate(burstiness):
    times = Load(20.0, 1, seed=3, burstiness=burstiness).send_times(4000)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.15)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance / mean**2 == pytest.approx(1 / burstiness, rel=0.3)


def test_lengths_vary_by_the_ratio_behind_one_prefix():
    requests = workload(50, input_len=10, output_len=4, ratio=0.5, seed=1, prefix_len=3)
    assert {len(item.prompt_token_ids) for item in requests} == set(range(8, 19))
    assert {item.output_tokens for item in requests} == {2, 3, 4, 5, 6}
    assert len({item.prompt_token_ids[:3] for item in requests}) == 1


def test_a_chat_is_asked_in_words_and_its_first_chunk_is_no_answer():
    (item,) = workload(1, input_len=4, output_len=2, ratio=0, seed=0)
    body = Asking("m", "/v1/chat/completions").body(item)
    assert len(body["messages"][0]["content"].split()) == 4
    assert piece_of({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}) is None
    assert piece_of({"delta": {"reasoning_content": "hm"}, "finish_reason": None}) == "hm"
    assert piece_of({"delta": {}, "finish_reason": "length"}) is None
    assert piece_of({"text": "", "finish_reason": None}) == ""
    assert piece_of({"text": "", "finish_reason": "length"}) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--request-rate", "0"), "--request-rate '0' must be a number above 0"),
        (("--percentile-metrics", "ttft,tps"), "--percentile-metrics 'tps' must be of ttft,tpot,itl,e2el"),
        (("--metric-percentiles", "100"), "--metric-percentiles"),
        (("--goodput", "itl:5"), "--goodput 'itl:5' must be ttft:MS"),
        (("--max-concurrency", "0"), "--max-concurrency 0 must be a whole number"),
        (("--random-range-ratio", "2"), "--random-range-ratio 2"),
        (("--base-url", "localhost"), "must look like http://localhost:8000"),
        (("--base-url", "http://127.0.0.1:9", "--num-prompts", "1"), "http://127.0.0.1:9 cannot be measured"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_running_server_is_measured(server, tmp_path):
    command = [sys.executable, "-m", "jax_engine.server.cli", "bench", "serve", "--base-url", server.url]
    small = ["--num-prompts", "6", "--random-input-len", "8", "--random-output-len", "4", "--max-concurrency", "2"]
    saved = ["--save-result", "--result-dir", str(tmp_path), "--label", "mine"]
    result = subprocess.run([*command, *small, *saved], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("mine-infqps-concurrency2-demo-")
    report = json.loads(file.read_text())
    assert (report["completed"], report["model_id"], report["max_concurrent_requests"]) == (6, "demo", 2)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (48, 24)
    assert report["p99_ttft_ms"] >= report["median_ttft_ms"] > 0
    assert "errors" not in report, "those of each request are only saved in detail"
    assert "TTFT p99, ms" in result.stdout
