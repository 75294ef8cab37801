"""disagg/ over engines that answer as a test says: which engine gets what, in which order, and what if one fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.cli import parse_config
from common.errors import FieldError
from common.openai_app.protocol import ApiRequest, parse_request
from common.openai_app.responses_endpoint import parse_responses_request
from common.serve import ListenConfig, running_app
from part13_disaggregation.disagg import __main__ as command
from part13_disaggregation.disagg.config import DisaggConfig, secret_of, with_kv_connector
from part13_disaggregation.disagg.prefill_request import prefill_body
from part13_disaggregation.disagg.proxy import Proxy, create_app
from part13_disaggregation.disagg.roles import RolePool
from part13_disaggregation.kv_params import HEADER, SECRET_VARIABLE
from part13_disaggregation.router import fleet as fleet_module
from part13_disaggregation.router import processes
from part13_disaggregation.router.policies import RoutedRequest
from part13_disaggregation.router.replica import Replica, Role
from tests.part10.fake_replicas import FAST, FakeServers, answer_status, answer_stream, answer_whole, break_off, hang_up
from tests.part13.fake_engines import (
    LOOK_INFO,
    TIMEOUT_S,
    FakeEngine,
    break_off_prefill,
    proxied,
    source,
    until,
    wait_for_sources,
)

LOOK = "Look at disagg/proxy.py::Proxy.send and begin_prefill."
LOOK_ASK = "Look at disagg/proxy.py::Proxy._ask."
LOOK_END = "Look at disagg/proxy.py::Proxy.finish and RemotePrefill."
LOOK_BODY = "Look at disagg/prefill_request.py::prefill_body, called in disagg/proxy.py::Proxy.begin_prefill."
LOOK_HEADER = "Look at disagg/proxy.py::Proxy.headers_for_replica."
LOOK_ROLE = "Look at disagg/proxy.py::Proxy.set_role, new_replica, and roles.py::RolePool."
LOOK_FLEET = "Look at router/fleet.py::Fleet, started in disagg/proxy.py::Proxy.__init__."
LOOK_FLAGS = "Look at disagg/config.py::DisaggConfig, used in disagg/proxy.py::Proxy.__init__."
KEY = {"Authorization": "Bearer key"}
LONG = "All work and no play makes Jack a dull boy. " * 50  # 2,200 characters
BODY: dict[str, Any] = {"model": "tiny", "prompt": LONG, "max_tokens": 9}


def ask(
    url: str, path: str = "/v1/completions", headers: dict[str, str] | None = None, **fields: Any
) -> httpx.Response:
    return post(url + path, json.dumps({**BODY, **fields}).encode(), headers)


def post(url: str, content: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
    headers = {"Content-Type": "application/json", **KEY, **(headers or {})}
    return httpx.post(url, content=content, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def stream(url: str, **fields: Any) -> contextlib.AbstractContextManager[httpx.Response]:
    body = {**BODY, "stream": True, **fields}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, headers=KEY, timeout=TIMEOUT_S, trust_env=False)


def admin(method: str, where: str, headers: Mapping[str, str] = KEY, **fields: Any) -> httpx.Response:
    return httpx.request(method, where, json=fields or None, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def local_prefills(proxy: Proxy) -> dict[str, float]:
    """How many prompts were left to the decode engine, by reason."""
    samples = next(iter(proxy.metrics.local_prefills.collect())).samples
    return {each.labels["reason"]: each.value for each in samples if each.name.endswith("_total")}


def remote_prefills(proxy: Proxy) -> float:
    return next(iter(proxy.metrics.remote_prefills.collect())).samples[0].value


def check_idle(proxy: Proxy) -> None:
    """Every request that began has ended, at all engines."""
    until(lambda: not proxy.pool.queue.num_running, f"no request to run. {LOOK_END}")
    until(lambda: not any(replica.num_pending for replica in proxy.pool.replicas), f"nothing pending. {LOOK_END}")
    assert not proxy.prefills and not proxy.pool.queue.num_waiting, f"prefills left: {proxy.prefills}. {LOOK_END}"


# The way of a request


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions?a=%2Fb", "/v1/responses"])
def test_a_prompt_is_computed_by_one_engine_and_answered_by_another(path: str) -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d]) as (url, proxy, _):
        raw = b'{ "model":"tiny", "prompt": "%s","messages":[], "seed":7,"stop":["x"] ,"n": 2}' % LONG.encode()
        got = post(url + path, raw, {"X-Request-Id": "mine"})
        assert got.status_code == 200 and got.json()["replica"] == "d", f"{got.text}. {LOOK}"
        assert (len(p.bodies), len(d.bodies)) == (1, 1), f"each is asked once: {len(p.bodies)}, {len(d.bodies)}. {LOOK}"
        assert d.bodies[0] == raw, f"the decode engine gets the client's bytes, got {d.bodies[0]!r}. {LOOK}"
        assert p.paths == d.paths == [path], f"{p.paths}, {d.paths}. {LOOK}"
        order, fetch = p.params[0], d.params[0]
        assert order is not None and fetch is not None, f"got {order} and {fetch}. {LOOK_ASK}"
        assert order.sources == () and fetch.sources == (source("p"),), f"got {order} and {fetch}. {LOOK_ASK}"
        assert order.transfer_id == fetch.transfer_id and len(order.transfer_id) == 32, f"{order}, {fetch}. {LOOK_ASK}"
        for engine in (p, d):
            names = {name.lower(): value for name, value in engine.headers[0].items()}
            assert (names["authorization"], names["x-request-id"]) == ("Bearer key", "mine"), f"{names}. {LOOK}"
            assert names["content-type"] == "application/json", f"{names}. {LOOK}"
        assert (remote_prefills(proxy), local_prefills(proxy)) == (1, {}), LOOK
        check_idle(proxy)


def test_the_decode_engine_is_asked_once_the_prompt_is_admitted() -> None:
    """Not before: then it would ask for KV of which the other engine knows nothing. Not later: they overlap."""
    p, d = FakeEngine("p", may_admit=False, may_finish=False), FakeEngine("d")
    with proxied([p], [d]) as (url, proxy, _), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, url)
        until(lambda: p.num_requests == 1, f"the prefill engine to be asked. {LOOK}")
        assert d.num_requests == 0 and p.num_admitted == 0, f"it has not admitted the prompt yet. {LOOK}"
        p.may_admit = True
        got = answer.result(TIMEOUT_S)
        assert got.json()["replica"] == "d", f"while the prompt is computed: {got.text}. {LOOK}"
        until(lambda: p.num_prefills_left == 1, f"the prefill engine to be left when the answer is there. {LOOK_END}")
        check_idle(proxy)
        assert proxy.pool.find(p.url).num_failures == 0, f"it has not failed. {LOOK_END}"


def test_each_request_has_a_transfer_id_of_its_own() -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d], remote_prefill_chars=0) as (url, _, _):
        for _ in range(5):
            ask(url)
        ids = [each.transfer_id for each in d.params if each is not None]
        assert len(ids) == len(set(ids)) == 5, f"got {ids}. {LOOK_ASK}"


@pytest.mark.parametrize(
    ("path", "limit", "fields"),
    [
        ("/v1/completions", "max_tokens", {"prompt": LONG, "best_of": 2, "logprobs": 3, "suffix": None}),
        (
            "/v1/chat/completions", "max_tokens",
            {"messages": [{"role": "user", "content": LONG}], "max_completion_tokens": 50, "logprobs": True,
             "top_logprobs": 3, "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False},
        ),
        ("/v1/responses", "max_output_tokens", {"input": LONG, "instructions": "Be brief.", "max_output_tokens": 50}),
    ],
)  # fmt: skip
def test_what_a_prefill_engine_is_told(path: str, limit: str, fields: dict[str, Any]) -> None:
    of_the_answer = {
        "n": 2, "seed": 3, "stop": ["x"], "stop_token_ids": [3], "min_tokens": 3, "stream": False, "top_p": 0.5,
        "temperature": 0.7, "logit_bias": {"5": 1}, "return_token_ids": True, "ignore_eos": False, "echo": False,
    }  # fmt: skip
    kept = {"model": "tiny", "cache_salt": "salt", "add_special_tokens": False, "user": "ada", "tools": []}
    body = prefill_body(path, json.dumps({**of_the_answer, **kept, **fields}).encode())
    assert body is not None, LOOK_BODY
    dropped = {"best_of", "logprobs", "top_logprobs", "max_completion_tokens", "max_output_tokens"}
    expected = {**kept, **{name: value for name, value in fields.items() if name not in dropped}}
    expected |= {"stream": True, limit: 1, "temperature": 0, "ignore_eos": True}
    assert json.loads(body) == expected, f"expected {expected}, got {json.loads(body)}. {LOOK_BODY}"


@pytest.fixture(scope="module")
def engine() -> Any:
    """As far as requests are parsed with it."""
    tokenizer = load_tokenizer(resolve_checkpoint("tiny"))
    return SimpleNamespace(
        tokenizer=tokenizer, vocab_size=len(tokenizer), model_name="tiny", max_model_len=4096, max_request_len=4096,
        default_sampling={"repetition_penalty": 1.1},
    )  # fmt: skip


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi!"}]}]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "Hello", "n": 2, "max_tokens": 1}),
        ("/v1/completions", {"prompt": ["Hello", "you"], "min_tokens": 5, "add_special_tokens": False}),
        ("/v1/completions", {"prompt": [[5, 6, 7.0], [8]], "cache_salt": "salt", "logprobs": 2, "stream": False}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 5, "stop": "x"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {"messages": MESSAGES, "add_generation_prompt": False, "reasoning_effort": "none"}),
        (
            "/v1/chat/completions",
            {"messages": [*MESSAGES, {"role": "assistant", "content": "Hel"}], "continue_final_message": True},
        ),
        ("/v1/responses", {"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 20, "store": False}),
        ("/v1/responses", {"input": MESSAGES, "cache_salt": "salt", "stream": True, "text": {}}),
    ],
)
def test_both_engines_see_the_same_prompt(path: str, fields: dict[str, Any], engine: Any) -> None:
    """As the engine's own server parses the two bodies."""

    def parse(raw: bytes) -> ApiRequest:
        if path == "/v1/responses":
            return parse_responses_request(raw, engine)
        return parse_request(raw, path == "/v1/chat/completions", engine)

    raw = json.dumps({"model": "tiny", "temperature": 0.5, **fields}).encode()
    body = prefill_body(path, raw)
    assert body is not None, f"{fields}. {LOOK_BODY}"
    decode, prefill = parse(raw), parse(body)
    assert prefill.prompts == decode.prompts, f"{fields}: {prefill.prompts} for {decode.prompts}. {LOOK_BODY}"
    assert prefill.params.cache_salt == decode.params.cache_salt, f"{fields}. {LOOK_BODY}"
    got = (prefill.params.n, prefill.params.max_tokens, prefill.params.ignore_eos, prefill.stream is not None)
    assert got == (1, 1, True, True), f"n, max_tokens, ignore_eos, stream: {got}. {LOOK_BODY}"


@pytest.mark.parametrize("name", [HEADER, "X-KV-Transfer", "X-Kv-TRANSFER"])
def test_a_client_cannot_say_where_kv_is_fetched(name: str) -> None:
    """The engines assert that all such headers are the proxy's."""
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d]) as (url, _, _):
        ask(url, headers={name: "evil"}, prompt="short")
        ask(url, headers={name: "evil"})
        ask(url, "/tokenize", headers={name: "evil"})
        assert [each is not None for each in d.params] == [False, True, False], f"{d.params}. {LOOK_HEADER}"
        for headers in (*p.headers, *d.headers):
            values = [value for key, value in headers.items() if key.lower() == HEADER]
            assert "evil" not in values and len(values) <= 1, f"{headers}. {LOOK_HEADER}"


def test_a_stream_passes_byte_for_byte() -> None:
    p, d = FakeEngine("p"), FakeEngine("d", answer_stream)
    with proxied([p], [d]) as (url, proxy, _):
        with stream(url) as response:
            got = response.read()
        expected = b"".join(f'data: {{"n":{number},"é":"☃"}}\n\n'.encode() for number in range(3))
        assert got == expected + b"data: [DONE]\n\n", f"got {got!r}. {LOOK}"
        check_idle(proxy)


# When the decode engine computes the prompt itself


def test_a_prompt_with_few_new_characters_is_not_sent_away() -> None:
    """New is what this decode engine was not sent before."""
    p, d1, d2 = FakeEngine("p"), FakeEngine("d1"), FakeEngine("d2")
    with proxied([p], [d1, d2]) as (url, proxy, _):
        ask(url, prompt="Hello")  # d1
        assert d1.params == [None] and p.num_requests == 0, f"5 characters are few: {d1.params}. {LOOK}"
        for number in (1, 2):  # d2, d1
            ask(url)
            assert p.num_requests == number, f"d{3 - number} has not been sent this prompt before. {LOOK}"
        ask(url, prompt=LONG + "?" * 900)  # d2
        assert p.num_requests == 2, f"2,200 characters are in its cache, 900 are new, 1000 is the limit. {LOOK}"
        ask(url, prompt=LONG + "!" * 1_100)  # d1
        assert p.num_requests == 3, f"1,100 characters are new. {LOOK}"
        assert (remote_prefills(proxy), local_prefills(proxy)) == (3, {"short": 2}), f"{local_prefills(proxy)}. {LOOK}"


def test_the_limit_can_be_set() -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d], remote_prefill_chars=3) as (url, _, _):
        for prompt, expected in (("ab", 0), ("xyz", 1), ("xyz", 1)):
            ask(url, prompt=prompt)
            assert p.num_requests == expected, f"after {prompt!r}: expected {expected}, got {p.num_requests}. {LOOK}"


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({**BODY, "truncate_prompt_tokens": -1}).encode(),
        json.dumps({**BODY, "prompt_logprobs": 0}).encode(),
        json.dumps({**BODY, "echo": True}).encode(),
        f'["{LONG}"]'.encode(), b"{" + LONG.encode(), b"\xff" * 2_000, b"", b"[" * 50_000,
    ],
)  # fmt: skip
def test_requests_that_one_engine_has_to_answer_alone(raw: bytes) -> None:
    p, d = FakeEngine("p"), FakeEngine("d", answer_status(200))
    with proxied([p], [d], remote_prefill_chars=0) as (url, proxy, _):
        assert post(f"{url}/v1/completions", raw).status_code == 200, LOOK_BODY
        assert (d.bodies, d.params, p.num_requests) == ([raw], [None], 0), f"{d.params}, {p.num_requests}. {LOOK_BODY}"
        assert local_prefills(proxy) == {"other": 1}, f"{local_prefills(proxy)}. {LOOK_BODY}"


def test_what_computes_no_prompt_is_not_sent_to_a_prefill_engine() -> None:
    p, d = FakeEngine("p"), FakeEngine("d", answer_status(200))
    with proxied([p], [d]) as (url, proxy, _):
        assert ask(url, "/tokenize").status_code == 200, LOOK
        assert httpx.get(f"{url}/v1/models", headers=KEY, trust_env=False).status_code == 200, LOOK
        assert (d.params, p.num_requests, local_prefills(proxy)) == ([None, None], 0, {}), f"{d.params}. {LOOK}"
        ask(url)
        assert p.num_requests == 1, f"/tokenize has not put the prompt in the cache. {LOOK}"


# When a prefill engine fails


@pytest.mark.parametrize(
    ("handler", "num_failures"),
    [(hang_up, 1), (answer_status(503), 1), (answer_status(500), 1), (answer_status(429), 0)],
)
def test_another_prefill_engine_is_asked(handler: Any, num_failures: int) -> None:
    a, b, d = FakeEngine("a", prefill=handler), FakeEngine("b"), FakeEngine("d")
    with proxied([a, b], [d]) as (url, proxy, _):
        assert ask(url).status_code == 200, LOOK_ASK
        assert (a.num_requests, b.num_requests, d.num_requests) == (1, 1, 1), f"{a.num_requests}, {b.num_requests}"
        assert d.params[0] is not None and d.params[0].sources == (source("b"),), f"{d.params}. {LOOK_ASK}"
        assert b.params[0] is not None and d.params[0].transfer_id == b.params[0].transfer_id, LOOK_ASK
        got = proxy.pool.find(a.url).breaker.num_failures
        assert got == num_failures, f"failures that count: expected {num_failures}, got {got}. {LOOK_ASK}"
        check_idle(proxy)


@pytest.mark.parametrize("handler", [hang_up, answer_status(503), answer_status(429), answer_status(400)])
def test_without_another_one_the_decode_engine_does_it(handler: Any) -> None:
    p, d = FakeEngine("p", prefill=handler), FakeEngine("d")
    with proxied([p], [d]) as (url, proxy, _):
        before = proxy.pool.retries.balance
        got = ask(url)
        assert proxy.pool.retries.balance >= before, f"nothing was tried again. {LOOK}"
        assert got.status_code == 200 and got.json()["body"] == BODY, f"{got.text}. {LOOK}"
        assert (d.params, p.num_requests) == ([None], 1), f"{d.params}, {p.num_requests} tries. {LOOK}"
        assert local_prefills(proxy) == {"failed": 1} and remote_prefills(proxy) == 0, (
            f"{local_prefills(proxy)}. {LOOK}"
        )
        check_idle(proxy)


def test_no_more_than_two_are_asked_and_no_more_than_the_budget_for_retries_allows() -> None:
    engines, d = [FakeEngine(name, prefill=hang_up) for name in "abc"], FakeEngine("d")
    with proxied(engines, [d], remote_prefill_chars=0) as (url, proxy, _):
        ask(url)
        assert sum(engine.num_requests for engine in engines) == 2, f"a try and a second one. {LOOK}"
        proxy.pool.retries.balance = 0.0
        ask(url)
        assert sum(engine.num_requests for engine in engines) == 3, f"the budget allows no retry. {LOOK}"
        assert d.params == [None, None], f"{d.params}. {LOOK}"


def test_a_bad_request_is_asked_for_once_and_its_error_is_the_answer() -> None:
    """All engines would refuse it. A client that sends many must not spend the others' budget for retries."""
    a, b = FakeEngine("a", prefill=answer_status(400)), FakeEngine("b", prefill=answer_status(400))
    d = FakeEngine("d", answer_status(422))
    with proxied([a, b], [d]) as (url, proxy, _):
        before = proxy.pool.retries.balance
        assert ask(url).status_code == 422, f"the decode engine's error is the answer. {LOOK}"
        assert a.num_requests + b.num_requests == 1 and proxy.pool.retries.balance >= before, LOOK_ASK


def test_an_engine_that_is_gone_or_fails_often_is_left_alone() -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d], remote_prefill_chars=0, health_interval=3_600.0) as (url, proxy, servers):
        servers.stop(p)
        replica = proxy.pool.find(p.url)
        replica.breaker.open_s = replica.breaker.max_open_s = 3_600
        for _ in range(5):
            assert ask(url).status_code == 200, LOOK
        assert replica.num_failures == 3, f"the circuit opens after 3 failures, got {replica.num_failures}. {LOOK_ASK}"
        assert local_prefills(proxy) == {"failed": 3, "no_engine": 2}, f"{local_prefills(proxy)}. {LOOK}"


def test_an_engine_that_admits_nothing_does_not_hold_a_request_up() -> None:
    p, d = FakeEngine("p", may_admit=False), FakeEngine("d")
    with proxied([p], [d], health_timeout=1.0) as (url, proxy, _):
        assert ask(url).json()["replica"] == "d" and d.params == [None], f"{d.params}. {LOOK_ASK}"
        until(lambda: p.num_prefills_left == 1, f"its connection to be closed. {LOOK_ASK}")
        assert proxy.pool.find(p.url).breaker.num_failures == 1, LOOK_ASK
        check_idle(proxy)


def test_a_prefill_engine_that_breaks_off_changes_nothing() -> None:
    """The decode engine notices by itself."""
    p, d = FakeEngine("p", prefill=break_off_prefill), FakeEngine("d", answer_stream, gate=0)
    with proxied([p], [d]) as (url, proxy, _):
        with stream(url) as response:
            until(lambda: proxy.pool.find(p.url).num_failures == 1, f"the failure to count. {LOOK_END}")
            d.gate = 100
            assert response.read().endswith(b"data: [DONE]\n\n"), LOOK_END
        assert (p.num_requests, d.num_requests) == (1, 1), LOOK_END
        check_idle(proxy)


# When the client leaves, and when the decode engine fails


def test_a_client_that_leaves_ends_both() -> None:
    p, d = FakeEngine("p", may_finish=False), FakeEngine("d", answer_stream, gate=1)
    with proxied([p], [d]) as (url, proxy, _):
        with stream(url) as response:
            next(response.iter_raw())
        until(lambda: d.num_left == 1 and p.num_prefills_left == 1, f"both engines to notice. {LOOK_END}")
        check_idle(proxy)
        assert [replica.num_failures for replica in proxy.pool.replicas] == [0, 0], f"none has failed. {LOOK_END}"


def test_a_client_that_leaves_before_the_prompt_is_admitted() -> None:
    p, d = FakeEngine("p", may_admit=False), FakeEngine("d")
    with proxied([p], [d]) as (url, proxy, _):
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=BODY, headers=KEY, timeout=httpx.Timeout(60, read=0.3))
        until(lambda: p.num_prefills_left == 1, f"the prefill engine to notice. {LOOK_ASK}")
        check_idle(proxy)
        assert d.num_requests == 0 and proxy.pool.find(p.url).num_failures == 0, LOOK_ASK


@pytest.mark.parametrize("handler", [hang_up, answer_status(503), answer_status(429), break_off])
def test_another_decode_engine_gets_a_new_transfer(handler: Any) -> None:
    """The first one may have fetched half of it, or may still do so."""
    p, d1, d2 = FakeEngine("p", may_finish=False), FakeEngine("d1", handler), FakeEngine("d2")
    with proxied([p], [d1, d2]) as (url, proxy, _):
        got = ask(url)
        assert got.status_code == 200 and got.json()["replica"] == "d2", f"{got.text}. {LOOK}"
        ids = [each.transfer_id for each in (*p.params, *d1.params, *d2.params) if each is not None]
        assert ids[0] == ids[2] != ids[1] == ids[3] and len(ids) == 4, f"of p, p, d1, d2: {ids}. {LOOK}"
        until(lambda: p.num_prefills_left == 2, f"both prompts to be given up: the answer is there. {LOOK_END}")
        check_idle(proxy)


def test_open_requests_end_when_the_proxy_is_in_a_hurry() -> None:
    p, d = FakeEngine("p", may_finish=False), FakeEngine("d", answer_stream, gate=1)
    with proxied([p], [d], request_timeout=1.0) as (url, proxy, _), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, url, stream=True)
        until(lambda: d.num_requests == 1, "the stream to begin")
        proxy.end_requests()
        assert "the server is shutting down" in answer.result(TIMEOUT_S).text, LOOK_END
        check_idle(proxy)
        assert [replica.num_failures for replica in proxy.pool.replicas] == [0, 0], f"none has failed. {LOOK_END}"


def test_a_proxy_in_a_hurry_asks_no_engine_after_a_prompt_was_given_up() -> None:
    p, d = FakeEngine("p", may_admit=False), FakeEngine("d")
    with proxied([p], [d]) as (url, proxy, _), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, url)
        until(lambda: p.num_requests == 1, "a prefill engine to be asked")
        proxy.end_requests()
        got = answer.result(TIMEOUT_S)
        assert (got.status_code, d.num_requests) == (503, 0), f"{got.status_code}: {got.text}. {LOOK}"
        assert "the server is shutting down" in got.text, f"{got.text}. {LOOK}"
        check_idle(proxy)
        assert [replica.num_failures for replica in proxy.pool.replicas] == [0, 0], f"none has failed. {LOOK_END}"


def test_a_proxy_that_ends_finishes_its_requests() -> None:
    p, d = FakeEngine("p", may_finish=False), FakeEngine("d", answer_stream, gate=1)
    with ThreadPoolExecutor(2) as threads, contextlib.ExitStack() as stack:
        url, proxy, _ = stack.enter_context(proxied([p], [d]))
        answer = threads.submit(ask, url, stream=True)
        until(lambda: d.num_requests == 1, "the stream to begin")
        closing = threads.submit(stack.close)
        with pytest.raises(httpx.HTTPError):  # it listens no longer
            while not closing.done():
                httpx.get(f"{url}/health", trust_env=False)
        d.gate = 100
        assert answer.result(TIMEOUT_S).text.endswith("data: [DONE]\n\n"), LOOK_END
        closing.result(TIMEOUT_S)


# Roles


def test_a_role_changes_while_requests_run() -> None:
    """What is under way ends as it began; what comes next follows the new role."""
    a, b, c = FakeEngine("a"), FakeEngine("b", answer_stream, gate=1), FakeEngine("c")
    with proxied([a], [b], max_requests_per_replica=7) as (url, proxy, servers):
        servers.start(c)
        assert admin("POST", f"{url}/workers", url=c.url).json()["role"] == "decode", f"the default. {LOOK_ROLE}"
        until(lambda: proxy.pool.find(c.url).is_available, "c to be well")
        admin("DELETE", f"{url}/workers", url=c.url)
        until(lambda: len(proxy.pool.replicas) == 2, "c to be gone")
        with stream(url) as response:
            chunks = response.iter_raw()
            got = next(chunks)
            admin("POST", f"{url}/workers", url=c.url, role="decode")
            until(lambda: proxy.pool.find(c.url).is_available, "c to be well")
            assert proxy.pool.queue.max_running == 14, f"7 for each decode engine. {LOOK_ROLE}"
            changed = admin("POST", f"{url}/workers/role", url=b.url + "/", role="prefill")
            assert changed.status_code == 200 and changed.json()["role"] == "prefill", f"{changed.text}. {LOOK_ROLE}"
            assert proxy.pool.queue.max_running == 7, f"7 for the decode engine that is left. {LOOK_ROLE}"
            assert ask(url, prompt="1" * 2_000).json()["replica"] == "c", LOOK_ROLE
            assert ask(url, prompt="2" * 2_000).json()["replica"] == "c", LOOK_ROLE
            prompts = [len([each for each in engine.params if each and not each.sources]) for engine in (a, b, c)]
            assert prompts == [2, 1, 0], f"prompts for a, b and c: {prompts}, of which a had one before. {LOOK_ROLE}"
            b.gate = 100
            got += b"".join(chunks)
        assert got.endswith(b"data: [DONE]\n\n"), f"{got!r}. {LOOK_ROLE}"
        check_idle(proxy)


def test_a_prefill_engine_becomes_a_decode_engine_while_it_computes() -> None:
    p, q, d = FakeEngine("p", may_finish=False), FakeEngine("q"), FakeEngine("d", answer_stream, gate=1)
    with proxied([p, q], [d]) as (url, proxy, _):
        with stream(url) as response:
            chunks = response.iter_raw()
            next(chunks)
            admin("POST", f"{url}/workers/role", url=p.url, role="decode")
            assert proxy.pool.find(p.url).num_pending == 1 and p.num_prefills_left == 0, f"it goes on. {LOOK_ROLE}"
            admin("POST", f"{url}/workers/role", url=d.url, role="prefill")
            assert ask(url, prompt="1" * 2_000).json()["replica"] == "p", LOOK_ROLE
            d.gate = 100
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n"), LOOK_ROLE
        check_idle(proxy)


def test_roles_are_seen_and_set_by_operators_only() -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d]) as (url, _, _), proxied([], [FakeEngine("e")], api_key=None) as (open_url, _, _):
        workers = admin("GET", f"{url}/workers").json()["workers"]
        assert {each["url"]: each["role"] for each in workers} == {p.url: "prefill", d.url: "decode"}, LOOK_ROLE
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert f'router:replica_role{{replica="{p.url}",role="prefill"}} 1.0' in metrics, f"{metrics}. {LOOK_ROLE}"
        for where, headers, status in ((url, {}, 401), (url, {"Authorization": "Bearer x"}, 401), (open_url, KEY, 403)):
            got = admin("POST", f"{where}/workers/role", headers, url=d.url, role="prefill")
            assert got.status_code == status, f"{headers}: expected {status}, got {got.status_code}. {LOOK_ROLE}"
        for fields, word in (
            ({"url": d.url, "role": "both"}, "role: expected decode or prefill, got 'both'"), ({"url": d.url}, "role"),
            ({"role": "decode"}, "url"), ({"url": "http://x:1", "role": "decode"}, "no replica at"),
            ({"url": d.url, "role": ["decode"]}, "role"),
        ):  # fmt: skip
            got = admin("POST", f"{url}/workers/role", **fields)
            assert got.status_code == 400 and word in got.text, f"{fields}: {got.text}. {LOOK_ROLE}"
        got = admin("POST", f"{url}/workers", url="http://x:1", role="x")
        assert got.status_code == 400 and "role" in got.text, f"{got.text}. {LOOK_ROLE}"


def test_a_prefill_engine_is_added() -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([], [d]) as (url, proxy, servers):
        ask(url, prompt="1" * 2_000)
        assert (d.params, local_prefills(proxy)) == ([None], {"no_engine": 1}), f"{d.params}. {LOOK}"
        servers.start(p)
        got = admin("POST", f"{url}/workers", url=p.url, role="prefill")
        assert got.status_code == 202 and got.json()["role"] == "prefill", f"{got.text}. {LOOK_ROLE}"
        wait_for_sources(proxy, [p])
        until(lambda: proxy.pool.find(p.url).is_available, "it to be well")
        assert ask(url).json()["replica"] == "d" and p.num_requests == 1, LOOK_ROLE


def test_without_a_decode_engine_prefill_engines_answer() -> None:
    p, q, d = FakeEngine("p"), FakeEngine("q"), FakeEngine("d")
    with proxied([p, q], [d], max_requests_per_replica=7) as (url, proxy, _):
        d.is_well = False
        until(lambda: not proxy.pool.find(d.url).is_healthy, "the health check to notice")
        assert proxy.pool.queue.max_running == 14, f"7 for each of the two. {LOOK_ROLE}"
        assert [ask(url).json()["replica"] for _ in range(2)] == ["p", "q"], LOOK_ROLE
        assert (p.params, q.params) == ([None], [None]), f"nothing is sent between them: {p.params}. {LOOK}"
        assert local_prefills(proxy) == {"colocated": 2}, f"{local_prefills(proxy)}. {LOOK}"
        p.is_well = q.is_well = False
        until(lambda: not proxy.pool.queue.max_running, f"nothing to be admitted. {LOOK_ROLE}")
        assert ask(url).status_code == 503, LOOK_ROLE
        d.is_well = True
        until(lambda: proxy.pool.find(d.url).is_available, "it to be well")
        assert ask(url).json()["replica"] == "d", LOOK_ROLE


def test_a_prefill_engine_answers_if_all_decode_engines_have_failed() -> None:
    p, d = FakeEngine("p"), FakeEngine("d", hang_up)
    with proxied([p], [d]) as (url, proxy, _):
        assert ask(url).json()["replica"] == "p", LOOK_ROLE
        assert [each and each.sources for each in p.params] == [(), None], f"{p.params}. {LOOK}"
        check_idle(proxy)


def test_a_prefill_engine_is_drained() -> None:
    p, d = FakeEngine("p", may_finish=False), FakeEngine("d", answer_stream, gate=1)
    with proxied([p], [d]) as (url, proxy, _):
        with stream(url) as response:
            chunks = response.iter_raw()
            next(chunks)
            removed = admin("DELETE", f"{url}/workers", url=p.url)
            assert removed.status_code == 202 and removed.json()["is_draining"], f"{removed.text}. {LOOK_ROLE}"
            d.handler = answer_whole  # for those that come now
            assert ask(url, prompt="1" * 2_000).status_code == 200 and p.num_requests == 1, f"it drains. {LOOK_ROLE}"
            assert len(proxy.pool.replicas) == 2 and p.num_prefills_left == 0, f"it still computes. {LOOK_ROLE}"
            p.may_finish = True
            until(lambda: len(proxy.pool.replicas) == 1, f"it to be removed. {LOOK_ROLE}")
            d.gate = 100
            assert b"".join(chunks).endswith(b"data: [DONE]\n\n"), LOOK_ROLE
        check_idle(proxy)


def test_each_role_has_a_policy_of_its_own() -> None:
    """Prompts that begin alike go to the engine that has computed the beginning, in both roles."""
    config = DisaggConfig(prefill=2, decode=2, policy="cache_aware")
    pool, request = RolePool(config), RoutedRequest(LONG)
    for number, role in enumerate((Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE)):
        pool.add(Replica(f"http://{number}", role=role, kv_sources=(source("x"),)))
    chosen = {(pool.choose(request, []), pool.choose_prefill(request, [])) for _ in range(10)}
    assert len(chosen) == 1, f"expected one pair, got {chosen}. {LOOK_ROLE}"
    [(decode, prefill)] = chosen
    assert decode is not None and decode.role is Role.DECODE, LOOK_ROLE
    assert prefill is not None and prefill.role is Role.PREFILL, LOOK_ROLE
    assert (pool.note_prompt(LONG, decode), pool.note_prompt(LONG, decode)) == (len(LONG), 0), LOOK_ROLE
    for replica in (decode, prefill):
        pool.remove(replica)
    left: Any = (pool.policy, pool.prefill_policy)
    assert not any(policy.index.holders for policy in left) and not pool.prompts.holders, (
        f"all is forgotten. {LOOK_ROLE}"
    )


# Where KV can be fetched


def test_an_engine_without_sources_answers_but_computes_nothing_for_others() -> None:
    for info in (None, b"{", b"[]", b'{"sources":[["tcp://x"]]}', b'{"sources":[]}'):
        p, d = FakeEngine("p", info=info), FakeEngine("d")
        with proxied([p], [d]) as (url, proxy, _):
            until(lambda p=p: len(p.info_headers) >= 2, f"it to be asked. {LOOK_INFO}")  # type: ignore[misc]
            assert proxy.pool.find(p.url).is_healthy, f"{info!r}. {LOOK_INFO}"
            assert ask(url).status_code == 200 and p.num_requests == 0, f"{info!r}. {LOOK_INFO}"
            assert local_prefills(proxy) == {"no_engine": 1}, f"{local_prefills(proxy)}. {LOOK}"


def test_sources_are_asked_for_with_each_health_check() -> None:
    p, d = FakeEngine("p", info=None), FakeEngine("d")
    with proxied([p], [d], remote_prefill_chars=0) as (url, proxy, _):
        ask(url)
        replica = proxy.pool.find(p.url)
        for names in (("new",), ("newer", "newest")):  # it was started again
            p.has_sources(*names)
            expected = tuple(map(source, names))
            until(lambda expected=expected: replica.kv_sources == expected, f"{names}. {LOOK_INFO}")  # type: ignore[misc]
            ask(url)
            params = d.params[-1]
            assert params is not None and params.sources == expected, f"expected {names}, got {params}. {LOOK_ASK}"
        p.info = None
        until(lambda: not replica.kv_sources, f"it to say so. {LOOK_INFO}")
        p.has_sources("p")
        until(lambda: replica.kv_sources, "it to say so")
        p.is_well = False
        until(lambda: not replica.kv_sources, f"no sources of an engine that is not well. {LOOK_INFO}")
        assert {each.get("Authorization") for each in p.info_headers} == {"Bearer key"}, LOOK_INFO


def test_a_decode_engine_without_a_connector_gets_no_header() -> None:
    """It would refuse it, and the client would get the error."""
    p, d = FakeEngine("p"), FakeEngine("d", info=None)
    with proxied([p], [d], remote_prefill_chars=0) as (url, _, _):
        assert ask(url).status_code == 200
        assert d.params == [None] and p.num_requests == 0, f"got {d.params}. {LOOK_ASK}"


def test_without_a_key_none_is_sent() -> None:
    p, d = FakeEngine("p"), FakeEngine("d")
    with proxied([p], [d], api_key=None) as (url, _, _):
        assert ask(url).status_code == 200 and p.num_requests == 1, LOOK
        assert not any("Authorization" in each for each in p.info_headers), LOOK_INFO


def test_sources_that_vanish_while_a_prompt_is_admitted() -> None:
    """A header without sources would tell the decode engine to compute the prompt for somebody else."""
    p, d = FakeEngine("p", may_admit=False), FakeEngine("d")
    with proxied([p], [d]) as (url, proxy, _), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(ask, url)
        until(lambda: p.num_requests == 1, "it to be asked")
        p.info = None
        until(lambda: not proxy.pool.find(p.url).kv_sources, "it to say so")
        p.may_admit = True
        answer.result(TIMEOUT_S)
        assert d.params[0] is not None and d.params[0].sources == (source("p"),), f"{d.params}. {LOOK_ASK}"


# Flags and the secret


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({}, "decode"), ({"decode": -1}, "decode"), ({"prefill": 2_000}, "prefill"),
        ({"worker_urls": "http://a:1"}, "worker_urls"), ({"replicas": 1, "decode": 1}, "replicas"),
        ({"decode_urls": "a:1"}, "decode_urls"), ({"prefill_urls": "http://a:1,ftp://a"}, "prefill_urls"),
        ({"prefill_urls": "http://a:1", "decode_urls": "http://A:1/"}, "decode_urls"),
        ({"decode": 1, "remote_prefill_chars": -1}, "remote_prefill_chars"),
        ({"decode": 1, "replica_backend": "ray"}, "replica_backend"), ({"decode": 1, "max_retries": -1}, "max_retries"),
    ],
)  # fmt: skip
def test_flags_that_are_refused(flags: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        DisaggConfig(**flags)
    assert caught.value.field == field, f"{flags}: expected {field}, got {caught.value}. {LOOK_FLAGS}"


def test_the_command_line() -> None:
    argv = ["--prefill", "1", "--decode-urls", "http://a:1, http://b:2", "--policy", "power_of_two"]
    config = parse_config(DisaggConfig, "", "disagg", argv)
    expected = [("http://a:1", Role.DECODE), ("http://b:2", Role.DECODE)]
    assert (config.engines, config.num_to_start, config.policy) == (expected, 1, "power_of_two"), LOOK_FLAGS


@pytest.mark.parametrize(
    ("argv", "error"),
    [([], "--decode: expected at least one engine"), (["--decode-urls", "http://a:1"], "kv_transfer_secret: expected")],
)
def test_a_command_that_cannot_work_says_so(
    argv: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["disagg", "--port", "0", *argv, "--", "--device", "cpu"])
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2 and error in capsys.readouterr().err, LOOK_FLAGS


def test_where_the_secret_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    ours = DisaggConfig(prefill=1, decode=1)
    assert secret_of(ours) != secret_of(ours) and len(secret_of(ours)) >= 32, f"a new one each time. {LOOK_FLAGS}"
    for flags in ({"decode_urls": "http://a:1"}, {"prefill_urls": "http://a:1", "decode": 1}):
        with pytest.raises(FieldError, match=f"kv_transfer_secret: .*{SECRET_VARIABLE}"):
            secret_of(DisaggConfig(**flags))
    with pytest.raises(FieldError, match="kv_transfer_secret: expected at least 8 characters, got 7"):
        secret_of(DisaggConfig(decode=1, kv_transfer_secret="1234567"))
    monkeypatch.setenv(SECRET_VARIABLE, "of the environment")
    assert secret_of(DisaggConfig(decode_urls="http://a:1")) == "of the environment", LOOK_FLAGS
    assert secret_of(DisaggConfig(decode=1, kv_transfer_secret="of the flag")) == "of the flag", LOOK_FLAGS


def test_engines_get_a_connector_unless_they_have_one() -> None:
    for flags, platform, expected in (
        ([], "linux", ["--kv-connector", "shm"]), (["--a"], "darwin", ["--a", "--kv-connector", "tcp"]),
        (["--kv-connector", "tcp"], "linux", ["--kv-connector", "tcp"]),
        (["--kv-connector=tcp"], "linux", ["--kv-connector=tcp"]),
    ):  # fmt: skip
        assert with_kv_connector(flags, platform) == expected, f"{flags}, {platform}. {LOOK_FLAGS}"


# Engines that the proxy has started


class ScriptedProcess:
    """In place of a process: a fake engine that gets the flags and the environment."""

    servers: FakeServers
    made: list[ScriptedProcess]

    def __init__(self, flags: Sequence[str], env: Mapping[str, str]) -> None:
        self.flags, self.env = list(flags), dict(env)
        self.engine = self.servers.start(FakeEngine(f"engine {len(self.made)}"))
        self.url, self.is_stopped = self.engine.url, False
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.loop = asyncio.get_running_loop()
        self.made.append(self)

    @classmethod
    async def start(cls, flags: Sequence[str], host: str = "", env: Mapping[str, str] | None = None) -> ScriptedProcess:
        return cls(flags, env or {})

    def kill(self) -> None:
        self.servers.stop(self.engine)
        self.loop.call_soon_threadsafe(self.ended.set_result, "was killed")

    async def wait(self) -> str:
        return await asyncio.shield(self.ended)

    async def stop(self, timeout_s: float = 0.0) -> None:
        self.is_stopped = True
        if not self.ended.done():
            self.ended.set_result("was stopped")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ScriptedProcess]]:
    monkeypatch.setattr(processes, "ReplicaProcess", ScriptedProcess)
    monkeypatch.setattr(fleet_module, "RESTART_S", 0.01)
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    ScriptedProcess.servers, ScriptedProcess.made = FakeServers(), []
    yield ScriptedProcess
    ScriptedProcess.servers.close()


@contextlib.contextmanager
def with_fleet(engine_flags: Sequence[str] = ()) -> Iterator[tuple[str, Proxy]]:
    app = create_app(DisaggConfig(prefill=1, decode=2, **FAST), ListenConfig(api_key="key"), engine_flags)
    with running_app(app) as url:
        until(lambda: roles(url) == {"prefill": 1, "decode": 2}, f"all to serve. {LOOK_FLEET}")
        yield url, app.state.router


def roles(url: str) -> Counter[str]:
    workers = admin("GET", f"{url}/workers").json()["workers"]
    return Counter(each["role"] for each in workers if not each["is_draining"])


def test_engines_are_started_with_roles_and_share_a_secret(scripted: type[ScriptedProcess]) -> None:
    with with_fleet(["--num-threads", "1"]) as (url, proxy):
        connector = "shm" if sys.platform == "linux" else "tcp"
        for made in scripted.made:
            assert made.flags == ["--num-threads", "1", "--kv-connector", connector], f"{made.flags}. {LOOK_FLEET}"
            assert made.env == {SECRET_VARIABLE: proxy.secret}, f"{made.env}. {LOOK_FLEET}"
    assert all(made.is_stopped for made in scripted.made), f"they end with the proxy. {LOOK_FLEET}"


def test_an_engine_that_dies_is_replaced_by_one_of_its_role(scripted: type[ScriptedProcess]) -> None:
    with with_fleet() as (url, proxy):
        for number, role in enumerate((Role.PREFILL, Role.DECODE, Role.PREFILL)):
            url_of_it = next(replica.url for replica in proxy.pool.replicas if replica.role is role)
            next(made for made in scripted.made if made.url == url_of_it).kill()
            until(lambda number=number: len(scripted.made) == 4 + number, f"another one. {LOOK_FLEET}")  # type: ignore[misc]
            until(lambda: roles(url) == {"prefill": 1, "decode": 2}, f"the same roles, got {roles(url)}. {LOOK_FLEET}")


def test_a_role_that_was_changed_stays_so_when_engines_are_replaced(scripted: type[ScriptedProcess]) -> None:
    with with_fleet() as (url, proxy):
        changed = next(replica for replica in proxy.pool.replicas if replica.role is Role.DECODE)
        admin("POST", f"{url}/workers/role", url=changed.url, role="prefill").raise_for_status()
        next(made for made in scripted.made if made.url == changed.url).kill()
        until(lambda: len(scripted.made) == 4, f"another one. {LOOK_FLEET}")
        until(lambda: roles(url) == {"prefill": 2, "decode": 1}, f"2 and 1, got {roles(url)}. {LOOK_FLEET}")
        until(lambda: not proxy.fleet.is_busy, "all to serve")
        before = {made.url for made in scripted.made}
        got = admin("POST", f"{url}/rollout", model="new")
        assert got.status_code == 200, f"{got.text}. {LOOK_FLEET}"
        assert roles(url) == {"prefill": 2, "decode": 1}, f"as before: {roles(url)}. {LOOK_FLEET}"
        assert not before & {each["url"] for each in got.json()["workers"]}, f"all are new. {LOOK_FLEET}"
        assert all("new" in made.flags for made in scripted.made[4:]), LOOK_FLEET


def test_engines_of_both_roles_can_be_removed(scripted: type[ScriptedProcess]) -> None:
    with with_fleet() as (url, proxy):
        for role, left in (("prefill", {"decode": 2}), ("decode", {"decode": 1})):
            gone = next(replica for replica in proxy.pool.replicas if replica.role.value == role)
            admin("DELETE", f"{url}/workers", url=gone.url).raise_for_status()
            made = next(made for made in scripted.made if made.url == gone.url)
            until(lambda made=made: made.is_stopped, f"its process to end. {LOOK_FLEET}")  # type: ignore[misc]
            assert roles(url) == left, f"expected {left}, got {roles(url)}. {LOOK_FLEET}"
        assert len(scripted.made) == 3 and not proxy.fleet.is_busy, f"none is started in their place. {LOOK_FLEET}"
