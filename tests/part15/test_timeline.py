"""A request's timeline, and its readers: metrics, the log, OpenTelemetry spans, /ready."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.server
import json
import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.types import Receive, Scope, Send

from common.errors import FieldError
from common.outputs import CompletionOutput
from part15_full_architecture.api.observability import ObservabilityConfig
from part15_full_architecture.api.request_log import JsonFormatter, log_request
from part15_full_architecture.api.request_metrics import RequestMetrics
from part15_full_architecture.api.timeline import HttpExchange, NoteTimes, RequestTimeline, current_exchange
from part15_full_architecture.messages import EngineCoreEvent
from tests.contract.engines import SmallEngine, SmallModels
from tests.forked_servers import ForkedServer, Host, until
from tests.http_checks import COMPLETIONS
from tests.process_checks import TIMEOUT_S

PART = "part15_full_architecture"
LOOK = "See api/timeline.py::RequestTimeline"
LOOK_SPANS = "See api/otel.py::SpanExporter"
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> SmallModels:
    return SmallModels(tmp_path_factory.mktemp("models"))


def a_timeline(**fields: Any) -> RequestTimeline:
    events = [EngineCoreEvent("queued", 10.3), EngineCoreEvent("scheduled", 10.7), EngineCoreEvent("preempted", 11.0)]
    events.append(EngineCoreEvent("scheduled", 11.5))
    timeline = RequestTimeline("7", HttpExchange(10.0, "abc"), 5, submitted_s=10.2, events=events)
    timeline.note(CompletionOutput(0, "a", [1], None, None), 12.0)
    timeline.note(CompletionOutput(0, "bc", [2, 3], "length", None), 14.0)
    for name, value in fields.items():
        setattr(timeline, name, value)
    return timeline


def test_stages_of_a_request() -> None:
    timeline = a_timeline()
    wanted = {"tokenize": (10.0, 10.2), "queue": (10.3, 10.7), "prefill": (10.7, 12.0), "decode": (12.0, 14.0)}
    found = timeline.stages()
    for stage, expected in wanted.items():
        got = found.get(stage)
        assert got == expected, (
            f"{timeline.events}, received at 10, submitted at 10.2, tokens at 12 and 14: "
            f"expected {stage} from {expected[0]} to {expected[1]}, got {got}. {LOOK}.stages"
        )
    assert list(found) == list(wanted), f"expected the stages {list(wanted)}, got {list(found)}. {LOOK}.stages"
    assert timeline.ttft_s == 2.0, f"from arrival to the first token: expected 2, got {timeline.ttft_s}. {LOOK}.ttft_s"


@pytest.mark.parametrize(("num_events", "stages"), [(0, ["tokenize"]), (1, ["tokenize"]), (2, ["tokenize", "queue"])])
def test_a_request_has_only_the_stages_that_it_has_completed(num_events: int, stages: list[str]) -> None:
    events = [EngineCoreEvent("queued", 10.3), EngineCoreEvent("scheduled", 10.7)][:num_events]
    timeline = RequestTimeline("7", HttpExchange(10.0), 5, 10.2, events)
    found = list(timeline.stages())
    assert found == stages, f"{num_events} events and no token: expected {stages}, got {found}. {LOOK}.stages"
    assert timeline.seconds_in("decode") is None and timeline.ttft_s is None


def test_counts_of_a_request() -> None:
    timeline = a_timeline()
    counts = (timeline.num_output_tokens, timeline.num_preemptions, timeline.finish_reason)
    assert counts == (3, 1, "length"), f"got {counts}. {LOOK}"


def test_metrics_count_the_stages_that_a_request_has_reached() -> None:
    metrics = RequestMetrics()
    metrics.observe(a_timeline())
    metrics.observe(RequestTimeline("8", HttpExchange(0.0), 1, 0.0, [EngineCoreEvent("queued", 0.0)], error="aborted"))
    counts = {
        sample.name.removeprefix("engine:request_").removesuffix("_time_seconds_count"): sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name.endswith("_count")
    }
    assert counts == {"queue": 1, "prefill": 1, "decode": 1}, f"got {counts}. See api/request_metrics.py"


@pytest.mark.parametrize(("error", "level"), [(None, "INFO"), ("aborted", "INFO"), ("ValueError: no", "ERROR")])
def test_a_line_for_each_request(error: str | None, level: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_request(a_timeline(error=error))
    [record] = caplog.records
    entry = json.loads(JsonFormatter().format(record))
    wanted = {
        "level": level, "request_id": "abc", "end": error or "length", "prompt_tokens": 5, "output_tokens": 3,
        "preemptions": 1, "queue_ms": 400.0, "prefill_ms": 1300.0, "decode_ms": 2000.0, "ttft_ms": 2000.0,
    }  # fmt: skip
    assert entry == {**entry, **wanted}, f"expected {wanted}, got {entry}. See api/request_log.py::log_request"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"]), entry["time"]


@pytest.mark.parametrize(
    ("given", "expected"), [(b"abc", "abc"), (b"\x1b[31mred", None), (b"caf\xe9", None), (b"a" * 5_000, "a" * 128)]
)
def test_the_request_id_is_the_one_in_the_answers_id(given: bytes, expected: str | None) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert current_exchange().request_id == expected, f"got {current_exchange()}. See api/timeline.py::NoteTimes"

    scope = {"type": "http", "headers": [(b"x-request-id", given)]}
    asyncio.run(NoteTimes(app)(scope, None, None))  # type: ignore[arg-type]


def test_a_request_id_adds_no_fields_to_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    timeline = a_timeline()
    timeline.http.request_id = "a, end stop"
    log_request(timeline)
    assert caplog.messages[0].startswith('request_id "a, end stop", end length'), caplog.messages[0]


def test_events_of_a_request_that_is_preempted(models: SmallModels) -> None:
    engine = SmallEngine(PART, models, num_kv_blocks=12, async_scheduling=False)
    events: dict[str, list[EngineCoreEvent]] = {name: [] for name in "ab"}
    for number, name in enumerate(events):
        engine.add(name, [5 + number] * 9, max_tokens=20)
    while engine.core.has_unfinished_requests:
        for output in engine.step():
            events[output.request_id] += output.events
    kinds = {name: [event.kind for event in found] for name, found in events.items()}
    assert kinds["a"] == ["queued", "scheduled"], f"got {kinds}. {LOOK}"
    assert kinds["b"] == ["queued", "scheduled", "preempted", "scheduled"], f"got {kinds}. {LOOK}"
    for found in events.values():
        times = [event.at_s for event in found]
        assert times == sorted(times), f"expected times in order, got {found}"


class Collector(http.server.BaseHTTPRequestHandler):
    """An OpenTelemetry collector."""

    spans: list[Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        request = ExportTraceServiceRequest.FromString(body)
        self.spans += [
            span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def collecting() -> Iterator[tuple[str, list[Any]]]:
    spans: list[Any] = []
    handler = type("Handler", (Collector,), {"spans": spans})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        finally:
            server.shutdown()
            thread.join(TIMEOUT_S)


def log_of(server: ForkedServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.stderr.read_text().splitlines()]


def test_a_server_logs_and_traces_its_requests(host: Host) -> None:
    with collecting() as (endpoint, spans):
        server = host.serve(
            PART, "--enable-log-requests", "--log-format", "json", "--otlp-traces-endpoint", endpoint,
            "--max-num-seqs", "1", "--max-queued-requests", "0", step_s=0.02,
        )  # fmt: skip
        headers = {"X-Request-Id": "abc", "traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
        body = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
        assert server.post(COMPLETIONS, body, headers).status_code == 200
        assert server.post(COMPLETIONS, {"prompt": [5], "max_tokens": -1}).status_code == 400
        with server.stream(COMPLETIONS, {**body, "max_tokens": 1000, "stream": True}) as response:
            chunks = response.iter_text()  # which must be kept: without it, the response is closed
            first = next(chunks)
            assert response.status_code == 200 and "data: " in first, f"{response.status_code}, {first}"
            ready = server.get("/ready")
            assert ready.status_code == 503 and "1 requests are unfinished" in ready.text, (
                f"got {ready.text} after {first!r}; {log_of(server)}"
            )
        until(lambda: len(log_of(server)) == 2, "a line for each request that was queued")
        until(lambda: server.get("/ready").status_code == 200, "to be ready again")
        finished, aborted = log_of(server)
        assert (finished["request_id"], finished["end"], finished["output_tokens"]) == ("abc", "length", 4), finished
        assert aborted["end"] == "aborted" and aborted["output_tokens"] > 0, aborted
        assert "engine:request_queue_time_seconds_count 2" in server.get("/metrics").text
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait() == 0, f"{server.stderr.read_text()}. {LOOK_SPANS}"  # with what was left to send
    check_spans(spans)


def check_spans(spans: list[Any]) -> None:
    of_client = [span for span in spans if span.trace_id.hex() == TRACE_ID]
    [root] = [span for span in of_client if span.name == "llm_request"]
    assert root.parent_span_id.hex() == PARENT_ID, f"expected the client's span as parent. {LOOK_SPANS}"
    stages = {span.name: span for span in of_client if span.parent_span_id == root.span_id}
    assert list(stages) == ["tokenize", "queue", "prefill", "decode"], f"got {list(stages)}. {LOOK_SPANS}"
    for span in stages.values():
        inside = root.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert inside and span.end_time_unix_nano <= root.end_time_unix_nano, f"{span}: outside its request"
    values = {each.key: each.value for each in root.attributes}
    assert values["gen_ai.usage.completion_tokens"].int_value == 4, f"got {values}. {LOOK_SPANS}"
    assert values["gen_ai.request.id"].string_value == "abc", f"got {values}. {LOOK_SPANS}"
    [other] = [span for span in spans if span.name == "llm_request" and span.trace_id.hex() != TRACE_ID]
    assert other.status.message == "aborted", f"got {other.status}. {LOOK_SPANS}"


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "https://[::1", "http://a b:4318", "http://a:99999"],
)
def test_an_endpoint_that_is_no_url(endpoint: str) -> None:
    with pytest.raises(FieldError, match="otlp_traces_endpoint: expected http://host:port/v1/traces, got"):
        ObservabilityConfig(otlp_traces_endpoint=endpoint)


def test_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FieldError, match="otlp_traces_endpoint: needs OpenTelemetry: pip install"):
        ObservabilityConfig(otlp_traces_endpoint="http://127.0.0.1:4318/v1/traces")
