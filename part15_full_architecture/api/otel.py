"""Requests as OpenTelemetry spans, which continue the client's trace.

A span for the request, with vLLM's name and attributes, and under it one for each stage: tokenize, queue, prefill,
decode.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .timeline import RequestTimeline

if TYPE_CHECKING:
    from opentelemetry.trace import Span

SERVICE_NAME = "llm-engine"


class SpanExporter:
    """Sends spans to an OTLP endpoint over HTTP, from a thread of its own."""

    def __init__(self, endpoint: str, model: str) -> None:
        from opentelemetry import trace  # here: a server without an endpoint does not need it
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._propagator, self.model = trace, TraceContextTextMapPropagator(), model
        self._provider = TracerProvider(resource=Resource.create({"service.name": SERVICE_NAME}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=5)))
        self._tracer = self._provider.get_tracer(__name__)
        self._zero_ns = time.time_ns() - time.perf_counter_ns()  # spans have the time of day

    def observe(self, timeline: RequestTimeline) -> None:
        """A request has ended. Doesn't wait for the endpoint."""
        carrier = {} if timeline.http.traceparent is None else {"traceparent": timeline.http.traceparent}
        span = self._tracer.start_span(
            "llm_request", self._propagator.extract(carrier), self._trace.SpanKind.SERVER,
            attributes=attributes(timeline, self.model), start_time=self._ns(timeline.http.received_s),
        )  # fmt: skip
        if timeline.error is not None:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, timeline.error))
        for event in timeline.events:
            span.add_event(event.kind, timestamp=self._ns(event.at_s))
        self._add_stages(span, timeline)
        span.end(self._ns(time.perf_counter() if timeline.last_token_s is None else timeline.last_token_s))

    def _add_stages(self, parent: Span, timeline: RequestTimeline) -> None:
        context = self._trace.set_span_in_context(parent)
        for name, (begin_s, end_s) in timeline.stages().items():
            self._tracer.start_span(name, context, start_time=self._ns(begin_s)).end(self._ns(end_s))

    def _ns(self, seconds: float) -> int:
        return self._zero_ns + int(1e9 * seconds)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def attributes(timeline: RequestTimeline, model: str) -> dict[str, str | int | float]:
    """vLLM's attributes of a request."""
    found: dict[str, str | int | float | None] = {
        "gen_ai.request.id": timeline.http.request_id or timeline.request_id,
        "gen_ai.response.model": model,
        "gen_ai.usage.prompt_tokens": timeline.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": timeline.num_output_tokens,
        "gen_ai.latency.time_in_queue": timeline.seconds_in("queue"),
        "gen_ai.latency.time_to_first_token": timeline.ttft_s,
        "gen_ai.latency.time_in_model_prefill": timeline.seconds_in("prefill"),
        "gen_ai.latency.time_in_model_decode": timeline.seconds_in("decode"),
    }
    return {name: value for name, value in found.items() if value is not None}
