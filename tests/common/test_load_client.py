"""common/load_client.py against a real server on a loopback port that sends scripted replies, good and bad.

The script is named by the chat's message, else by the model, else it is "ok".
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from common.load_client import LoadConfig, SseParser, main, run_load
from common.load_report import LoadReport, RequestError, RequestResult, aggregate
from common.workloads import WorkloadRequest


@dataclass
class Seen:
    """What the server saw since the test began, and how many requests the script "meet" waits for."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    client_ports: set[int] = field(default_factory=set)
    in_flight: int = 0
    peak_in_flight: int = 0
    num_played: int = 0
    num_abandoned: int = 0
    meet_at: int = 0


@dataclass
class Server:
    url: str
    seen: Seen

    def run(self, *requests: WorkloadRequest, model: str = "ok", **config: Any) -> LoadReport:
        return asyncio.run(run_load(LoadConfig(self.url, model, **config), requests))

    def run_one(self, script: str, **config: Any) -> RequestResult:
        (result,) = self.run(chat(script), **config).results
        return result


def chat(script: str, **fields: Any) -> WorkloadRequest:
    message = {"role": "user", "content": script}
    return WorkloadRequest(**{"request_id": script, "arrival_s": 0.0, "max_tokens": 4, "messages": [message], **fields})


def tokens(max_tokens: int, **fields: Any) -> WorkloadRequest:
    return WorkloadRequest("tokens", 0.0, max_tokens, prompt_token_ids=[5, 6, 7], **fields)


def event(payload: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(payload)}\n\n".encode()


def chunk(body: dict[str, Any], text: str, finish_reason: str | None = None) -> bytes:
    content = {"delta": {"content": text}} if "messages" in body else {"text": text}
    return event({"choices": [{"index": 0, **content, "finish_reason": finish_reason}]})


def ending(body: dict[str, Any], output_tokens: int, text: str = "") -> list[bytes]:
    usage = {"prompt_tokens": 3, "completion_tokens": output_tokens, "total_tokens": 3 + output_tokens}
    return [chunk(body, text, "length"), event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


def words(body: dict[str, Any]) -> list[bytes]:
    return [chunk(body, f"w{i} ") for i in range(body["max_tokens"])]


def odd_but_legal(body: dict[str, Any]) -> list[bytes]:
    """Comments, CRLF, an event of two data lines, a raw U+2028, no space after a colon; sent byte by byte."""
    two_lines = b'data: {"choices": [{"delta": {"content": "a"},\r\ndata: "finish_reason": null}]}\r\n\r\n'
    separator = 'data:{"choices": [{"delta": {"content": "\u2028"}}]}\r\n\r\n'.encode()
    stream = b": ping\r\n\r\nid: 7\r\nretry: 10\r\n" + two_lines + b": ping\r\n" + separator + b"".join(ending(body, 2))
    return [stream[i : i + 1] for i in range(len(stream))]


def script_of(name: str, body: dict[str, Any]) -> list[bytes]:
    """The chunks of a reply that needs no waiting."""
    first = chunk(body, "first")
    error = {"message": "the engine died", "type": "server_error", "code": 500}
    scripts = {
        "ok": lambda: [chunk(body, ""), *words(body), *ending(body, body["max_tokens"])],
        "pairs": lambda: [*words(body), *ending(body, 2 * body["max_tokens"])],
        "no text": lambda: [chunk(body, ""), *ending(body, 4)],
        "odd": lambda: odd_but_legal(body),
        "error in data": lambda: [first, event({"error": error})],
        "error event": lambda: [first, b"event: error\ndata: out of memory\n\n"],
        "json error event": lambda: [first, b'event: error\ndata: {"message": "out of blocks", "code": 507}\n\n'],
        "no usage": lambda: [first, chunk(body, "", "stop"), b"data: [DONE]\n\n"],
        "no done": lambda: [first, *ending(body, 1)[:-1]],
        "not json": lambda: [first, b"data: {oops\n\n"],
        "no choices": lambda: [first, event({"object": "chunk"})],
    }
    return scripts[name]()


SCRIPTS_THAT_WAIT = {"cut", "silent", "endless", "meet"}


async def play(name: str, body: dict[str, Any], seen: Seen) -> AsyncIterator[bytes]:
    if name == "cut":
        yield chunk(body, "first")
        await asyncio.sleep(0.05)  # so that the chunk is on its way before the connection is cut
        raise RuntimeError("scripted: uvicorn closes the connection in the middle of the body")
    if name == "silent":
        await asyncio.sleep(5)
    if name == "endless":
        for _ in range(1000):
            yield chunk(body, "more ")
            await asyncio.sleep(0.005)
    if name == "meet":
        for _ in range(500):
            if seen.peak_in_flight >= seen.meet_at:
                break
            await asyncio.sleep(0.01)
        else:
            yield event({"error": {"message": f"{seen.peak_in_flight} requests came, not {seen.meet_at}"}})
        await asyncio.sleep(0.05)  # time for one request too many to be seen
        name = "ok"
    for piece in script_of("ok" if name in SCRIPTS_THAT_WAIT else name, body):
        yield piece


async def counted(name: str, body: dict[str, Any], seen: Seen) -> AsyncIterator[bytes]:
    seen.in_flight += 1
    seen.peak_in_flight = max(seen.peak_in_flight, seen.in_flight)
    finished = False
    try:
        async for piece in play(name, body, seen):
            yield piece
        finished = True
    finally:
        seen.in_flight -= 1
        seen.num_played += finished
        seen.num_abandoned += not finished


def create_app(seen: Seen) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        body = await request.json()
        seen.bodies.append(body)
        seen.paths.append(request.url.path)
        seen.authorizations.append(request.headers.get("authorization"))
        assert request.client is not None
        seen.client_ports.add(request.client.port)
        name = body["messages"][-1]["content"] if "messages" in body else body["model"]
        if "busy" in (name, body["model"]):
            return JSONResponse({"error": {"message": "the queue is full", "code": "queue_full"}}, 429)
        if name == "broken":
            return Response("<html>bad gateway</html>", 502)
        name = "ok" if name.endswith("?") else name  # the questions of short_chat
        return StreamingResponse(counted(name, body, seen), media_type="text/event-stream")

    return app


@pytest.fixture(scope="session")
def running_server() -> Iterator[Server]:
    seen = Seen()
    # The protocol is named because asyncio switches Nagle's algorithm off (it costs 40 ms a reply) only where it is.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(seen), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the scripted server did not start")
    yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", seen)
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture
def server(running_server: Server) -> Server:
    wait_until(lambda: running_server.seen.in_flight == 0, "a reply of the test before is still being sent")
    for name, value in vars(Seen()).items():
        setattr(running_server.seen, name, value)
    return running_server


def wait_until(condition: Any, message: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, message
        time.sleep(0.005)


def test_a_chat_is_measured(server: Server) -> None:
    result = server.run_one("ok")
    assert result.error is None, f"the request failed: {result.error}"
    assert (result.text, result.finish_reason) == ("w0 w1 w2 w3 ", "length")
    assert (result.prompt_tokens, result.output_tokens) == (3, 4)
    assert len(result.content_times_s) == 4, "the opening chunk without content must not count, each word must"
    assert result.content_times_s == sorted(result.content_times_s)
    assert result.ttft_s == result.content_times_s[0] and len(result.itl_s) == 3
    assert result.e2e_s is not None and 0 < result.ttft_s < result.e2e_s
    assert result.tpot_s == pytest.approx((result.e2e_s - result.ttft_s) / 3)


def test_what_is_sent_for_a_chat(server: Server) -> None:
    server.run(chat("ok", seed=0, temperature=0.5), api_key="secret")
    assert server.seen.paths == ["/v1/chat/completions"]
    assert server.seen.authorizations == ["Bearer secret"]
    assert server.seen.bodies == [
        {
            "model": "ok",
            "messages": [{"role": "user", "content": "ok"}],
            "max_tokens": 4,
            "temperature": 0.5,
            "seed": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_what_is_sent_for_token_ids(server: Server) -> None:
    report = server.run(tokens(5, ignore_eos=True))
    assert report.num_completed == 1, f"the request failed: {report.results[0].error}"
    assert server.seen.paths == ["/v1/completions"]
    assert server.seen.authorizations == [None]
    (body,) = server.seen.bodies
    assert (body["prompt"], body["ignore_eos"], "messages" in body) == ([5, 6, 7], True, False)
    assert report.results[0].text == "w0 w1 w2 w3 w4 "


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_a_base_url_may_end_in_v1(server: Server, ending: str) -> None:
    report = asyncio.run(run_load(LoadConfig(server.url + ending, "ok"), [chat("ok")]))
    assert report.num_completed == 1, f"base_url ending in {ending!r}: {report.results[0].error}"


def test_output_tokens_are_the_servers_count_not_the_chunks(server: Server) -> None:
    result = server.run_one("pairs")
    assert (result.output_tokens, len(result.content_times_s)) == (8, 4)
    assert result.e2e_s is not None and result.ttft_s is not None
    assert result.tpot_s == pytest.approx((result.e2e_s - result.ttft_s) / 7), "TPOT divides by tokens, not by chunks"


def test_a_reply_without_text_has_the_time_of_its_end(server: Server) -> None:
    result = server.run_one("no text")
    assert result.error is None and result.text == ""
    assert len(result.content_times_s) == 1, "4 tokens without text: TTFT is the time of the finishing chunk"


def test_odd_but_legal_server_sent_events(server: Server) -> None:
    result = server.run_one("odd")
    assert result.error is None, f"the request failed: {result.error}"
    assert (result.text, result.output_tokens) == ("a\u2028", 2)


@pytest.mark.parametrize(
    ("script", "status", "message"),
    [
        ("busy", 429, "the queue is full"),
        ("broken", 502, "<html>bad gateway</html>"),
        ("error in data", 500, "the engine died"),
        ("error event", None, "out of memory"),
        ("json error event", 507, "out of blocks"),
        ("cut", None, "RemoteProtocolError: peer closed connection"),
        ("no done", None, "the stream ended before [DONE]"),
        ("no usage", None, "the stream has no usage"),
        ("not json", None, "not a completion chunk (JSONDecodeError"),
        ("no choices", None, "not a completion chunk (KeyError: 'choices')"),
    ],
)
def test_a_failure_becomes_the_requests_error(server: Server, script: str, status: int | None, message: str) -> None:
    result = server.run_one(script)
    assert result.error is not None, f"script {script!r} must fail the request"
    assert result.error.status == status
    assert result.error.message.startswith(message)
    assert not result.completed and result.e2e_s is None
    expected_text = "" if script in ("busy", "broken") else "first"
    assert result.text == expected_text, "the text before the error is kept"


def test_a_silent_server_is_a_read_timeout(server: Server) -> None:
    result = server.run_one("silent", read_timeout_s=0.2)
    assert result.error == RequestError(None, "no data for longer than read_timeout_s=0.2")


def test_an_endless_reply_is_a_request_timeout(server: Server) -> None:
    result = server.run_one("endless", request_timeout_s=0.3)
    assert result.error == RequestError(None, "no complete reply within request_timeout_s=0.3")
    wait_until(lambda: server.seen.num_abandoned == 1, "the connection stayed open after the timeout")


def test_no_server_is_an_error_of_the_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    report = asyncio.run(run_load(LoadConfig(f"http://127.0.0.1:{port}", "ok"), [chat("ok"), chat("ok")]))
    assert report.num_failed == 2
    assert report.results[0].error is not None and "ConnectError" in report.results[0].error.message


def test_a_proxy_in_the_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "")
    assert server.run_one("ok").error is None, "the request went to the proxy, which would be measured with the server"


def test_one_failure_leaves_the_other_requests_alone(server: Server) -> None:
    scripts = ["ok", "busy", "cut", "error in data", "ok"]
    report = server.run(*map(chat, scripts))
    assert (report.num_completed, report.num_failed, report.num_cancelled) == (2, 3, 0)
    assert [result.request_id for result in report.results] == scripts, "results come in the order of the requests"
    assert [result.completed for result in report.results] == [True, False, False, False, True]
    assert (report.prompt_tokens, report.output_tokens) == (6, 8), "tokens of failed requests must not count"
    assert report.ttft_s is not None and report.ttft_s.count == 2, "failed requests must not enter the summaries"
    assert report.itl_s is not None and report.itl_s.count == 6


@pytest.mark.parametrize("chunks", [0, 3])
def test_a_client_that_disconnects(server: Server, chunks: int) -> None:
    report = server.run(chat("endless", cancel_after_chunks=chunks), chat("ok"))
    cancelled = report.results[0]
    assert cancelled.cancelled and cancelled.error is None
    assert len(cancelled.content_times_s) == chunks
    assert (report.num_completed, report.num_failed, report.num_cancelled) == (1, 0, 1)
    wait_until(lambda: server.seen.num_abandoned == 1, "the server did not see the client disconnect")


def test_a_client_that_wanted_more_chunks_than_came_has_completed(server: Server) -> None:
    report = server.run(chat("ok", cancel_after_chunks=99))
    assert (report.num_completed, report.num_cancelled) == (1, 0)


def test_a_finished_reply_is_read_to_its_end(server: Server) -> None:
    report = server.run(chat("ok"), chat("ok"), chat("ok"), max_concurrency=1)
    assert report.num_completed == 3
    assert (server.seen.num_played, server.seen.num_abandoned) == (3, 0), "leaving at [DONE] looks like a disconnect"
    assert len(server.seen.client_ports) == 1, "one request at a time needs one connection"


def test_a_closed_loop_keeps_max_concurrency_in_flight(server: Server) -> None:
    server.seen.meet_at = 3
    report = server.run(*[chat("meet", arrival_s=1000.0)] * 9, max_concurrency=3)
    assert report.num_completed == 9, f"errors: {[result.error for result in report.results]}"
    assert server.seen.peak_in_flight == 3, f"expected 3 in flight, got {server.seen.peak_in_flight}"


def test_an_open_loop_sends_without_waiting(server: Server) -> None:
    server.seen.meet_at = 120  # more than the 100 connections that httpx allows by default
    report = server.run(*[chat("meet")] * 120)
    assert report.num_completed == 120, f"first errors: {[r.error for r in report.results if r.error][:2]}"


def test_an_open_loop_sends_at_the_arrival_times(server: Server) -> None:
    arrivals = [0.2, 0.0, 0.1]
    report = server.run(*[chat("ok", arrival_s=at_s, request_id=str(at_s)) for at_s in arrivals])
    for at_s, result in zip(arrivals, report.results, strict=True):
        assert result.start_s >= at_s - 0.001, f"request of {at_s} s was sent at {result.start_s:.4f} s"
        assert result.request_id == str(at_s)
    assert report.duration_s >= 0.2


def result_of(content_times_s: list[float], e2e_s: float, output_tokens: int) -> RequestResult:
    return RequestResult("r", 0.0, content_times_s, e2e_s, prompt_tokens=10, output_tokens=output_tokens)


def test_aggregate_of_known_results() -> None:
    failed = RequestResult("f", 0.0, [0.1], prompt_tokens=99, output_tokens=99, error=RequestError(500, "x"))
    gone = RequestResult("g", 0.0, [0.1, 0.2], cancelled=True)
    results = [result_of([0.1, 0.2, 0.4], 0.5, 5), result_of([0.3], 0.3, 1), failed, gone]
    report = aggregate(results, duration_s=2.0)
    assert (report.num_completed, report.num_failed, report.num_cancelled) == (2, 1, 1)
    assert (report.prompt_tokens, report.output_tokens) == (20, 6)
    assert (report.requests_per_s, report.output_tokens_per_s, report.total_tokens_per_s) == (1.0, 3.0, 13.0)
    assert report.ttft_s is not None and (report.ttft_s.min, report.ttft_s.max) == (0.1, 0.3)
    assert report.itl_s is not None and report.itl_s.count == 2 and report.itl_s.mean == pytest.approx(0.15)
    assert report.tpot_s is not None and report.tpot_s.count == 1 and report.tpot_s.mean == pytest.approx(0.1)
    assert report.e2e_s is not None and report.e2e_s.mean == pytest.approx(0.4)
    assert report.goodput_requests_per_s is None, "without SLOs there is no goodput"


@pytest.mark.parametrize(
    ("ttft_slo_s", "tpot_slo_s", "expected"),
    [(0.1, None, 0.5), (0.3, None, 1.0), (0.05, None, 0.0), (None, 0.05, 0.5), (0.2, 0.2, 0.5), (0.2, 0.05, 0.0)],
)
def test_goodput(ttft_slo_s: float | None, tpot_slo_s: float | None, expected: float) -> None:
    results = [result_of([0.1, 0.2], 0.5, 5), result_of([0.3], 0.3, 1)]  # TTFT 0.1, TPOT 0.1; TTFT 0.3, no TPOT
    report = aggregate(results, duration_s=2.0, ttft_slo_s=ttft_slo_s, tpot_slo_s=tpot_slo_s)
    assert report.goodput_requests_per_s == expected


def test_measurements_are_plain_values_without_texts(server: Server) -> None:
    measurements = server.run(chat("ok")).measurements()
    json.dumps(measurements, allow_nan=False)
    assert measurements["ttft_s"]["count"] == 1
    assert "results" not in measurements, "the replies' texts do not belong in a result file"


def test_a_run_in_which_all_fail_still_reports(server: Server) -> None:
    report = server.run(chat("busy"), chat("broken"))
    assert (report.num_completed, report.num_failed, report.output_tokens_per_s) == (0, 2, 0.0)
    assert report.ttft_s is None and report.e2e_s is None


def test_zero_concurrency_is_refused() -> None:
    with pytest.raises(ValueError, match="max_concurrency=0"):
        LoadConfig("http://127.0.0.1:1", "ok", max_concurrency=0)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_sse_may_be_cut_anywhere(newline: bytes) -> None:
    lines = ["event: error", "data: c", "", ": comment", "", "id: 1", "", "data: ä", "data:", "data:  b", "", "data: d"]
    stream = newline.join(line.encode() for line in lines) + newline
    expected = [("error", "c"), ("message", "ä\n\n b")]
    for cut in range(1, len(stream)):
        parser = SseParser()
        events = parser.feed(stream[:cut]) + parser.feed(stream[cut:])
        assert events == expected, f"cut after {stream[:cut]!r}: expected {expected}, got {events}"
    parser = SseParser()
    assert [e for byte in stream for e in parser.feed(bytes([byte]))] == expected, "byte by byte"


def test_command_line_prints_a_table(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base-url", server.url, "--model", "ok", "--num-requests", "5", "--max-concurrency", "2"]
    assert main([*arguments, "--ttft-slo-s", "60", "--workload", "short_chat"]) == 0
    printed = capsys.readouterr().out
    for expected in ("5 completed, 0 failed, 0 cancelled", "320 output", "goodput", "TTFT", "ITL", "TPOT", "E2E"):
        assert expected in printed, f"{expected!r} is not in the report:\n{printed}"


def test_command_line_reports_failures(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", server.url, "--model", "busy", "--num-requests", "3"]) == 1
    assert "3 × 429: the queue is full" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "100"], "'short_chat' has no option vocab_size"),
        (["--max-concurrency", "0"], "max_concurrency=0 must be at least 1"),
        (["--max-concurrency", "2", "--request-rate", "1"], "give only one of them"),
    ],
)
def test_command_line_refuses(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--base-url", "http://127.0.0.1:1", "--model", "ok", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err
