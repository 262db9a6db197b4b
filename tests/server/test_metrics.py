"""/metrics as Prometheus reads it, and the dashboard that draws it."""

import json
import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import jax_engine.server
from jax_engine.config import EngineConfig
from jax_engine.core.stats import EngineStats
from jax_engine.server.app import build_app
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings

DASHBOARDS = Path(jax_engine.server.__file__).parent / "dashboards"
STATS = EngineStats(
    token_rows_total=100,
    padding_tokens_total=30,
    steps_by_tokens_total=(0, 2, 1, *[0] * 11),
    spec_accepted_tokens_per_position_total=(2, 1),
    running_adapters=("loud", "shout"),
)
FIRST_TOKEN = "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
TOKEN_GAP = "0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80"
REQUEST = "0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"
# As vLLM has them: the buckets' upper bounds of each histogram.
BOUNDS = {
    "vllm:time_to_first_token_seconds": FIRST_TOKEN,
    "vllm:inter_token_latency_seconds": TOKEN_GAP,
    "vllm:request_time_per_output_token_seconds": TOKEN_GAP,
    **{
        f"vllm:{name}_seconds": REQUEST
        for name in (
            *("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time"),
            "request_decode_time",
        )
    },
    "vllm:iteration_tokens_total": "1 8 16 32 64 128 256 512 1024 2048 4096 8192 16384",
    "vllm:request_params_n": "1 2 5 10 20",
    "http_request_duration_seconds": "0.1 0.5 1",
}
ONE_TWO_FIVE = (
    *("request_prompt_tokens", "request_generation_tokens", "request_params_max_tokens"),
    *("request_max_num_generation_tokens", "request_prefill_kv_computed_tokens"),
)
GAUGES = "num_requests_running num_requests_waiting kv_cache_usage_perc cache_config_info lora_requests_info"
COUNTERS = (
    "prompt_tokens generation_tokens num_preemptions request_success prefix_cache_queries prefix_cache_hits "
    "external_prefix_cache_queries external_prefix_cache_hits prompt_tokens_by_source spec_decode_num_drafts "
    "spec_decode_num_draft_tokens spec_decode_num_accepted_tokens spec_decode_num_accepted_tokens_per_pos"
)


class Working(Service):
    """A service whose engine would count `STATS`."""

    def stats(self):
        return STATS


@pytest.fixture
async def families():
    """Metric families by name, after a request for each of some routes."""
    service = Working(EngineConfig(enable_lora=True), ServerSettings(), on_failure=lambda: None)
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path in ("/openapi.json", "/v1/models/demo", "/v1/models", "/version", "/made-up/1", "/made-up/2"):
            await http.get(path)
        text = (await http.get("/metrics")).text
    return {family.name: family for family in text_string_to_metric_families(text)}


def bounds_of(family):
    return sorted({float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")})


def test_names_and_types_are_those_of_vllm(families):
    assert {name: families[f"vllm:{name}"].type for name in GAUGES.split()} == dict.fromkeys(GAUGES.split(), "gauge")
    assert {name: families[f"vllm:{name}"].type for name in COUNTERS.split()} == dict.fromkeys(
        COUNTERS.split(), "counter"
    )
    for name, family in families.items():
        if name.startswith("vllm:") and name != "vllm:lora_requests_info":
            assert all({"model_name", "engine"} <= set(sample.labels) for sample in family.samples), name


@pytest.mark.parametrize("name", BOUNDS)
def test_bucket_bounds_are_those_of_vllm(families, name):
    assert families[name].type == "histogram"
    assert bounds_of(families[name]) == [*map(float, BOUNDS[name].split()), float("inf")]


@pytest.mark.parametrize("name", ONE_TWO_FIVE)
def test_token_counts_are_in_buckets_of_one_two_five(families, name):
    *bounds, last = bounds_of(families[f"vllm:{name}"])
    assert bounds[:7] == [1, 2, 5, 10, 20, 50, 100]
    assert last == float("inf")


def test_steps_are_counted_by_their_tokens(families):
    samples = {
        (sample.name.rpartition("_")[2], sample.labels.get("le")): sample.value
        for sample in families["vllm:iteration_tokens_total"].samples
    }
    assert [samples["bucket", bound] for bound in ("1.0", "8.0", "16.0", "+Inf")] == [0, 2, 3, 3]
    assert samples["count", None] == 3
    assert samples["sum", None] == 70


def test_adapters_of_requests_are_listed(families):
    (sample,) = families["vllm:lora_requests_info"].samples
    assert sample.labels == {
        "max_lora": "4",
        "running_lora_adapters": "loud,shout",
        "waiting_lora_adapters": "",
    }


def test_answers_are_counted_by_route_and_class_of_status(families):
    counted = {
        tuple(sample.labels.values()): sample.value
        for sample in families["http_requests"].samples
        if sample.name == "http_requests_total"
    }
    # Paths that clients make up are one; what is asked all the time is not counted.
    assert counted == {
        ("/v1/models", "GET", "5xx"): 1,
        ("/v1/models/{name:path}", "GET", "5xx"): 1,
        ("none", "ANY", "2xx"): 1,
        ("none", "ANY", "4xx"): 2,
    }
    durations = families["http_request_duration_seconds"].samples
    assert {sample.labels["handler"] for sample in durations} == {"/v1/models", "/v1/models/{name:path}"}
    (count,) = [s.value for s in families["http_request_duration_highr_seconds"].samples if s.name.endswith("_count")]
    assert count == 5


@pytest.mark.parametrize("file", sorted(DASHBOARDS.glob("*.json")), ids=lambda file: file.name)
def test_every_query_of_the_dashboard_asks_for_a_metric_that_exists(families, file):
    dashboard = json.loads(file.read_text())
    there = {sample.name for family in families.values() for sample in family.samples} | set(families)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [entry["query"]["query"] for entry in dashboard["templating"]["list"] if entry["type"] == "query"]
    assert len(expressions) > 20
    asked = {name for text in expressions for name in re.findall(r"(?:(?:vllm|jax_engine):|http_|process_)\w+", text)}
    assert asked - there == set()
