"""What is logged, and in which form."""

import asyncio
import io
import json
import logging

import httpx
import pytest

from jax_engine.config import EngineConfig
from jax_engine.core.stats import EngineStats
from jax_engine.log_lines import JSONLines
from jax_engine.server.app import build_app
from jax_engine.server.metrics.throughput_log import log_throughput
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings


@pytest.fixture
def json_log():
    """What is logged, as JSON lines."""
    stream, root = io.StringIO(), logging.getLogger()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONLines())
    root.addHandler(handler)
    level = logging.getLogger("jax_engine").level
    logging.getLogger("jax_engine").setLevel("INFO")
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.removeHandler(handler)
    logging.getLogger("jax_engine").setLevel(level)


async def test_a_request_is_a_line_of_json_with_its_id(json_log):
    service = Service(EngineConfig(), ServerSettings(), on_failure=lambda: None)
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        await http.get("/v1/models", headers={"x-request-id": "one"})
    (line,) = [line for line in json_log() if line["logger"] == "jax_engine.server.gate"]
    assert line["level"] == "info"
    assert {name: line[name] for name in ("method", "path", "status", "request_id", "note")} == {
        "method": "GET",
        "path": "/v1/models",
        "status": 503,
        "request_id": "one",
        "note": "engine_starting",
    }
    assert line["message"].startswith("GET /v1/models 503 id=one time=")
    assert line["time"].endswith("Z")


async def test_a_bug_is_one_line_with_its_stack_and_the_request(json_log):
    service = Service(EngineConfig(), ServerSettings(), on_failure=lambda: None)
    service.stats = None  # calling it fails
    transport = httpx.ASGITransport(build_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        await http.get("/metrics", headers={"x-request-id": "find-me"})
    (line,) = [line for line in json_log() if line["level"] == "error"]
    assert line["request_id"] == "find-me"
    assert "TypeError" in line["exception"]


def test_other_libraries_log_in_the_same_form(json_log):
    logging.getLogger("uvicorn.error").warning("no %s", "sockets")
    (line,) = json_log()
    assert (line["logger"], line["message"]) == ("uvicorn.error", "no sockets")


async def test_throughput_is_logged_while_there_is_work(json_log):
    idle = EngineStats(num_pages=10)
    busy = EngineStats(
        num_running=2,
        num_waiting=1,
        num_pages=10,
        num_pages_in_use=5,
        steps_total=7,
        prompt_tokens_total=300,
        generation_tokens_total=30,
        prefix_cache_queries_total=100,
        prefix_cache_hits_total=25,
    )
    done = EngineStats(**{name: getattr(busy, name) for name in busy.__struct_fields__ if name.endswith("_total")})
    snapshots = iter([idle, idle, busy, done, done, done])
    task = asyncio.create_task(log_throughput(lambda: next(snapshots), period=0.02))
    with pytest.raises(RuntimeError):  # the snapshots have come to an end
        await task
    (line,) = json_log()
    assert (line["running"], line["waiting"], line["kv_cache_usage_percent"], line["prefix_cache_hit_percent"]) == (
        *(2, 1, 50.0, 25.0),
    )
    assert line["prompt_tokens_per_second"] == pytest.approx(10 * line["generation_tokens_per_second"], rel=0.01)
    assert "Running: 2 reqs, Waiting: 1 reqs, KV cache usage: 50.0%, Prefix cache hit rate: 25.0%" in line["message"]
