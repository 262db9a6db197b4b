"""Frames, trackers and metrics: the token path without an engine."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jax_engine.core.stats import EngineStats, HostTime
from jax_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jax_engine.sampling_params import SamplingParams
from jax_engine.server.metrics.cells import ROW_BYTES, CellMemory
from jax_engine.server.metrics.histogram import Histogram, one_two_five
from jax_engine.server.metrics.metrics import Metrics
from jax_engine.server.openai.chat_frames import ChatFrames
from jax_engine.server.openai.frames import CompletionFrames, LineFrames, Piece
from jax_engine.server.tracking import PromptTracker, RequestRecord

AWKWARD = 'quote " back\\slash\nline é 日本 \u2028 \x00 </script>'


def events(data):
    """The JSON of each server-sent event, [DONE] as text."""
    parts = data.decode().split("\n\n")
    assert parts.pop() == ""
    contents = [part.removeprefix("data: ") for part in parts]
    return [content if content == "[DONE]" else json.loads(content) for content in contents]


@pytest.mark.parametrize("kind", [ChatFrames, CompletionFrames])
@pytest.mark.parametrize("include_usage", [False, True])
def test_every_openai_frame_is_one_event_of_the_same_answer(kind, include_usage):
    frames = kind(response_id="id-1", model='a"b', include_usage=include_usage)
    last = Piece(2, "end", finish_reason="stop", stop_reason="x")
    data = frames.start(2) + frames.write(Piece(2, AWKWARD)) + frames.write(last) + frames.end({"total": 1})
    *chunks, done = events(data)
    assert done == "[DONE]"
    assert {(chunk["id"], chunk["model"]) for chunk in chunks} == {("id-1", 'a"b')}
    usage = chunks.pop() if include_usage else None
    assert all(("usage" in chunk) is include_usage for chunk in chunks)
    assert usage is None or (usage["choices"] == [] and usage["usage"] == {"total": 1})
    choices = [chunk["choices"][0] for chunk in chunks]
    assert {choice["index"] for choice in choices} == {2}
    texts = [choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices]
    assert "".join(texts) == AWKWARD + "end"
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    assert choices[-1]["stop_reason"] == "x"


def test_chat_says_the_role_first_and_the_reason_last():
    frames = ChatFrames(response_id="i", model="m", include_usage=False)
    role, end = events(frames.start(0) + frames.write(Piece(0, "", finish_reason="length")))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert end["choices"][0]["delta"] == {}


def test_lines_are_json_objects():
    frames = LineFrames()
    last = Piece(1, "", finish_reason="stop")
    data = frames.start(1) + frames.write(Piece(1, AWKWARD)) + frames.write(last) + frames.end({"total": 1})
    lines = [json.loads(line) for line in data.split(b"\n") if line]
    assert [line.get("text") for line in lines] == [AWKWARD, "", None]


def test_histogram_counts_up_to_and_including_a_bound():
    histogram = Histogram([1, 2.5], CellMemory.alone())
    for value in (0.5, 1, 2, 3):
        histogram.observe(value)
    histogram.observe(2.5, 3)
    assert histogram.cumulative() == [("1.0", 2), ("2.5", 6), ("+Inf", 7)]
    assert histogram.total == pytest.approx(14)


def test_token_bounds_are_one_two_five():
    assert one_two_five(100) == [1, 2, 5, 10, 20, 50, 100]
    assert one_two_five(30) == [1, 2, 5, 10, 20]


def output(*completions, finished=False, first=2.0, last=4.0):
    times = RequestMetrics(arrival_time=1.0, first_scheduled_time=1.5, first_token_time=first, last_token_time=last)
    return RequestOutput("id", "p", [1, 2, 3], list(completions), finished, times, num_cached_tokens=2)


def sample(metrics, name, **labels):
    for family in text_string_to_metric_families(metrics.render([EngineStats()] * len(metrics.engines)).decode()):
        for found in family.samples:
            if found.name == name and labels.items() <= found.labels.items():
                return found.value
    raise AssertionError(name)


def test_a_finished_request_is_counted_once():
    metrics, record = Metrics("m"), RequestRecord("r")
    tracker = PromptTracker(metrics, SamplingParams(n=2, max_tokens=9))
    record.trackers = [tracker]
    tracker.take(output(CompletionOutput(0, "a", [7, 8], "stop")))
    tracker.take(output(CompletionOutput(1, "b", [9, 9, 9], "length"), finished=True))
    tracker.close()
    assert record.usage() == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    for reason, count in {"stop": 1, "length": 1, "abort": 0}.items():
        assert sample(metrics, "vllm:request_success_total", finished_reason=reason) == count
    assert sample(metrics, "vllm:time_to_first_token_seconds_sum") == 1
    assert sample(metrics, "vllm:request_queue_time_seconds_sum") == 0.5
    assert sample(metrics, "vllm:request_decode_time_seconds_sum") == 2
    assert sample(metrics, "vllm:request_generation_tokens_sum") == 5
    assert sample(metrics, "vllm:request_params_n_bucket", le="2.0", model_name="m", engine="0") == 1
    assert sample(metrics, "vllm:e2e_request_latency_seconds_count") == 1


def test_unstreamed_tokens_share_the_time_between_first_and_last():
    metrics = Metrics("m")
    PromptTracker(metrics, SamplingParams()).take(output(CompletionOutput(0, "", [1] * 5, "length"), finished=True))
    assert sample(metrics, "vllm:inter_token_latency_seconds_count") == 4
    assert sample(metrics, "vllm:inter_token_latency_seconds_sum") == pytest.approx(2)


def test_a_dropped_request_counts_as_aborted():
    metrics = Metrics("m")
    tracker = PromptTracker(metrics, SamplingParams(n=3))
    tracker.take(output(CompletionOutput(0, "a", [7], "stop")))
    tracker.close()
    tracker.close()
    assert sample(metrics, "vllm:request_success_total", finished_reason="abort") == 2


def test_a_refused_request_is_not_counted_as_ended():
    metrics = Metrics("m")
    tracker = PromptTracker(metrics, SamplingParams(n=3))
    tracker.refuse()
    tracker.close()
    assert sample(metrics, "vllm:request_success_total", finished_reason="abort") == 0


def test_a_request_that_died_before_its_first_token_has_no_times():
    metrics = Metrics("m")
    ended = output(CompletionOutput(0, "", [], "abort"), finished=True, first=None, last=None)
    PromptTracker(metrics, SamplingParams()).take(ended)
    assert sample(metrics, "vllm:request_success_total", finished_reason="abort") == 1
    assert sample(metrics, "vllm:time_to_first_token_seconds_count") == 0


def test_engine_counters_reach_the_metrics():
    stats = EngineStats(
        num_running=3,
        num_pages=10,
        num_pages_in_use=4,
        num_tokens_in_pages=48,
        page_size=16,
        programs_compiled=2,
        programs_planned=8,
        compile_eta_seconds=12.5,
        padding_tokens_total=5,
        num_host_pages=7,
        host_cache_hits_total=32,
        loaded_pages_total=2,
        page_waste_sampled_total=9,
        host_time=HostTime(steps=1, schedule=2e6),
    )
    text = Metrics("m").render([stats]).decode()
    for line in (
        'vllm:num_requests_running{engine="0",model_name="m"} 3.0',
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.4',
        'jax_engine:kv_page_waste{engine="0",model_name="m"} 0.25',
        'jax_engine:programs_compiled{engine="0",model_name="m"} 2.0',
        'jax_engine:programs_planned{engine="0",model_name="m"} 8.0',
        'jax_engine:compile_eta_seconds{engine="0",model_name="m"} 12.5',
        'jax_engine:padding_tokens_total{engine="0",model_name="m"} 5.0',
        'jax_engine:host_pages{engine="0",model_name="m"} 7.0',
        'vllm:external_prefix_cache_hits_total{engine="0",model_name="m"} 32.0',
        'jax_engine:loaded_pages_total{engine="0",model_name="m"} 2.0',
        'jax_engine:kv_page_waste_sampled_total{engine="0",model_name="m"} 9.0',
        'jax_engine:host_seconds_total{engine="0",model_name="m",part="schedule"} 2.0',
    ):
        assert line in text.splitlines()


def test_metrics_count_drafts_by_position_where_there_are_any():
    stats = EngineStats(spec_drafts_total=4, spec_draft_tokens_total=8, spec_accepted_tokens_per_position_total=(3, 2))
    lines = Metrics("m").render([stats]).decode().splitlines()
    for name, value in (("drafts", 4.0), ("draft_tokens", 8.0), ("accepted_tokens", 5.0)):
        assert f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="m"}} {value}' in lines
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    assert f'{name}{{engine="0",model_name="m",position="1"}} 2.0' in lines
    assert "spec_decode" not in Metrics("m").render([EngineStats()]).decode()


def test_whichever_front_end_is_asked_it_tells_what_all_have_counted(tmp_path):
    with (tmp_path / "cells").open("w+b") as file:
        file.truncate(3 * ROW_BYTES)
        ends = [Metrics("m", CellMemory.shared(file.fileno(), number=number, count=3)) for number in range(2)]
    for metrics in ends:
        tracker = PromptTracker(metrics, SamplingParams())
        tracker.take(output(CompletionOutput(0, "a", [7, 8], "stop"), finished=True))
    for metrics in ends:  # the third has not started yet
        assert sample(metrics, "vllm:request_success_total", finished_reason="stop") == 2
        assert sample(metrics, "vllm:time_to_first_token_seconds_sum") == 2
        assert sample(metrics, "vllm:request_generation_tokens_bucket", le="2.0") == 2
        assert sample(metrics, "vllm:request_generation_tokens_bucket", le="1.0") == 0
    one, both = (dict(process_samples(metrics)) for metrics in (Metrics("m"), ends[0]))
    assert set(one) == set(both)
    if one:  # where there is no /proc there are none
        # Both rows are of this process.
        assert both["process_resident_memory_bytes"] == pytest.approx(2 * one["process_resident_memory_bytes"], rel=0.1)
        assert both["process_start_time_seconds"] == one["process_start_time_seconds"]


def process_samples(metrics):
    for family in text_string_to_metric_families(metrics.render([EngineStats()] * len(metrics.engines)).decode()):
        for found in family.samples:
            if found.name.startswith("process_"):
                yield found.name, found.value
