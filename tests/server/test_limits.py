"""Limits on who may call, from where and for how long, and what nobody is told."""

import asyncio
import json

import httpx
import pytest

from jax_engine.config import EngineConfig
from jax_engine.server.app import build_app
from jax_engine.server.errors import ApiError
from jax_engine.server.in_flight import ClientGoneError, InFlight
from jax_engine.server.metrics.cells import CellMemory
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings


def client(**settings):
    service = Service(EngineConfig(), ServerSettings(**settings), on_failure=lambda: None)
    return httpx.AsyncClient(transport=httpx.ASGITransport(build_app(service)), base_url="http://test")


PREFLIGHT = {"origin": "https://chat.example.com", "access-control-request-method": "POST"}


async def test_web_pages_may_ask_beforehand_without_a_key_and_read_errors():
    async with client(api_keys=("secret",), allowed_origins=("https://chat.example.com",)) as http:
        allowed = await http.options("/v1/completions", headers=PREFLIGHT)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example.com"
        refused = await http.post("/v1/completions", headers={"origin": "https://chat.example.com"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example.com"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = await http.options("/v1/completions", headers={**PREFLIGHT, "origin": "https://evil.example.com"})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers


async def test_methods_and_headers_of_web_pages_can_be_limited():
    async with client(allowed_methods=("GET",), allowed_headers=("x-request-id",)) as http:
        assert (await http.options("/v1/completions", headers=PREFLIGHT)).status_code == 400
        asking = {**PREFLIGHT, "access-control-request-method": "GET", "access-control-request-headers": "x-request-id"}
        assert (await http.options("/v1/models", headers=asking)).status_code == 200
        asking["access-control-request-headers"] = "x-other"
        assert (await http.options("/v1/models", headers=asking)).status_code == 400


async def test_no_origin_is_allowed_if_none_is_named():
    async with client(allowed_origins=()) as http:
        response = await http.get("/version", headers={"origin": "https://chat.example.com"})
    assert "access-control-allow-origin" not in response.headers


def test_cookies_for_every_origin_are_refused():
    with pytest.raises(ValueError, match="name the origins"):
        ServerSettings(allow_credentials=True)


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_a_prefix_that_a_proxy_keeps_or_takes_off_changes_neither_routes_nor_keys(prefix):
    async with client(root_path="/llm", api_keys=("secret",)) as http:
        assert (await http.get(f"{prefix}/version")).status_code == 200
        assert (await http.get(f"{prefix}/v1/models")).status_code == 401
        document = await http.get(f"{prefix}/openapi.json", headers={"authorization": "Bearer secret"})
        assert document.json()["servers"] == [{"url": "/llm"}]


def test_keys_are_not_in_what_is_printed_of_the_settings():
    settings = ServerSettings(api_keys=("s3cret", "other-s3cret"))
    assert "s3cret" not in f"{settings} {settings!r}"


async def stays():
    """The `receive` of a client that waits."""
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


async def test_a_request_that_takes_too_long_is_ended():
    in_flight = InFlight(CellMemory.alone().take(1), 0.05)
    with pytest.raises(ApiError) as error:
        async with in_flight.track(stays):
            await asyncio.sleep(60)
    assert (error.value.status, error.value.code) == (504, "request_timeout")
    async with in_flight.track(stays):
        pass
    await asyncio.sleep(0.1)  # the clock has stopped: nothing is cancelled that comes after


async def test_a_client_that_leaves_a_request_with_a_limit_has_left():
    async def leaves():
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientGoneError):
        async with InFlight(CellMemory.alone().take(1), 5.0).track(leaves):
            await asyncio.sleep(60)


def test_a_real_server_on_a_unix_socket_ends_requests_that_take_too_long(start_server, tmp_path):
    path = tmp_path / "server.sock"
    options = ("--uds", str(path), "--request-timeout", "1", "--root-path", "/llm", "--log-format", "json")
    server = start_server(*options, ready=False)
    assert server.url == f"unix:{path}"
    long = {"prompt": "Once", "max_tokens": 1900, "n": 16, "ignore_eos": True}  # together far more than a second's work
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://test", timeout=60) as http:
        server.wait_for(lambda: http.get("/health").status_code == 200, what="ready", seconds=240)
        whole = http.post("/v1/completions", json=long)
        assert whole.status_code == 504
        assert whole.json()["error"]["code"] == "request_timeout"
        streamed = http.post("/llm/v1/completions", json={**long, "stream": True})
        *_, error, done = [line for line in streamed.text.splitlines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert done == "data: [DONE]"
        server.wait_for(lambda: "vllm:num_requests_running{" in http.get("/metrics").text, what="metrics")
        idle = 'vllm:num_requests_running{engine="0",model_name="demo"} 0.0'
        server.wait_for(lambda: idle in http.get("/metrics").text, what="aborting them in the engine")
    assert server.stop() == 0
    assert not path.exists()
    # The core's lines and the requests' are of one form; only what native libraries print is not.
    lines = [json.loads(line) for line in server.log().splitlines() if line.startswith("{")]
    assert {"jax_engine.server.gate", "jax_engine.server.serve", "jax_engine.compilation.start_log"} <= {
        line["logger"] for line in lines
    }
    assert [line["status"] for line in lines if line.get("path", "").endswith("/completions")] == [504, 200]
