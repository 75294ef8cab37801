"""router/app.py, forward.py, health.py over replicas that answer as a test says."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from part10_data_parallelism.router.app import Router
from tests.part10.fake_replicas import (
    FakeReplica,
    answer_status,
    answer_stream,
    break_off,
    hang_up,
    routed,
)

LOOK = 'Look at router/app.py::Router.route; README "What passes through".'
LOOK_FAIL = 'Look at router/app.py::Router.route and RoutedResponse.stream; README "When a replica fails".'
LOOK_ADMIN = 'Look at router/app.py::Router.add_worker and remove_worker; README "Replicas come and go".'
LOOK_TURNS = 'Look at router/app.py::Router.client_of; README "Fair turns".'
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 3}
KEY = {"Authorization": "Bearer key"}
TIMEOUT_S = 60.0


def ask(
    url: str, path: str = "/v1/completions", headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    return httpx.post(
        url + path, json={**BODY, **fields}, headers={**KEY, **(headers or {})}, timeout=TIMEOUT_S, trust_env=False
    )


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what}"
        time.sleep(0.005)


def check_idle(router: Router) -> None:
    """Every request that began has ended."""
    until(lambda: not router.pool.queue.num_running, f"no request to run. {LOOK}")
    pending = {replica.url: replica.num_pending for replica in router.pool.replicas}
    assert not any(pending.values()) and not router.pool.queue.num_waiting, f"pending {pending}. {LOOK}"


# What passes through


def test_requests_and_answers_pass_unchanged() -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    with routed(a, b) as (url, router, _):
        got = [ask(url, seed=number).json() for number in range(4)]
        assert [each["replica"] for each in got] == ["a", "b", "a", "b"], f"{got}. {LOOK}"
        assert [each["body"] for each in got] == [{**BODY, "seed": number} for number in range(4)], f"{got}. {LOOK}"
        ask(url, "/v1/chat/completions?a=%2Fb&c=1", {"X-Request-Id": "mine", "Connection": "close"})
        assert a.paths[-1] == "/v1/chat/completions?a=%2Fb&c=1", f"{a.paths}. {LOOK}"
        names = {name.lower(): value for name, value in a.headers[-1].items()}
        assert names["x-request-id"] == "mine" and names["authorization"] == "Bearer key", f"{names}. {LOOK}"
        assert names["content-type"] == "application/json" and names.get("connection") != "close", f"{names}. {LOOK}"
        check_idle(router)


def test_a_stream_passes_byte_for_byte_as_it_comes() -> None:
    replica = FakeReplica("a", answer_stream, gate=0)
    with routed(replica) as (url, router, _):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=BODY, headers=KEY, timeout=TIMEOUT_S, trust_env=False
        ) as response:
            chunks = response.iter_raw()
            got = next(chunks)  # the others have not been written yet
            assert response.headers["content-type"] == "text/event-stream" and response.headers["x-engine"] == "fake"
            replica.gate = 100
            got += b"".join(chunks)
        expected = b"".join(f'data: {{"n":{number},"é":"☃"}}\n\n'.encode() for number in range(3))
        assert got == expected + b"data: [DONE]\n\n", f"got {got!r}. {LOOK}"
        check_idle(router)


@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_an_error_of_the_replica_is_its_answer(status: int) -> None:
    """It is the client's fault, or has been computed: no other replica is asked."""
    a, b = FakeReplica("a", answer_status(status)), FakeReplica("b")
    with routed(a, b) as (url, router, _):
        answer = ask(url)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, f"status {status}"), LOOK
        assert b.num_requests == 0 and router.pool.replicas[0].breaker.num_failures == 0, LOOK_FAIL


def test_a_client_that_leaves_is_seen_by_the_replica() -> None:
    replica = FakeReplica("a", answer_stream, gate=1)
    with routed(replica) as (url, router, _):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=BODY, headers=KEY, timeout=TIMEOUT_S, trust_env=False
        ) as response:
            next(response.iter_raw())
        until(lambda: replica.num_left == 1, f"the replica to notice. {LOOK}")
        check_idle(router)
        assert router.pool.replicas[0].breaker.num_failures == 0, f"it has not failed. {LOOK_FAIL}"


# When a replica fails


@pytest.mark.parametrize("handler", [hang_up, answer_status(503), answer_status(502), answer_status(429)])
def test_another_one_is_asked_if_one_fails_before_its_first_byte(handler: Any) -> None:
    a, b = FakeReplica("a", handler), FakeReplica("b")
    with routed(a, b) as (url, router, _):
        got = ask(url)
        assert got.status_code == 200 and got.json()["replica"] == "b", f"{got.text}. {LOOK_FAIL}"
        assert (a.num_requests, b.num_requests) == (1, 1), f"{a.num_requests}, {b.num_requests}. {LOOK_FAIL}"
        check_idle(router)


def test_a_stream_that_breaks_off_ends_with_an_error_event() -> None:
    """Its tokens were sent, so nobody else can continue it."""
    a, b = FakeReplica("a", break_off), FakeReplica("b")
    with routed(a, b) as (url, router, _):
        got = ask(url, stream=True)
        events = got.text.split("\n\n")
        assert events[0] == 'data: {"n":0}' and events[-2:] == ["data: [DONE]", ""], f"{got.text!r}. {LOOK_FAIL}"
        assert '"error"' in events[-3] and a.url in events[-3], f"the error names the replica: {events}. {LOOK_FAIL}"
        assert b.num_requests == 0, LOOK_FAIL
        check_idle(router)


def test_a_stream_of_responses_ends_with_an_event_of_its_own_kind() -> None:
    """OpenAI's clients expect another one there than for completions."""
    with routed(FakeReplica("a", break_off)) as (url, _, _):
        text = ask(url, "/v1/responses", stream=True).text
        assert text.startswith('data: {"n":0}\n\nevent: error\ndata: {"type": "error", "sequence_number": 1, '), (
            f"{text!r}. {LOOK_FAIL}"
        )
        assert "[DONE]" not in text and text.endswith("\n\n"), f"{text!r}. {LOOK_FAIL}"


def test_open_requests_end_when_the_router_is_in_a_hurry() -> None:
    """Streams, whole answers, and what waits in the queue. Nobody is retried."""

    async def wait(replica: FakeReplica, request: Any) -> Any:
        await replica.until_open(0)
        return await answer_stream(replica, request)

    a = FakeReplica("a", answer_stream, gate=0)
    with routed(a, max_requests_per_replica=2) as (url, router, _), ThreadPoolExecutor(3) as threads:
        stream = threads.submit(ask, url, stream=True)
        until(lambda: a.num_requests == 1, "the stream to begin")
        a.handler = wait
        whole = threads.submit(ask, url)
        until(lambda: a.num_requests == 2, "the request to arrive")
        queued = threads.submit(ask, url)
        until(lambda: router.pool.queue.num_waiting == 1, "one to wait")
        router.end_requests()
        events = stream.result(TIMEOUT_S).text.split("\n\n")
        assert "the server is shutting down" in events[-3] and events[-2] == "data: [DONE]", f"{events}. {LOOK_FAIL}"
        for each in (whole, queued):
            assert each.result(TIMEOUT_S).status_code == 503, f"{each.result().text}. {LOOK_FAIL}"
        assert a.num_requests == 2 and not router.pool.replicas[0].num_failures, LOOK_FAIL
        check_idle(router)
        a.gate = 100


def test_a_whole_answer_that_breaks_off_is_asked_for_elsewhere() -> None:
    """The client has got nothing of it yet."""
    a, b = FakeReplica("a", break_off), FakeReplica("b")
    with routed(a, b) as (url, router, servers):
        got = ask(url)
        assert got.status_code == 200 and got.json()["replica"] == "b", f"{got.text}. {LOOK_FAIL}"
        servers.stop(b)
        got = ask(url)
        assert got.status_code == 503 and "http://127" in got.json()["error"]["message"], f"{got.text}. {LOOK_FAIL}"
        check_idle(router)


def test_all_replicas_fail() -> None:
    replicas = [FakeReplica(name, hang_up) for name in "abcd"]
    with routed(*replicas, max_retries=2) as (url, router, _):
        got = ask(url)
        assert got.status_code == 503 and "http://127" in got.json()["error"]["message"], f"{got.text}. {LOOK_FAIL}"
        assert sum(replica.num_requests for replica in replicas) == 3, f"one try and two retries. {LOOK_FAIL}"
        check_idle(router)


def test_a_replica_that_dies_with_many_requests_loses_none() -> None:
    """The budget for retries has room for all that one replica may have."""

    async def wait_and_hang_up(replica: FakeReplica, request: Any) -> Any:
        await replica.until_open(0)
        return await hang_up(replica, request)

    a, b = FakeReplica("a", wait_and_hang_up, gate=0), FakeReplica("b")
    with routed(a, b) as (url, router, _), ThreadPoolExecutor(60) as threads:
        answers = [threads.submit(ask, url) for _ in range(60)]
        until(lambda: a.num_requests == 30, f"half of the requests to be sent to each. {LOOK_FAIL}")
        a.gate = 1
        got = [answer.result() for answer in answers]
        assert {answer.status_code for answer in got} == {200}, f"{[answer.text for answer in got]}. {LOOK_FAIL}"
        check_idle(router)


def test_a_replica_that_fails_often_gets_a_probe_later() -> None:
    a, b = FakeReplica("a", hang_up), FakeReplica("b")
    with routed(a, b) as (url, router, _):
        breaker = router.pool.replicas[0].breaker
        breaker.open_s = breaker.max_open_s = 3_600
        for _ in range(12):
            assert ask(url).status_code == 200, LOOK_FAIL
        assert a.num_requests == 3, f"the circuit opens after 3 failures, and {a.num_requests} came. {LOOK_FAIL}"
        a.handler, breaker.open_s = b.handler, 0
        until(lambda: ask(url).json()["replica"] == "a", f"a probe to reach the replica again. {LOOK_FAIL}")
        check_idle(router)


def test_an_unhealthy_replica_gets_nothing() -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    with routed(a, b) as (url, router, _):
        a.is_well = False
        until(lambda: not router.pool.replicas[0].is_healthy, f"the health check to notice. {LOOK_FAIL}")
        assert {ask(url).json()["replica"] for _ in range(4)} == {"b"}, LOOK_FAIL
        b.is_well = False
        until(lambda: not router.pool.replicas[1].is_healthy, f"the health check to notice. {LOOK_FAIL}")
        got = ask(url)
        assert got.status_code == 503 and "no replica is available" in got.text, f"{got.text}. {LOOK_FAIL}"
        health = httpx.get(f"{url}/health", trust_env=False)
        assert health.status_code == 503, f"{health.text}. {LOOK_FAIL}"
        a.is_well = True
        until(lambda: ask(url).status_code == 200, f"the replica to come back. {LOOK_FAIL}")


# Replicas come and go


def test_only_the_key_changes_the_pool() -> None:
    a = FakeReplica("a")
    with routed(a, api_key="key") as (url, _, _), routed(FakeReplica("b"), api_key=None) as (open_url, _, _):
        for method in ("GET", "POST", "DELETE"):
            for where, headers, status in (
                (url, {}, 401),
                (url, {"Authorization": "Bearer x"}, 401),
                (open_url, KEY, 403),
            ):
                got = httpx.request(method, f"{where}/workers", headers=headers, trust_env=False)
                assert got.status_code == status, f"{method}: expected {status}, got {got.status_code}. {LOOK_ADMIN}"


def test_a_replica_is_added_and_another_one_drained() -> None:
    a, b = FakeReplica("a", answer_stream, gate=1), FakeReplica("b")
    with routed(a) as (url, router, servers), contextlib.ExitStack() as stack:
        stream = stack.enter_context(
            httpx.stream("POST", f"{url}/v1/completions", json=BODY, headers=KEY, timeout=TIMEOUT_S, trust_env=False)
        )
        chunks = stream.iter_raw()
        text = next(chunks)
        servers.start(b)
        added = httpx.post(f"{url}/workers", json={"url": b.url}, headers=KEY, trust_env=False)
        assert added.status_code == 202, f"{added.text}. {LOOK_ADMIN}"
        again = httpx.post(f"{url}/workers", json={"url": b.url}, headers=KEY, trust_env=False)
        assert again.status_code == 409 and "already" in again.text, f"{again.text}. {LOOK_ADMIN}"
        until(lambda: router.pool.find(b.url).is_available, f"the new replica to be well. {LOOK_ADMIN}")
        removed = httpx.request("DELETE", f"{url}/workers", json={"url": a.url}, headers=KEY, trust_env=False)
        assert removed.status_code == 202 and removed.json()["is_draining"], f"{removed.text}. {LOOK_ADMIN}"
        assert [ask(url).json()["replica"] for _ in range(3)] == ["b"] * 3, f"a drains. {LOOK_ADMIN}"
        assert len(router.pool.replicas) == 2, f"a has a request left. {LOOK_ADMIN}"
        a.gate = 100
        text += b"".join(chunks)
        assert text.endswith(b"data: [DONE]\n\n"), f"{text!r}. {LOOK_ADMIN}"
        until(lambda: len(router.pool.replicas) == 1, f"a to be removed. {LOOK_ADMIN}")
        check_idle(router)


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "ftp://x:1", "http://", "http://x:99999", "http://a:1#b", "http://a:1?b", "http://a:1?",
     "http://u:p@a:1", "http://a b:1", "http://a\nb:1", 5, None],
)  # fmt: skip
def test_addresses_that_are_none(url: object) -> None:
    with routed(FakeReplica("a")) as (router_url, _, _):
        got = httpx.post(f"{router_url}/workers", json={"url": url}, headers=KEY, trust_env=False)
        assert got.status_code == 400 and "url" in got.text, f"{url!r}: {got.text}. {LOOK_ADMIN}"


def test_one_replica_has_one_address() -> None:
    a = FakeReplica("a")
    with routed(a) as (url, _, _):
        for same in (a.url + "/", a.url.replace("http", "HTTP")):
            got = httpx.post(f"{url}/workers", json={"url": same}, headers=KEY, trust_env=False)
            assert got.status_code == 409, f"{same} is {a.url}: {got.text}. {LOOK_ADMIN}"


def test_a_router_that_is_its_own_replica() -> None:
    """Its requests come back to it, and go to the other one."""
    a = FakeReplica("a")
    with routed(a) as (url, router, _):
        httpx.post(f"{url}/workers", json={"url": url}, headers=KEY, trust_env=False).raise_for_status()
        until(lambda: router.pool.find(url).is_healthy, "it to be healthy")
        got = [ask(url).json()["replica"] for _ in range(10)]
        assert got == ["a"] * 10, f"got {got}. {LOOK_FAIL}"
        check_idle(router)


# Web pages


def test_foreign_pages_may_not_use_it() -> None:
    a = FakeReplica("a")
    with routed(a, allowed_origins="http://good.example") as (url, _, _):
        for headers, status in [
            ({"Host": "evil.example"}, 403), ({"Origin": "http://evil.example"}, 403), ({}, 200),
            ({"Origin": "http://good.example"}, 200), ({"Origin": "http://localhost:3000"}, 200),
        ]:  # fmt: skip
            got = ask(url, headers=headers)
            assert got.status_code == status, f"{headers}: {got.status_code} {got.text}. {LOOK}"
        assert all("origin" not in map(str.lower, sent) for sent in a.headers), f"the router has decided. {LOOK}"
        preflight = httpx.options(
            f"{url}/v1/completions", trust_env=False,
            headers={"Origin": "http://good.example", "Access-Control-Request-Method": "POST"},
        )  # fmt: skip
        assert preflight.headers["access-control-allow-origin"] == "http://good.example", f"{preflight.headers}. {LOOK}"


# Too many requests


def test_requests_wait_and_one_too_many_gets_429() -> None:
    a = FakeReplica("a", answer_stream, gate=0)
    with routed(a, max_requests_per_replica=1, max_queued_requests=2) as (url, router, _):
        results: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: results.append(ask(url))) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: router.pool.queue.num_waiting == 2, "two requests to wait")
        refused = ask(url)
        assert refused.status_code == 429 and refused.headers["retry-after"], f"{refused.text}. {LOOK}"
        a.handler = answer_status(404)
        listed = httpx.get(f"{url}/v1/models", headers=KEY, timeout=TIMEOUT_S, trust_env=False)
        assert listed.status_code == 404, f"what needs no turn does not wait: {listed.text}. {LOOK}"
        a.gate = 100
        for thread in threads:
            thread.join(TIMEOUT_S)
        statuses = sorted(result.status_code for result in results)  # a client's thread may be late to note its answer
        assert statuses == [200, 404, 404], f"{results}. {LOOK}"
        check_idle(router)


def test_clients_with_keys_of_their_own_take_turns() -> None:
    a = FakeReplica("a", answer_stream, gate=0)
    with routed(a, client_keys="ada-key, ben-key", max_requests_per_replica=1) as (url, router, _):

        def wait(key: str) -> None:
            headers = {"Authorization": f"bearer  {key}", "x-test-client": key}
            assert ask(url, headers=headers).status_code == 200

        with ThreadPoolExecutor(8) as threads:
            for number, key in enumerate(["ada-key"] * 4 + ["ben-key"]):
                threads.submit(wait, key)
                until(lambda number=number: router.pool.queue.num_waiting == number, "it to wait")  # type: ignore[misc]
            a.gate = 100
        order = [each["x-test-client"] for each in a.headers]  # as they came to the replica
        assert "ben-key" in order[:3], f"ben does not wait for all of ada's requests, got {order}. {LOOK_TURNS}"
        assert {each["Authorization"] for each in a.headers} == {"Bearer key"}, f"{a.headers}. {LOOK}"
        wrong = ask(url, headers={"Authorization": "Bearer ada"})
        admin = httpx.get(f"{url}/workers", headers={"Authorization": "Bearer ada-key"}, trust_env=False)
        assert (wrong.status_code, admin.status_code) == (401, 401), f"{wrong.text}, {admin.text}. {LOOK_ADMIN}"


def test_metrics_name_every_replica() -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    with routed(a, b) as (url, _, _):
        for _ in range(3):
            ask(url)
        text = httpx.get(f"{url}/metrics", trust_env=False).text
        assert f'router:replica_requests_total{{replica="{a.url}"}} 2.0' in text, text
        assert f'router:replica_available{{replica="{b.url}"}} 1.0' in text, text
