"""OpenTelemetry traces: a span a request, with the attributes that vLLM sends, to a collector over HTTP.

The packages are those of the extra `otel`, and are imported only when traces are asked for.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jax_engine.sampling_params import SamplingParams
from jax_engine.server.settings import ServerSettings
from jax_engine.server.tracking import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SPAN = "llm_request"
TRACE_HEADERS = ("traceparent", "tracestate")
FLUSH_MILLISECONDS = 3000  # that a server waits at its end for the last spans to be taken


class Tracer:
    """Sends spans in the background. Mutable; owned by the `Service`."""

    def __init__(self, settings: ServerSettings) -> None:
        """ValueError when the packages are missing."""
        check_tracing(settings)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model = settings.model_name
        self._context_of = TraceContextTextMapPropagator().extract
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before this name, as everywhere.
        resource = Resource({"service.name": "jax-engine"}).merge(Resource.create())
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.otlp_traces_endpoint)))
        self._tracer = self._provider.get_tracer("jax_engine")

    def begin(self, headers: Mapping[bytes, bytes]) -> "Span":
        """The span of a request that has come, within the trace that its `traceparent` names."""
        from opentelemetry.trace import SpanKind

        carrier = {name: headers[name.encode()].decode("latin-1") for name in TRACE_HEADERS if name.encode() in headers}
        return self._tracer.start_span(SPAN, context=self._context_of(carrier), kind=SpanKind.SERVER)

    def end(self, span: "Span", record: RequestRecord, status: int | None) -> None:
        """Send a span if the request was one to the engine: of probes nothing is told."""
        from opentelemetry.trace import Status, StatusCode

        if not record.trackers:
            return
        span.set_attributes(attributes(record, self._model))
        if status is not None:
            span.set_attribute("http.response.status_code", status)
        if record.note is not None:
            span.set_status(Status(StatusCode.ERROR, record.note))
        span.end()

    def shutdown(self) -> None:
        """Send what is left; blocks while it does."""
        self._provider.force_flush(FLUSH_MILLISECONDS)
        self._provider.shutdown()


def check_tracing(settings: ServerSettings) -> None:
    """ValueError when traces are asked for and the packages are missing."""
    try:
        if settings.otlp_traces_endpoint is not None:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter
            import opentelemetry.sdk.trace  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"otlp_traces_endpoint={settings.otlp_traces_endpoint!r} needs packages that are not installed; "
            "pip install 'jax-engine[otel]' installs them"
        ) from error


def make_tracer(settings: ServerSettings) -> Tracer | None:
    """What sends traces, or None if they are not asked for."""
    return None if settings.otlp_traces_endpoint is None else Tracer(settings)


def attributes(record: RequestRecord, model: str) -> dict[str, Any]:
    """What a span says of a request; latencies in seconds, of several prompts the longest."""
    usage, params = record.usage(), record.trackers[0].params
    firsts = [tracker.first_token_time for tracker in record.trackers if tracker.first_token_time is not None]
    found: dict[str, Any] = {
        "gen_ai.response.model": model if record.adapter is None else record.adapter.lora_name,
        "gen_ai.request.id": record.request_id,
        "gen_ai.request.n": params.n,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.usage.num_sequences": params.n * len(record.trackers),
        "gen_ai.usage.prompt_tokens": usage["prompt_tokens"],
        "gen_ai.usage.completion_tokens": usage["completion_tokens"],
        "gen_ai.latency.e2e": time.monotonic() - record.started,
        "gen_ai.latency.time_to_first_token": min(firsts) - record.started if firsts else None,
    }
    if isinstance(params, SamplingParams):
        found |= {"gen_ai.request.temperature": params.temperature, "gen_ai.request.top_p": params.top_p}
    for tracker in record.trackers:
        for name, seconds in tracker.latencies().items():
            name = f"gen_ai.latency.{name}"
            found[name] = max(seconds, found.get(name, 0.0))
    return {name: value for name, value in found.items() if value is not None}
