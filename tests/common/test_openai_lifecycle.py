"""common/openai_app: admission, client disconnects, engine failures, metrics, startup and shutdown."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import FieldError
from common.openai_app import create_app
from common.openai_app.generation import Generation, admit
from common.openai_app.logprobs import TokenTexts
from common.openai_app.metrics import Metrics, RequestTimer
from common.openai_app.protocol import parse_request
from common.openai_app.responses import ResponseWriter
from common.openai_app.streaming import EventStream, collect, stream_events, unless_disconnected
from common.serve import running_app
from common.serving import GenerationError, QueueFullError
from tests.common.openai_fakes import (
    GOOD,
    FakeEngine,
    Server,
    check_error,
    check_error_body,
    delta,
    parse_events,
    serving,
)
from tests.http_checks import (
    CHAT,
    COMPLETIONS,
    DEADLINE_S,
    Watched,
    both_endpoints,
    read_until,
    request_bytes,
    streamed_or_not,
    until,
)


@pytest.fixture
def manual(engine: FakeEngine) -> Iterator[Server]:
    """A server whose engine outputs only what a test puts into its streams."""
    engine.manual = True
    with serving(engine) as server:
        yield server


def metrics_of(server: Server) -> dict[str, float]:
    """All samples but buckets, and but those of the process, which always change. A label's value is in brackets."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if not sample.name.endswith("_bucket")]
    samples = [sample for sample in samples if not sample.name.startswith("process_")]
    return {s.name + "".join(f"[{value}]" for value in s.labels.values()): s.value for s in samples}


# Admission


@both_endpoints
@streamed_or_not
def test_a_full_queue_is_429(manual: Server, path: str, stream: bool) -> None:
    manual.engine.capacity = 1
    with manual.send(path):
        manual.until_streams(1)
        response = manual.post(path, GOOD[path], stream=stream)
        check_error(response, 429, None, "1 requests are waiting", kind="rate_limit_error")
        assert int(response.headers["retry-after"]) > 0
        assert len(manual.engine.streams) == 1


@streamed_or_not
def test_all_choices_are_admitted_or_none(manual: Server, stream: bool) -> None:
    manual.engine.capacity = 5
    response = manual.post(COMPLETIONS, {"prompt": ["a", "b"], "n": 3, "stream": stream})
    check_error(response, 429, None, kind="rate_limit_error")
    assert manual.engine.aborts == [1] * 5, "those that were queued already are aborted, once each"
    assert metrics_of(manual)["engine:prompt_tokens_total"] == 0, "a refused prompt is not counted"


@streamed_or_not
def test_more_choices_than_the_queue_can_hold_are_400(manual: Server, stream: bool) -> None:
    """Retrying later, as 429 suggests, would never help."""
    manual.engine.max_num_unfinished = 5
    for field, body in (("n", {"prompt": ["a", "b"], "n": 3}), ("prompt", {"prompt": ["a"] * 6})):
        response = manual.post(COMPLETIONS, {**body, "stream": stream})
        check_error(response, 400, field, "6 choices, expected at most 5 (max_num_seqs + max_queued_requests)")
    assert not manual.engine.streams, "none of them is queued"
    with manual.send(COMPLETIONS, prompt=["a"] * 5, stream=stream):
        manual.until_streams(5)


@both_endpoints
@streamed_or_not
def test_a_refusal_of_the_engine_is_400(manual: Server, path: str, stream: bool) -> None:
    manual.engine.refusal = FieldError("prompt", "6 blocks needed, the pool has 5")
    field = "messages" if path == CHAT else "prompt"  # the client's name for it
    check_error(manual.post(path, GOOD[path], stream=stream), 400, field, f"{field}: 6 blocks needed, the pool has 5")
    manual.engine.refusal = None
    assert not manual.engine.streams


@both_endpoints
@streamed_or_not
def test_a_dead_engine_is_503(server: Server, path: str, stream: bool) -> None:
    assert server.client.get("/health").json() == {"status": "ok"}
    server.engine.is_alive = False
    check_error(server.post(path, GOOD[path], stream=stream), 503, None, "engine has died", kind="service_unavailable")
    health = server.client.get("/health")
    assert (health.status_code, health.json()) == (503, {"status": "the engine has died"})
    assert server.client.get("/metrics").status_code == server.client.get("/v1/models").status_code == 200
    assert not server.engine.streams


# Client disconnects


@both_endpoints
@streamed_or_not
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_disconnects_in_the_middle(manual: Server, path: str, stream: bool, n: int) -> None:
    with manual.send(path, stream=stream, n=n) as connection:
        streams = manual.until_streams(n)
        streams[0].put(delta("first", [1]))
        if stream:
            read_until(connection, b"first")
    until(lambda: manual.engine.aborts == [1] * n, f"{n} streams to be aborted, got {manual.engine.aborts}")
    manual.until_answered()
    samples = metrics_of(manual)
    assert samples["engine:request_aborted_total"] == n and samples["engine:request_errors_total"] == 0, (
        f"got {samples}"
    )


@both_endpoints
@streamed_or_not
def test_a_client_that_disconnects_before_the_first_token(manual: Server, path: str, stream: bool) -> None:
    with manual.send(path, stream=stream, n=2):
        manual.until_streams(2)
    until(lambda: manual.engine.aborts == [1, 1], f"both streams to be aborted, got {manual.engine.aborts}")


@streamed_or_not
def test_only_unfinished_streams_are_aborted(manual: Server, stream: bool) -> None:
    with manual.send(CHAT, stream=stream, n=3) as connection:
        first, second, _ = manual.until_streams(3)
        second.put(delta("second", [1], "stop"))
        if stream:
            read_until(connection, b'"finish_reason":"stop"')
        else:
            until(lambda: metrics_of(manual)["engine:request_success_total[stop]"] == 1, "the end of the second choice")
        first.put(delta("first", [1]))
    until(lambda: manual.engine.aborts == [1, 0, 1], f"the other two to be aborted, got {manual.engine.aborts}")


@streamed_or_not
def test_a_client_that_disconnects_at_once(manual: Server, stream: bool) -> None:
    """Whether the server has read the request when the connection ends, is parsing it or has queued it."""
    for number in range(1, 21):
        manual.send(COMPLETIONS, stream=stream, n=2).close()
        until(lambda number=number: manual.app.num_ended == number, "the server to notice the disconnect")
    assert set(manual.engine.aborts) <= {1}, f"each stream is aborted once, got {manual.engine.aborts}"
    manual.engine.manual = False
    assert manual.post(COMPLETIONS, GOOD[COMPLETIONS]).status_code == 200


def test_a_request_that_is_cut_off(manual: Server) -> None:
    whole = request_bytes(COMPLETIONS, json.dumps(GOOD[COMPLETIONS]).encode())
    for end in (1, 10, 30, whole.index(b"\r\n\r\n") + 4, len(whole) - 20, len(whole) - 1):
        manual.send_raw(whole[:end]).close()
    until(lambda: manual.app.num_ended == 3, "the server to be done with three requests with a head")
    assert not manual.engine.streams, "an incomplete request must not reach the engine"


def test_a_stream_that_was_read_to_its_end_leaves_its_connection_open(server: Server) -> None:
    for _ in range(3):
        server.events(COMPLETIONS)
        server.whole(CHAT)
    assert len(server.client._transport._pool.connections) == 1  # type: ignore[attr-defined]
    assert server.engine.aborts == [0] * 6


# Single functions: moments that a socket cannot hit exactly


class Client:
    """An ASGI client. It stays until `gone` is set; sending fails from message number fails_at on."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.gone = asyncio.Event()
        self.fails_at = fails_at
        self.sent: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.sent) == self.fails_at:
            raise OSError("the connection is gone")
        self.sent.append(message)


def on_a_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await test()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        left = [repr(task) for task in asyncio.all_tasks() if "common/openai_app" in repr(task)]
        assert not left, f"tasks outlive the request: {left}"

    asyncio.run(asyncio.wait_for(run(), DEADLINE_S))


def admitted(engine: FakeEngine, **fields: Any) -> tuple[Generation, ResponseWriter]:
    request = parse_request(json.dumps({**GOOD[CHAT], **fields}).encode(), True, engine)
    metrics = Metrics(engine.stats)
    generation = admit(engine, request, metrics, RequestTimer(metrics))
    return generation, ResponseWriter(request, TokenTexts(engine.tokenizer))


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_response_that_cannot_be_sent(engine: FakeEngine, fails_at: int) -> None:
    """At its head, before anything was read from the engine; at the role; at the first text."""
    engine.manual = True

    async def test() -> None:
        generation, writer = admitted(engine, n=2)
        response = EventStream(generation, stream_events(generation, writer))
        for stream in engine.streams:
            stream.put(delta("a", [1]))
        client = Client(fails_at)
        with pytest.raises(OSError, match="gone"):
            await response({"type": "http"}, client.receive, client.send)
        assert engine.aborts == [1, 1]

    on_a_loop(test)


def test_a_response_whose_client_was_gone_before_it_began(engine: FakeEngine) -> None:
    engine.manual = True

    async def test() -> None:
        client = Client()
        client.gone.set()
        generation, writer = admitted(engine)
        stream = EventStream(generation, stream_events(generation, writer))
        await stream({"type": "http"}, client.receive, client.send)
        generation, writer = admitted(engine)
        assert await collect(generation, writer.response, client.receive) is None
        assert engine.aborts == [1, 1]

    on_a_loop(test)


@pytest.mark.parametrize("stream", [True, False])
def test_a_handler_that_is_cancelled(engine: FakeEngine, stream: bool) -> None:
    """As uvicorn does to running handlers when the drain timeout has passed."""
    engine.manual = True

    async def test() -> None:
        client = Client()
        generation, writer = admitted(engine, n=2)
        response = EventStream(generation, stream_events(generation, writer))
        answer = (
            response({"type": "http"}, client.receive, client.send)
            if stream
            else collect(generation, writer.response, client.receive)
        )
        task = asyncio.ensure_future(answer)
        while not generation._readers:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.aborts == [1, 1]
        generation.close()
        assert engine.aborts == [1, 1], "a second close does nothing"

    on_a_loop(test)


def test_an_output_that_arrives_while_the_client_disconnects(engine: FakeEngine) -> None:
    """A stream that has ended is not aborted, even if its end was not read."""
    engine.manual = True

    async def test() -> None:
        generation, _ = admitted(engine, n=2)
        outputs = generation.outputs()
        engine.streams[1].put(delta("a", [1]))
        await outputs.__anext__()
        engine.streams[0].put(delta("b", [1], "stop"))
        while 0 in generation._running:
            await asyncio.sleep(0)
        generation.close()
        await outputs.aclose()  # type: ignore[attr-defined]
        assert engine.aborts == [0, 1]

    on_a_loop(test)


def test_work_is_canceled_only_when_the_client_disconnects() -> None:
    async def test() -> None:
        client, ended = Client(), []

        async def work(delay: asyncio.Event | None) -> str:
            try:
                if delay is not None:
                    await delay.wait()
                return "done"
            finally:
                ended.append(True)

        assert await unless_disconnected(client.receive, work(None)) == "done"
        with pytest.raises(ZeroDivisionError):
            await unless_disconnected(client.receive, _fail())
        client.gone.set()
        assert await unless_disconnected(client.receive, work(asyncio.Event())) is None
        assert len(ended) == 2, "canceled work has ended when unless_disconnected returns"

    on_a_loop(test)


async def _fail() -> None:
    raise ZeroDivisionError


# Engines that fail


@both_endpoints
@pytest.mark.parametrize("num_before", [0, 2])
def test_an_error_in_mid_stream_becomes_an_event(engine: FakeEngine, path: str, num_before: int) -> None:
    engine.script = [*[delta(f"t{number}", [1]) for number in range(num_before)], GenerationError("out of blocks")]
    with serving(engine) as server:
        events = server.events(path, stream_options={"include_usage": True})
        check_error_body(events[-1], None, "out of blocks", kind="internal_error")
        assert sum('"t' in json.dumps(event["choices"]) for event in events[:-1]) == num_before
        assert all(
            "finish_reason" not in json.dumps(e) or e["choices"][0]["finish_reason"] is None for e in events[:-1]
        )
        samples = metrics_of(server)
    assert (samples["engine:request_errors_total"], samples["engine:request_aborted_total"]) == (1, 0)


@both_endpoints
def test_an_error_of_a_whole_answer_is_500(engine: FakeEngine, path: str) -> None:
    engine.script = [delta("a", [1]), GenerationError("out of blocks")]
    with serving(engine) as server:
        check_error(server.post(path, GOOD[path]), 500, None, "out of blocks", kind="internal_error")
        assert metrics_of(server)["engine:request_errors_total"] == 1
        engine.script = None
        assert server.post(path, GOOD[path]).status_code == 200


@streamed_or_not
def test_one_choice_that_fails_ends_the_others(manual: Server, stream: bool) -> None:
    with manual.send(COMPLETIONS, stream=stream, n=3) as connection:
        manual.until_streams(3)[1].put(GenerationError("out of blocks"))
        answer = read_until(connection, b"[DONE]" if stream else b"internal_error")
    assert b"out of blocks" in answer and answer.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 500")
    manual.until_answered()
    assert manual.engine.aborts == [1, 0, 1]
    samples = metrics_of(manual)
    assert (samples["engine:request_errors_total"], samples["engine:request_aborted_total"]) == (1, 2)


@both_endpoints
def test_an_unexpected_exception_of_the_engine(engine: FakeEngine, path: str, caplog: pytest.LogCaptureFixture) -> None:
    engine.script = [delta("a", [1]), KeyError("/secret/path")]
    with serving(engine, raises=KeyError) as server:
        error = check_error(server.post(path, GOOD[path]), 500, None, "KeyError", kind="internal_error")
        event = check_error_body(server.events(path)[-1], None, "KeyError", kind="internal_error")
        assert "secret" not in error["message"] + event["message"], "the rest is for the server's log"
        assert "secret" in caplog.text, "the log has the traceback"
        engine.script = None
        assert server.post(path, GOOD[path]).status_code == 200


@streamed_or_not
def test_a_stream_without_a_finish_reason(engine: FakeEngine, stream: bool) -> None:
    engine.script = [delta("a", [1]), None]
    with serving(engine) as server:
        response = server.post(CHAT, GOOD[CHAT], stream=stream)
        body = parse_events(response.text)[-1] if stream else response.json()
        check_error_body(body, None, "without a finish_reason", kind="internal_error")


def test_an_exception_in_a_handler_is_500_and_the_server_goes_on(engine: FakeEngine) -> None:
    with serving(engine, raises=ZeroDivisionError) as server:
        engine.refusal = ZeroDivisionError("secret")
        for path in (CHAT, COMPLETIONS):
            error = check_error(server.post(path, GOOD[path]), 500, None, "ZeroDivisionError", kind="internal_error")
            assert "secret" not in error["message"]
        engine.refusal = None
        assert server.post(CHAT, GOOD[CHAT]).status_code == 200


def test_a_refusal_half_way_through_admission(engine: FakeEngine) -> None:
    """Whatever generate raises, what was queued before is aborted."""
    engine.manual = True

    async def test() -> None:
        for error in (QueueFullError("full"), FieldError("prompt", "no"), RuntimeError("oh")):
            request = parse_request(json.dumps({**GOOD[CHAT], "n": 3}).encode(), True, engine)
            metrics = Metrics(engine.stats)
            generate, engine.streams = engine.generate, []

            def fail_third(*args: Any, error: Exception = error, generate: Any = generate) -> Any:
                if len(engine.streams) == 2:
                    raise error
                return generate(*args)

            engine.generate = fail_third  # type: ignore[method-assign]
            with pytest.raises(type(error)):
                admit(engine, request, metrics, RequestTimer(metrics))
            engine.generate = generate  # type: ignore[method-assign]
            assert engine.aborts == [1, 1]

    on_a_loop(test)


# Metrics


def test_metrics_before_the_first_request(server: Server) -> None:
    samples = metrics_of(server)
    for name in ("request_success_total[stop]", "request_success_total[length]", "prompt_tokens_total",
                 "generation_tokens_total", "request_aborted_total", "request_errors_total",
                 "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
                 "e2e_request_latency_seconds_count"):  # fmt: skip
        assert samples[f"engine:{name}"] == 0, f"{name}: got {samples}"
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "process_start_time_seconds" in response.text, "from which an alert sees a server that restarts"


def test_what_requests_add_to_the_metrics(engine: FakeEngine) -> None:
    with serving(engine) as server:
        server.whole(COMPLETIONS, prompt=["a b", "c"], n=2, max_tokens=3)
        server.events(COMPLETIONS, prompt="a", max_tokens=2)
        engine.script = [delta("", [1]), delta("ab", [2, 3]), delta("", [], "stop")]
        server.whole(CHAT)
        num_prompt_tokens = 2 + 1 + 1 + len(engine.streams[-1].prompt)
        assert metrics_of(server) == metrics_of(server) | {
            "engine:request_success_total[length]": 5,
            "engine:request_success_total[stop]": 1,
            "engine:prompt_tokens_total": num_prompt_tokens,
            "engine:generation_tokens_total": 4 * 3 + 2 + 3,
            "engine:request_aborted_total": 0,
            "engine:request_errors_total": 0,
            "engine:time_to_first_token_seconds_count": 6,
            "engine:inter_token_latency_seconds_count": 4 * 2 + 1 + 1,
            "engine:e2e_request_latency_seconds_count": 6,
        }


def test_gauges_are_read_at_each_scrape(server: Server) -> None:
    assert metrics_of(server)["engine:num_requests_running"] == 3
    assert metrics_of(server)["engine:kv_cache_usage_perc"] == 0.25
    server.engine.gauges = {"num_requests_waiting": 7.0}
    samples = metrics_of(server)
    assert samples["engine:num_requests_waiting"] == 7 and "engine:num_requests_running" not in samples


def test_two_apps_count_apart(server: Server, engine: FakeEngine) -> None:
    server.whole(CHAT)
    with serving(FakeEngine(engine.tokenizer)) as other:
        assert metrics_of(other)["engine:generation_tokens_total"] == 0


# Startup and shutdown


def test_the_engine_starts_on_the_loop_and_shuts_down_off_it(engine: FakeEngine) -> None:
    with serving(engine) as server:
        server.whole(CHAT)
        assert [name for name, _ in engine.calls] == ["start"]
    (_, loop_thread), (last, shutdown_thread) = engine.calls
    assert last == "shutdown" and shutdown_thread is not loop_thread, "shutdown blocks: it may not stop the event loop"
    assert loop_thread is not threading.current_thread()


@streamed_or_not
def test_open_requests_are_finished_before_the_engine_ends(engine: FakeEngine, stream: bool) -> None:
    engine.manual = True
    app = Watched(create_app(engine))
    serve = running_app(app)
    server = Server(serve.__enter__(), engine, app, httpx.Client(verify=False))
    connection = server.send(CHAT, stream=stream)
    (request,) = server.until_streams(1)
    request.put(delta("one ", [1]))
    end = threading.Thread(target=serve.__exit__, args=(None, None, None), daemon=True)
    end.start()
    until(lambda: not accepts(server), "the server to refuse new connections")
    assert len(engine.calls) == 1, "the engine was shut down while a request was open"
    request.put(delta("two", [2], "stop"))
    answer = read_until(connection, b"[DONE]" if stream else b'"total_tokens":')
    assert b"one " in answer and b"two" in answer
    connection.close()
    end.join(DEADLINE_S)
    assert [name for name, _ in engine.calls] == ["start", "shutdown"] and engine.aborts == [0]


def accepts(server: Server) -> bool:
    try:
        server.send_raw(b"").close()
    except OSError:
        return False
    return True


def test_an_engine_that_cannot_start(engine: FakeEngine) -> None:
    def fail() -> None:
        raise ValueError("no memory")

    async def run() -> None:
        app = create_app(engine)
        with pytest.raises(ValueError, match="no memory"):
            async with app.router.lifespan_context(app):
                pass

    engine.start = fail  # type: ignore[method-assign]
    asyncio.run(run())
    assert engine.calls == [], "an engine that has not started is not shut down"


def test_tokenizing_does_not_block_the_event_loop(engine: FakeEngine) -> None:
    threads: set[threading.Thread] = set()

    class Watching:
        def __getattr__(self, name: str) -> Any:
            if name in ("encode", "apply_chat_template"):
                threads.add(threading.current_thread())
            return getattr(tokenizer, name)

        def __len__(self) -> int:
            return len(tokenizer)

    tokenizer, engine.tokenizer = engine.tokenizer, Watching()  # type: ignore[assignment]
    with serving(engine) as server:
        server.whole(CHAT)
        server.whole(COMPLETIONS)
        assert threads and engine.calls[0][1] not in threads, "the tokenizer ran on the event loop's thread"


def test_two_threads_never_shut_the_engine_down_at_once(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the drain and the end of the app may meet; sockets must not be closed by both."""
    inside, calls, overlaps = threading.Semaphore(1), list[int](), list[int]()

    def shutdown() -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(1)
            return
        calls.append(1)
        until(lambda: len(calls) > 1 or both_wait.is_set(), "the other thread to have begun")
        inside.release()

    both_wait = threading.Event()
    monkeypatch.setattr(engine, "shutdown", shutdown)
    app = create_app(engine)
    threads = [threading.Thread(target=app.state.end_requests) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: calls, "one of them to shut the engine down")
    threads[0].join(0.05)  # time in which the other one could overlap, were it not for the lock
    both_wait.set()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert (len(calls), overlaps) == (2, []), f"expected two calls, one after the other, got {calls}, {overlaps}"
