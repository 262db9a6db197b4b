"""OpenTelemetry spans, sent to a collector that is here."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from jax_engine.config import EngineConfig
from jax_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jax_engine.sampling_params import SamplingParams
from jax_engine.server.app import build_app
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings
from jax_engine.server.tracking import PromptTracker

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector():
    """(its URL, the spans that it was sent)."""
    spans = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(span for one in sent.resource_spans for scope in one.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


async def test_a_request_is_a_span_within_its_clients_trace(collector):
    url, spans = collector
    service = Service(EngineConfig(), ServerSettings(otlp_traces_endpoint=url), on_failure=lambda: None)
    app = build_app(service)

    async def respond(scope, receive, send):
        """As much of a request to the engine as its record sees."""
        record = scope["state"]["record"]
        tracker = PromptTracker(service.metrics, SamplingParams(max_tokens=9, temperature=0.5, top_p=0.9))
        now = time.monotonic()
        times = RequestMetrics(
            arrival_time=now - 4.0, first_scheduled_time=now - 3.0, first_token_time=now - 1.0, last_token_time=now
        )
        completion = CompletionOutput(index=0, text="a b", token_ids=[1, 2], finish_reason="stop")
        tracker.take(RequestOutput("r", "p", [1, 2, 3], [completion], finished=True, metrics=times))
        record.trackers = [tracker]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    app.mount("/answer", respond)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        parent = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "x-request-id": "one"}
        assert (await http.get("/answer/now", headers=parent)).status_code == 200
        assert (await http.get("/version")).status_code == 200  # is no request to the engine
    await service.end()
    (span,) = spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE_ID, PARENT_ID)
    found = {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}
    latencies = {name: found.pop(name) for name in tuple(found) if name.startswith("gen_ai.latency.")}
    assert found == {
        "gen_ai.response.model": "demo",
        "gen_ai.request.id": "one",
        "gen_ai.request.n": 1,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.usage.num_sequences": 1,
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 2,
        "http.response.status_code": 200,
    }
    assert {
        name: round(latencies[f"gen_ai.latency.{name}"], 3) for name in ("time_in_queue", "time_in_model_decode")
    } == {
        "time_in_queue": 1.0,
        "time_in_model_decode": 1.0,
    }
    assert latencies["gen_ai.latency.time_in_model_prefill"] == pytest.approx(2.0)
    assert latencies["gen_ai.latency.time_in_model_inference"] == pytest.approx(3.0)
    assert "gen_ai.latency.e2e" in latencies
    assert "gen_ai.latency.time_to_first_token" in latencies


def test_without_the_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    settings = ServerSettings(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    with pytest.raises(ValueError, match=r"pip install 'jax-engine\[otel\]'"):
        Service(EngineConfig(), settings, on_failure=lambda: None)


def test_an_endpoint_of_another_protocol_is_refused():
    with pytest.raises(ValueError, match="OTLP over HTTP"):
        ServerSettings(otlp_traces_endpoint="grpc://localhost:4317")
