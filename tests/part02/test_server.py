"""The HTTP boundary of part 2: complete answers, client disconnects, full queues, and no request causes a 500.

Everything goes over real sockets. Where the order of events matters, the model computes a token only when permitted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import common.serve
from common.sampling_params import SamplingParams
from common.serve import running_app
from part02_streaming.async_engine import AsyncLLM
from part02_streaming.engine import LLM, SAMPLING_FIELDS
from part02_streaming.server import MAX_BODY_BYTES, create_app
from tests.bad_requests import BODIES, BUDGET, INF, JSON_VALUES, NAN, STREAM_OPTIONS, any_bytes
from tests.bad_requests import WRONG_VALUES as ALWAYS_WRONG
from tests.http_checks import (
    CHAT,
    COMPLETIONS,
    DEADLINE_S,
    USER,
    Watched,
    both_endpoints,
    read_until,
    request_bytes,
    send_raw,
    streamed_or_not,
    until,
)

LOOK = 'Look at openai_api.py::parse_request; README "Bad input".'
LOOK_ANSWER = 'Look at openai_api.py::full_response and server.py::create_app; README "Server-sent events".'
LOOK_GONE = 'Look at server.py::EventStream and server.py::collect; README "When the client goes away".'
LOOK_LOOP = 'Look at async_engine.py::AsyncLLM; README "Off the event loop".'
LOOK_QUEUE = 'Look at async_engine.py::AsyncLLM.generate and server.py::add_error_handlers; README "Bad input".'
LOOK_DRAIN = 'Look at server.py::create_app and common/serve.py; README "When the client goes away".'
CONTEXT = 32
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 2, "temperature": 0},
    CHAT: {"messages": [USER], "max_tokens": 2, "temperature": 0},
}
LONG = {"prompt": "Hi", "max_tokens": 1000, "temperature": 0}


class SteppedLLM(LLM):
    """Tokenizer and settings of another LLM; a forward pass waits for a permit, and the next token is always " a"."""

    def __init__(self, llm: LLM) -> None:
        vars(self).update(vars(llm))
        self.permits = threading.Semaphore(0)
        self.is_open = False
        self.num_begun = self.num_tokens = 0
        self.token_id = self.tokenizer.encode(" a")[0]

    def forward(self, token_ids: list[int], first_position: int, cache: object) -> Tensor:
        self.num_begun += 1
        assert all(0 <= token_id < self.model.config.vocab_size for token_id in token_ids), (
            f"no such tokens: {token_ids}"
        )
        if not self.is_open and not self.permits.acquire(timeout=DEADLINE_S):
            raise TimeoutError("no permit for this token; did this run on the event loop's thread?")
        self.num_tokens += 1
        logits = torch.zeros(self.model.config.vocab_size)
        logits[self.token_id] = 1e4  # at any temperature
        return logits

    def allow(self, num_tokens: int) -> None:
        self.permits.release(num_tokens)

    def open(self) -> None:
        """Allow any number of tokens from now on."""
        self.is_open = True
        self.permits.release()


@dataclass
class Server:
    url: str
    llm: LLM
    app: Watched
    client: httpx.Client

    @property
    def engine(self) -> AsyncLLM:
        return self.app.app.state.engine

    def post(self, path: str, body: object) -> httpx.Response:
        """bytes and iterators of bytes are sent unchanged; anything else as JSON."""
        is_raw = isinstance(body, bytes) or hasattr(body, "__next__")
        content: Any = body if is_raw else json.dumps(body).encode()
        try:
            response = self.client.post(path, content=content, headers={"Content-Type": "application/json"})
        except httpx.TimeoutException:
            pytest.fail(f"no answer within {DEADLINE_S} s. {LOOK_ANSWER}")
        if self.app.errors:
            raise self.app.errors.pop()  # what went wrong in the server, where it went wrong
        return response

    def send(self, body: dict[str, Any], path: str = COMPLETIONS) -> socket.socket:
        """Send a request and leave its answer in the socket."""
        return self.send_raw(request_bytes(path, json.dumps(body).encode()))

    def send_raw(self, data: bytes) -> socket.socket:
        return send_raw(self.url, data)

    def until_idle(self, look: str) -> None:
        until(lambda: self.engine.running is None and not self.engine.waiting, f"the engine to become idle. {look}")

    def until_answered(self, look: str) -> None:
        until(lambda: self.app.num_ended == self.app.num_begun, f"the server to be done with all requests. {look}")


@contextlib.contextmanager
def serving(llm: LLM, max_queued_requests: int = 64, is_local: bool = False) -> Iterator[Server]:
    app = Watched(create_app(llm, max_queued_requests, is_local))
    with running_app(app) as url:
        try:
            # verify=False: there is no TLS here, and to load the certificates takes longer than most tests
            with httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False, verify=False) as client:
                yield Server(url, llm, app, client)
        finally:
            if isinstance(llm, SteppedLLM):
                llm.open()  # so that all running requests end
    assert not app.errors, f"no request may raise in the server: {app.errors!r}. Look at server.py::add_error_handlers."


@pytest.fixture(scope="module")
def tiny(llm: LLM) -> Iterator[Server]:
    """The shipped model with a context of 32 tokens: short enough that no request of these tests takes long."""
    short = copy.copy(llm)
    short.max_model_len = CONTEXT
    with serving(short) as server:
        yield server


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    """The same context, and a model without cost: for requests that should not reach it."""
    short = SteppedLLM(llm)
    short.max_model_len = CONTEXT
    short.open()
    with serving(short) as server:
        yield server


@pytest.fixture
def stepped(llm: LLM) -> Iterator[Server]:
    """A server whose model waits for permits, for tests in which the order of events matters."""
    with serving(SteppedLLM(llm)) as server:
        yield server


def steps(server: Server) -> SteppedLLM:
    assert isinstance(server.llm, SteppedLLM)
    return server.llm


def check_error(
    response: httpx.Response, status: int, param: str | None, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """The response is an error in OpenAI's form. Returns its content."""
    text = response.text
    assert response.status_code == status, f"expected status {status}, got {response.status_code}: {text[:200]}. {LOOK}"
    body = response.json()
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, (
        f"an error has OpenAI's form {{'error': {{message, type, param, code}}}}, got {text[:200]}. {LOOK}"
    )
    error = body["error"]
    assert error["type"] == kind, f"expected type {kind}, got {error['type']!r}. {LOOK}"
    assert isinstance(error["message"], str) and error["message"], f"an error needs a message: {text[:200]}. {LOOK}"
    if param is not None:
        assert error["param"] == param, f"expected the error to name {param!r}, got {error['param']!r}: {text}. {LOOK}"
        assert error["message"].startswith(f"{param}: "), f"the message must name {param!r}: {error['message']}. {LOOK}"
    assert len(error["message"]) < 700, f"an error must not echo all that was sent: {error['message'][:100]}…. {LOOK}"
    return error


def check_still_serving(server: Server) -> None:
    response = server.post(COMPLETIONS, GOOD[COMPLETIONS])
    assert response.status_code == 200, f"after a refused request a good one got {response.status_code}. {LOOK}"


def refuse(server: Server, path: str, body: object, param: str | None, *words: str, status: int = 400) -> None:
    error = check_error(server.post(path, body), status, param)
    for word in words:
        assert word in error["message"], f"expected {word!r} in the message, got {error['message']!r}. {LOOK}"
    check_still_serving(server)


# Whole answers


@both_endpoints
def test_all_fields_of_an_answer(tiny: Server, path: str) -> None:
    body = {**GOOD[path], "max_tokens": 5, "ignore_eos": True, "model": "tiny", "stream": False, "user": "Bo"}
    response = tiny.post(path, body)
    assert response.status_code == 200, f"expected 200, got {response.text}. {LOOK_ANSWER}"
    assert response.headers["content-type"] == "application/json", f"got {response.headers}. {LOOK_ANSWER}"
    answer, is_chat = response.json(), path == CHAT
    fields = ["id", "object", "created", "model", "choices", "usage"]
    assert list(answer) == fields, f"fields of an answer: expected {fields}, got {list(answer)}. {LOOK_ANSWER}"
    prefix, kind = ("chatcmpl-", "chat.completion") if is_chat else ("cmpl-", "text_completion")
    assert answer["id"].startswith(prefix), f"expected an id like {prefix}…, got {answer['id']}. {LOOK_ANSWER}"
    assert (answer["object"], answer["model"]) == (kind, "tiny"), f"got {answer}. {LOOK_ANSWER}"
    assert type(answer["created"]) is int and answer["created"] > 1_700_000_000, f"seconds since 1970: {answer}."
    (choice,) = answer["choices"]
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n" if is_chat else "Hi"
    whole = tiny.post(COMPLETIONS, {**GOOD[COMPLETIONS], "prompt": prompt, "max_tokens": 5, "ignore_eos": True})
    text = whole.json()["choices"][0]["text"]
    expected: dict[str, Any] = {"index": 0}
    expected |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    expected |= {"logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert choice == expected, f"expected {expected}, got {choice}. {LOOK_ANSWER}"
    count = len(tiny.llm.tokenizer.encode(prompt))
    usage = {"prompt_tokens": count, "completion_tokens": 5, "total_tokens": count + 5}
    assert answer["usage"] == usage, f"usage: expected {usage}, got {answer['usage']}. {LOOK_ANSWER}"
    assert tiny.post(path, body).json()["id"] != answer["id"], f"each answer has its own id. {LOOK_ANSWER}"


def choice_of(server: Server, path: str, **fields: Any) -> dict[str, Any]:
    response = server.post(path, {**GOOD[path], **fields})
    assert response.status_code == 200, f"{fields}: expected 200, got {response.text}. {LOOK_ANSWER}"
    return response.json()["choices"][0]


def test_why_an_answer_stopped(tiny: Server) -> None:
    free = choice_of(tiny, COMPLETIONS, max_tokens=8, ignore_eos=True)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    first = tiny.llm.generate(tiny.llm.tokenizer.encode("Hi"), params).outputs[0].token_ids[0]
    by_token = choice_of(tiny, COMPLETIONS, max_tokens=8, ignore_eos=True, stop_token_ids=[first])
    got = (by_token["finish_reason"], by_token["stop_reason"], by_token["text"])
    assert got == ("stop", first, ""), f"expected ('stop', {first}, ''), got {got}. {LOOK_ANSWER}"
    stop = free["text"][3:5]
    by_string = choice_of(tiny, COMPLETIONS, max_tokens=8, ignore_eos=True, stop=stop)
    expected = ("stop", stop, free["text"][: free["text"].index(stop)])
    got = (by_string["finish_reason"], by_string["stop_reason"], by_string["text"])
    assert got == expected, f"stop={stop!r}: expected {expected}, got {got}. {LOOK_ANSWER}"
    assert choice_of(tiny, COMPLETIONS, max_tokens=8, ignore_eos=True, stop=[stop, "\n\n\n"]) == by_string


def test_how_many_tokens_by_default(tiny: Server) -> None:
    """OpenAI's defaults: a completion has 16 tokens, a chat what the context leaves."""
    completion = tiny.post(COMPLETIONS, {"prompt": "Hi", "temperature": 0, "ignore_eos": True}).json()["usage"]
    assert completion["completion_tokens"] == 16, f"completions: expected 16 tokens, got {completion}. {LOOK}"
    chat = tiny.post(CHAT, {"messages": [USER], "temperature": 0, "ignore_eos": True}).json()["usage"]
    assert chat["total_tokens"] == CONTEXT, f"chat: expected a context of {CONTEXT} tokens, got {chat}. {LOOK}"
    raised = tiny.post(COMPLETIONS, {"prompt": "Hi", "temperature": 0, "min_tokens": 20}).json()["usage"]
    assert raised["completion_tokens"] == 20, f"min_tokens=20 raises the default of 16, got {raised}. {LOOK}"
    newer = tiny.post(CHAT, {"messages": [USER], "max_completion_tokens": 3, "ignore_eos": True}).json()["usage"]
    assert newer["completion_tokens"] == 3, f"max_completion_tokens=3, got {newer}. {LOOK}"


def test_a_prompt_of_token_ids(tiny: Server) -> None:
    token_ids = tiny.llm.tokenizer.encode(GOOD[COMPLETIONS]["prompt"])
    assert choice_of(tiny, COMPLETIONS, prompt=token_ids) == choice_of(tiny, COMPLETIONS)
    for edge in ([0], [4095], [5] * (CONTEXT - 1)):
        assert choice_of(tiny, COMPLETIONS, prompt=edge)["finish_reason"] in ("stop", "length")


@both_endpoints
def test_fields_that_change_nothing(tiny: Server, path: str) -> None:
    expected = choice_of(tiny, path)
    names = ("model", "stream", "stream_options", "user", "top_k", "top_p", "seed", "stop_token_ids", "stop", "n")
    nulls: dict[str, Any] = dict.fromkeys([*names, "ignore_eos", "min_tokens", "logprobs", "tools", "logit_bias"])
    neutral = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": [], "stop_token_ids": [],
        "logprobs": False, "response_format": {"type": "text"}, "tools": [], "user": "", "min_tokens": 0,
    }  # fmt: skip
    for unchanged in (nulls, neutral):
        got = choice_of(tiny, path, **unchanged)
        assert got == expected, f"{unchanged} change the answer: expected {expected}, got {got}. {LOOK}"


@both_endpoints
def test_a_seed_makes_an_answer_reproducible(tiny: Server, path: str) -> None:
    drawn = [choice_of(tiny, path, max_tokens=8, temperature=1.5, seed=seed) for seed in (7, 7, 8, 9, 10)]
    assert drawn[0] == drawn[1], f"the same seed drew {drawn[0]} and {drawn[1]}. {LOOK}"
    assert any(other != drawn[0] for other in drawn[2:]), f"seeds 7 to 10 all drew {drawn[0]}. {LOOK}"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read(tiny: Server, content_type: str | None) -> None:
    """A web page may send anything else to this server without being asked."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = tiny.client.post(COMPLETIONS, content=json.dumps(GOOD[COMPLETIONS]).encode(), headers=headers)
    error = check_error(response, 415, "Content-Type")
    assert "application/json" in error["message"] and (content_type or "none") in error["message"], f"got {error}"


def test_pages_of_this_machine_only(llm: LLM) -> None:
    with serving(llm, is_local=True) as server:
        for origin, allowed in (("http://localhost:3000", True), ("http://evil.example", False)):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            preflight = server.client.options(CHAT, headers=headers)
            assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed, f"{origin}. {LOOK}"
            answer = server.client.post(CHAT, json=GOOD[CHAT], headers={"Origin": origin})
            assert answer.status_code == (200 if allowed else 403), f"{origin}: got {answer.text}. {LOOK}"
        rebound = server.client.get("/v1/models", headers={"Host": "evil.example"})
        assert rebound.status_code == 403, f"a foreign Host: got {rebound.status_code}. {LOOK}"


def test_the_chat_page(tiny: Server) -> None:
    """More about it in tests/common/test_pages.py."""
    page, head = tiny.client.get("/"), tiny.client.head("/")
    assert (page.status_code, head.status_code) == (200, 200), f"GET and HEAD /: got {page}, {head}. {LOOK}"
    assert "<title>Chat</title>" in page.text and "script-src" in page.headers["content-security-policy"], LOOK


def test_an_answer_is_sent_back_as_it_came(tiny: Server) -> None:
    """As OpenAI's client dumps it: with null and empty lists for what this part does not have."""
    answer = tiny.post(CHAT, {**GOOD[CHAT]}).json()["choices"][0]["message"]
    nothing = {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "name": None,
    }
    body = {**GOOD[CHAT], "messages": [USER, {**answer, **nothing}, {"role": "user", "content": "And then?"}]}
    assert tiny.post(CHAT, body).status_code == 200, f"got {tiny.post(CHAT, body).text}. {LOOK}"


def test_models(tiny: Server) -> None:
    body = tiny.client.get("/v1/models").json()
    assert list(body) == ["object", "data"] and body["object"] == "list", f"got {body}. {LOOK_ANSWER}"
    (model,) = body["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT), f"got {model}."
    assert type(model["created"]) is int and isinstance(model["owned_by"], str), f"got {model}. {LOOK_ANSWER}"


def test_health(llm: LLM) -> None:
    with serving(SteppedLLM(llm)) as server:
        response = server.client.get("/health")
        assert (response.status_code, response.json()["status"]) == (200, "ok"), response.text
        server.engine.shutdown()
        assert server.client.get("/health").status_code == 503, f"the engine has ended: expected 503. {LOOK_LOOP}"


def test_requests_at_once_get_their_own_answers(tiny: Server) -> None:
    prompts = [f"{word} and" for word in "one two three four five six seven eight".split()]
    expected = [choice_of(tiny, COMPLETIONS, prompt=prompt, max_tokens=6) for prompt in prompts]
    got: dict[int, Any] = {}

    def ask(number: int) -> None:
        body = {**GOOD[COMPLETIONS], "prompt": prompts[number], "max_tokens": 6}
        got[number] = httpx.post(tiny.url + COMPLETIONS, json=body, timeout=60, trust_env=False).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, prompt in enumerate(prompts):
        choice = got[number]["choices"][0]
        assert choice == expected[number], f"{prompt!r}: expected {expected[number]}, got {choice}. {LOOK_ANSWER}"


# While an answer is generated


@streamed_or_not
def test_others_are_answered_while_the_model_computes(stepped: Server, stream: bool) -> None:
    with stepped.send({**LONG, "stream": stream}):
        until(lambda: steps(stepped).num_begun, "the model to begin")
        for path in ("/health", "/v1/models"):
            try:
                response = stepped.client.get(path)
            except httpx.TimeoutException:
                pytest.fail(f"{path} had to wait for the model. {LOOK_LOOP}")
            assert response.status_code == 200, f"{path}: got {response.text}. {LOOK_LOOP}"
        refused = stepped.post(COMPLETIONS, {"prompt": ""})
        check_error(refused, 400, "prompt")
        assert steps(stepped).num_tokens == 0, "the model had no permit: no token can be there"


@streamed_or_not
def test_a_full_queue_is_429(llm: LLM, stream: bool) -> None:
    with serving(SteppedLLM(llm), max_queued_requests=1) as server, contextlib.ExitStack() as stack:
        body = {**LONG, "stream": stream}
        running = stack.enter_context(server.send(body))
        until(lambda: server.engine.running, f"the first request to run. {LOOK_QUEUE}")
        waiting = stack.enter_context(server.send(body))
        until(lambda: len(server.engine.waiting) == 1, f"the second request to wait. {LOOK_QUEUE}")
        for path in (COMPLETIONS, CHAT):
            refused = server.post(path, {**GOOD[path], "stream": stream})
            error = check_error(refused, 429, None, "rate_limit_error")
            assert "max_queued_requests" in error["message"], f"the message names the limit: {error}. {LOOK_QUEUE}"
            retry = refused.headers.get("retry-after", "")
            assert re.fullmatch("[1-9][0-9]*", retry), f"expected Retry-After in seconds, got {retry!r}. {LOOK_QUEUE}"
        check_error(server.post(COMPLETIONS, {"prompt": ""}), 400, "prompt")  # an invalid request still gets its error
        waiting.close()
        until(lambda: not server.engine.waiting, f"the place of a disconnected client to be free. {LOOK_GONE}")
        stack.enter_context(server.send({**LONG, "max_tokens": 1}))
        until(lambda: len(server.engine.waiting) == 1, f"a request to take the free place. {LOOK_QUEUE}")
        running.close()
        steps(server).open()
        server.until_idle(LOOK_GONE)
        check_still_serving(server)


# Client disconnects


@both_endpoints
def test_a_stream_that_is_closed_stops_the_model(stepped: Server, path: str) -> None:
    llm = steps(stepped)
    with stepped.send({**GOOD[path], "max_tokens": 1000, "stream": True}, path) as connection:
        llm.allow(3)
        read_until(connection, b'" a"', times=3)
    check_stops(stepped, num_computed=3)


@both_endpoints
def test_a_client_that_disconnects_while_an_answer_is_collected(stepped: Server, path: str) -> None:
    llm = steps(stepped)
    with stepped.send({**GOOD[path], "max_tokens": 1000}, path):
        llm.allow(3)
        until(lambda: llm.num_tokens == 3, "three tokens")
    check_stops(stepped, num_computed=3)


def check_stops(server: Server, num_computed: int) -> None:
    """The only client has disconnected: the engine counts one abort and computes at most two more tokens."""
    llm = steps(server)
    until(lambda: server.engine.num_aborted, f"the request to be aborted when its client disconnects. {LOOK_GONE}")
    llm.allow(500)
    server.until_idle(LOOK_GONE)
    num_late = llm.num_tokens - num_computed
    assert num_late <= 2, f"the model stops within two tokens: it computed {num_late} more. {LOOK_GONE}"
    server.until_answered(LOOK_GONE)
    assert server.engine.num_aborted == 1, f"expected one abort, got {server.engine.num_aborted}. {LOOK_GONE}"
    llm.open()
    check_still_serving(server)


@streamed_or_not
def test_a_waiting_client_that_disconnects(stepped: Server, stream: bool) -> None:
    llm = steps(stepped)
    with stepped.send({**LONG, "max_tokens": 4}) as first:
        until(lambda: stepped.engine.running, f"the first request to run. {LOOK_QUEUE}")
        with stepped.send({**LONG, "stream": stream}):
            until(lambda: stepped.engine.waiting, f"the second request to wait. {LOOK_QUEUE}")
        until(
            lambda: not stepped.engine.waiting,
            f"the queue to drop the request whose client has disconnected. {LOOK_GONE}",
        )
        assert stepped.engine.num_aborted == 1, f"expected 1 abort, got {stepped.engine.num_aborted}. {LOOK_GONE}"
        llm.allow(100)
        answer = read_until(first, b'"total_tokens":')
        assert b" a a a a" in answer, f"the other request must get its whole answer: {answer!r}. {LOOK_GONE}"
    stepped.until_idle(LOOK_GONE)
    assert llm.num_tokens == 4, f"only the first request's 4 tokens: the model computed {llm.num_tokens}. {LOOK_GONE}"
    stepped.until_answered(LOOK_GONE)


@streamed_or_not
def test_a_client_that_disconnects_at_once(stepped: Server, stream: bool) -> None:
    """Whether the server has read the request when the connection ends, is parsing it or has queued it."""
    llm = steps(stepped)
    for number in range(1, 21):
        stepped.send({**LONG, "stream": stream}).close()
        until(
            lambda number=number: stepped.app.num_ended == number,
            f"the server to notice the disconnect. {LOOK_GONE}",
        )
        assert not stepped.engine.waiting or stepped.engine.running, (
            f"a request without a client is waiting. {LOOK_GONE}"
        )
    before = llm.num_tokens
    llm.allow(500)
    stepped.until_idle(LOOK_GONE)
    assert llm.num_tokens - before <= 2, (
        f"all clients have disconnected, but {llm.num_tokens - before} tokens were computed. {LOOK_GONE}"
    )
    llm.open()
    check_still_serving(stepped)


def test_a_request_that_is_cut_off(stepped: Server) -> None:
    whole = request_bytes(COMPLETIONS, json.dumps(LONG).encode())
    for end in (1, 10, 30, whole.index(b"\r\n\r\n") + 4, len(whole) - 20, len(whole) - 1):
        stepped.send_raw(whole[:end]).close()
    until(lambda: stepped.app.num_ended == 3, f"the server to be done with three requests with a head. {LOOK_GONE}")
    assert stepped.client.get("/health").status_code == 200
    llm = steps(stepped)
    assert llm.num_begun == 0, (
        f"an incomplete request must not reach the model, which began {llm.num_begun} times. {LOOK_GONE}"
    )
    assert stepped.engine.num_aborted == 0, f"nothing was queued, {stepped.engine.num_aborted} aborted. {LOOK_GONE}"
    llm.open()
    check_still_serving(stepped)


def test_the_next_request_on_a_connection_after_a_whole_stream(stepped: Server) -> None:
    """A stream that was read to its end is not aborted, and its connection serves the next request."""
    steps(stepped).open()
    for _ in range(3):
        response = stepped.post(COMPLETIONS, {**GOOD[COMPLETIONS], "stream": True})
        assert response.text.endswith("data: [DONE]\n\n"), f"got {response.text!r}. {LOOK_ANSWER}"
    assert len(stepped.client._transport._pool.connections) == 1, f"the stream closed its connection. {LOOK_GONE}"
    stepped.until_answered(LOOK_GONE)
    assert stepped.engine.num_aborted == 0, f"expected no abort, got {stepped.engine.num_aborted}. {LOOK_GONE}"


# The end of the server


@streamed_or_not
def test_open_requests_are_finished_when_the_server_ends(llm: LLM, stream: bool) -> None:
    stepped, app_ended = SteppedLLM(llm), threading.Event()
    app = create_app(stepped)
    serve = running_app(app)
    server = Server(serve.__enter__(), stepped, Watched(app), httpx.Client(verify=False))

    def end() -> None:
        serve.__exit__(None, None, None)
        app_ended.set()

    try:
        connection = server.send({**LONG, "max_tokens": 5, "stream": stream})
        stepped.allow(1)
        until(lambda: stepped.num_begun == 2, "a token")
        threading.Thread(target=end, daemon=True).start()
        until(lambda: not accepts(server), f"the server to refuse new connections. {LOOK_DRAIN}")
        assert not app_ended.is_set(), f"the server ended while a request was open. {LOOK_DRAIN}"
        assert app.state.engine.running, f"the request was dropped at the server's shutdown. {LOOK_DRAIN}"
    finally:
        stepped.open()
    answer = read_until(connection, b"data: [DONE]\n\n" if stream else b'"total_tokens":')
    assert answer.partition(b"\r\n\r\n")[2].count(b" a") == 5, f"expected all 5 tokens, got {answer!r}. {LOOK_DRAIN}"
    connection.close()
    until(app_ended.is_set, f"the server to end when its last request has. {LOOK_DRAIN}")
    assert not app.state.engine.is_alive, f"the engine's thread outlives the server. {LOOK_DRAIN}"
    assert app.state.engine.num_aborted == 0, f"expected no abort, got {app.state.engine.num_aborted}. {LOOK_DRAIN}"


def accepts(server: Server) -> bool:
    try:
        server.send_raw(b"").close()
    except OSError:
        return False
    return True


@streamed_or_not
def test_a_request_that_takes_too_long_ends_with_an_error(
    llm: LLM, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the time for open requests is over, their clients are told so in OpenAI's form."""
    monkeypatch.setattr(common.serve, "DRAIN_TIMEOUT_S", 0.1)
    stepped, app_ended = SteppedLLM(llm), threading.Event()
    app = create_app(stepped)
    serve = running_app(app)
    server = Server(serve.__enter__(), stepped, Watched(app), httpx.Client(verify=False))

    def end() -> None:
        serve.__exit__(None, None, None)
        app_ended.set()

    try:
        with server.send({**LONG, "stream": stream}) as connection:
            until(lambda: stepped.num_begun, "the model to begin")
            threading.Thread(target=end, daemon=True).start()
            answer = read_until(connection, b"data: [DONE]\n\n" if stream else b'"code":')
            assert b"the server is shutting down" in answer, f"expected the reason, got {answer!r}. {LOOK_DRAIN}"
            assert b'"service_unavailable"' in answer and (stream or b" 503 " in answer), (
                f"the request may succeed elsewhere: expected 503 service_unavailable, got {answer!r}. {LOOK_DRAIN}"
            )
    finally:
        stepped.allow(2)
        stepped.is_open = True
    until(app_ended.is_set, f"the server to end. {LOOK_DRAIN}")
    assert not app.state.engine.is_alive, f"the engine's thread outlives the server. {LOOK_DRAIN}"
    assert stepped.num_tokens <= 2, f"the request computed {stepped.num_tokens} tokens. {LOOK_DRAIN}"


# Bad requests

WRONG_VALUES: dict[str, list[object]] = {
    **ALWAYS_WRONG,
    "stop_token_ids": [*ALWAYS_WRONG["stop_token_ids"], [4096]],
    "n": [2, 0, -1, 1.5, True, "1", [], {}, 10**30, NAN],
    "logprobs": [True, 0, 1, 5, "yes", []],
    "presence_penalty": [0.5, -2, "0", False, [], NAN],
    "frequency_penalty": [0.5, 3, "0", False],
    "logit_bias": [{"5": 1}, [], 5, ""],
    "tools": [[{}], {}, "x"],
    "response_format": [{"type": "json_object"}, {}, [], "text"],
    "echo": [True, 0, ""],
    "best_of": [2, 0, True],
}  # fmt: skip


@both_endpoints
@pytest.mark.parametrize("field", WRONG_VALUES)
def test_a_wrong_value_is_refused(server: Server, path: str, field: str) -> None:
    for value in WRONG_VALUES[field]:
        refuse(server, path, {**GOOD[path], field: value}, field, "expected")


@pytest.mark.parametrize("value", ["5", 1.5, 20.5, True, False, [], {}, -1, NAN, INF, ""])
@both_endpoints
def test_a_wrong_min_tokens_where_max_tokens_has_its_default(server: Server, path: str, value: object) -> None:
    body = {name: v for name, v in GOOD[path].items() if name != "max_tokens"}
    refuse(server, path, {**body, "min_tokens": value}, "min_tokens", "expected")


@both_endpoints
def test_huge_numbers_that_are_within_limits(server: Server, path: str) -> None:
    body = {name: value for name, value in GOOD[path].items() if name != "max_tokens"}
    for fields in ({"max_tokens": 10**30, "top_k": 10**30}, {"min_tokens": 10**400}, {"seed": 2**63 - 1}):
        usage = server.post(path, {**body, "ignore_eos": True, **fields}).json()["usage"]
        is_short = path == COMPLETIONS and "seed" in fields
        assert usage["completion_tokens"] == 16 if is_short else usage["total_tokens"] == CONTEXT, f"{fields}: {usage}"


@pytest.mark.parametrize("value", ["5", 1.5, True, [], {}, 0, -1, ""])
def test_a_wrong_max_completion_tokens(server: Server, value: object) -> None:
    refuse(server, CHAT, {"messages": [USER], "max_completion_tokens": value}, "max_completion_tokens", "expected")


def test_two_limits_that_contradict_each_other(server: Server) -> None:
    body = {"messages": [USER], "max_tokens": 2, "max_completion_tokens": 3}
    refuse(server, CHAT, body, "max_completion_tokens", "contradicts", "max_tokens")
    assert choice_of(server, CHAT, max_completion_tokens=2)["finish_reason"] == "length", f"both say 2. {LOOK}"
    refuse(
        server,
        COMPLETIONS,
        {**GOOD[COMPLETIONS], "max_completion_tokens": 2},
        "max_completion_tokens",
        "not supported here",
    )


@both_endpoints
@pytest.mark.parametrize("case", STREAM_OPTIONS)
def test_wrong_stream_options(server: Server, path: str, case: str) -> None:
    fields, param = STREAM_OPTIONS[case]
    refuse(server, path, {**GOOD[path], **fields}, param)


@both_endpoints
@pytest.mark.parametrize("stream", [None, False, True])
@pytest.mark.parametrize("name", ["gpt-9", "", "Tiny", "\ud800", "x" * 5000, 5, True, [], {}])
def test_an_unknown_model_is_404(server: Server, path: str, stream: bool | None, name: object) -> None:
    error = check_error(server.post(path, {**GOOD[path], "model": name, "stream": stream}), 404, "model")
    assert error["code"] == "model_not_found", f"OpenAI's code is model_not_found, got {error['code']!r}. {LOOK}"
    assert "'tiny'" in error["message"], f"the message says which model is served: {error['message']!r}. {LOOK}"
    check_still_serving(server)


PROMPT_CASES: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "no prompt": (COMPLETIONS, {}, "prompt", "neither"),
    "prompt is null": (COMPLETIONS, {"prompt": None}, "prompt", "neither"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "prompt", "empty"),
    "prompt is a number": (COMPLETIONS, {"prompt": 5}, "prompt", "expected text"),
    "prompt is false": (COMPLETIONS, {"prompt": False}, "prompt", "expected text"),
    "prompt is an object": (COMPLETIONS, {"prompt": {}}, "prompt", "expected text"),
    "a list of strings": (COMPLETIONS, {"prompt": ["Hi"]}, "prompt[0]", "token id"),
    "a list of lists": (COMPLETIONS, {"prompt": [[1, 2]]}, "prompt[0]", "token id"),
    "no token ids": (COMPLETIONS, {"prompt": []}, "prompt", "empty"),
    "token id too high": (COMPLETIONS, {"prompt": [5, 4096]}, "prompt[1]", "4095"),
    "token id far too high": (COMPLETIONS, {"prompt": [10**40]}, "prompt[0]", "4095"),
    "negative token id": (COMPLETIONS, {"prompt": [5, 6, -1]}, "prompt[2]", "token id"),
    "token id true": (COMPLETIONS, {"prompt": [True]}, "prompt[0]", "token id"),
    "token id 1.5": (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]", "token id"),
    "token id null": (COMPLETIONS, {"prompt": [None]}, "prompt[0]", "token id"),
    "token id NaN": (COMPLETIONS, {"prompt": [NAN]}, "prompt[0]", "token id"),
    "half a surrogate pair": (COMPLETIONS, {"prompt": "a\ud800b"}, "prompt", "surrogate"),
    "messages to completions": (COMPLETIONS, {"messages": [USER]}, "messages", "not supported here"),
    "prompt to chat": (CHAT, {"prompt": "Hi"}, "prompt", "not supported here"),
    "no messages": (CHAT, {}, None, "messages"),
    "empty messages": (CHAT, {"messages": []}, "messages", "at least one"),
    "messages is text": (CHAT, {"messages": "Hi"}, "messages", "list"),
    "messages is an object": (CHAT, {"messages": USER}, "messages", "list"),
    "messages is a number": (CHAT, {"messages": 0}, "messages", "list"),
    "a message is text": (CHAT, {"messages": [USER, "Hi"]}, "messages[1]", "role and content"),
    "a message is null": (CHAT, {"messages": [None]}, "messages[0]", "role and content"),
    "unknown role": (CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role", "'robot'"),
    "role is half a surrogate": (CHAT, {"messages": [{"role": "\ud800", "content": ""}]}, "messages[0].role", "user"),
    "no role": (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role", "user"),
    "role is a list": (CHAT, {"messages": [{"role": [], "content": "Hi"}]}, "messages[0].role", "user"),
    "no content": (CHAT, {"messages": [USER, {"role": "user"}]}, "messages[1].content", "expected text"),
    "content is null": (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "text"),
    "content is a list": (CHAT, {"messages": [{"role": "user", "content": []}]}, "messages[0].content", "text"),
    "half a pair in a message": (CHAT, {"messages": [{**USER, "content": "\udfff"}]}, "messages[0].content", "pair"),
    "tool calls": (CHAT, {"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROMPT_CASES)
def test_a_wrong_prompt_is_refused(server: Server, case: str) -> None:
    path, fields, param, word = PROMPT_CASES[case]
    refuse(server, path, {"max_tokens": 1, **fields}, param, word)
    refuse(server, path, {"max_tokens": 1, "stream": True, **fields}, None, word)


@both_endpoints
def test_fields_of_later_parts_are_refused(server: Server, path: str) -> None:
    """SamplingParams knows them, but this part's engine does not: the server must refuse them first."""
    for name in sorted({spec.name for spec in dataclasses.fields(SamplingParams)} - set(SAMPLING_FIELDS)):
        for value in (1.5, 3):
            refuse(server, path, {**GOOD[path], name: value}, name)


STRANGE_NAMES = ["max_token", "Prompt", "", "\ud800", "x" * 5000, "\n", "'", "id"]


@both_endpoints
@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_an_unknown_field_is_ignored(server: Server, path: str, name: str) -> None:
    """Clients send what other servers have."""
    response = server.post(path, {**GOOD[path], name: 1})
    assert response.status_code == 200, f"got {response.text}. {LOOK}"
    response = server.post(CHAT, {**GOOD[CHAT], "messages": [{**USER, name: 1}]})
    assert response.status_code == 200, f"in a message: got {response.text}. {LOOK}"


def test_the_longest_prompt_that_fits(server: Server) -> None:
    text = {count: "a" + " a" * (count - 1) for count in (CONTEXT - 1, CONTEXT, CONTEXT + 1, 5 * CONTEXT)}
    for count, prompt in text.items():
        assert len(server.llm.tokenizer.encode(prompt)) == count, "this test counts on one token for each ' a'"
    body = {"prompt": text[CONTEXT - 1], "max_tokens": 9, "ignore_eos": True}
    answer = server.post(COMPLETIONS, body).json()
    got = (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"])
    assert got == (1, "length"), f"room for one token: expected (1, 'length'), got {got}. {LOOK}"
    for count in (CONTEXT, CONTEXT + 1, 5 * CONTEXT):
        for prompt in (text[count], [5] * count):
            refuse(server, COMPLETIONS, {"prompt": prompt}, "prompt", f"{count} tokens", f"is {CONTEXT} tokens")
    messages = [{"role": "user", "content": text[CONTEXT]}]
    refuse(server, CHAT, {"messages": messages, "stream": True}, "messages", f"{CONTEXT} tokens", "max_model_len")


def test_a_model_without_a_chat_template(llm: LLM) -> None:
    base = SteppedLLM(llm)
    base.tokenizer = copy.deepcopy(llm.tokenizer)
    base.tokenizer.chat_template = None
    base.open()
    with serving(base) as server:
        refuse(server, CHAT, GOOD[CHAT], "messages", "chat template")


@both_endpoints
@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_not_a_json_object(server: Server, path: str, case: str) -> None:
    refuse(server, path, BODIES[case], "body")


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "max_tokens", "seed", "presence_penalty"])
def test_literals_that_are_not_numbers(server: Server, field: str, literal: bytes) -> None:
    refuse(server, COMPLETIONS, b'{"prompt": "Hi", "%s": %s}' % (field.encode(), literal), field, "expected")


@pytest.mark.parametrize(
    "field", ["temperature", "stop_token_ids", "stop", "prompt", "messages", "model", "n", "stream_options"]
)
def test_a_value_nested_just_not_too_deeply_to_parse(server: Server, field: str) -> None:
    """json.loads fails at some depth; below it the message must be able to quote the parsed value."""
    path = CHAT if field == "messages" else COMPLETIONS
    start = json.dumps({k: v for k, v in GOOD[path].items() if k != field})[:-1].encode()
    statuses = set()
    for depth in range(850, 1010, 3):
        response = server.post(path, start + b', "%s": ' % field.encode() + b"[" * depth + b"]" * depth + b"}")
        check_error(response, 404 if response.status_code == 404 and field == "model" else 400, None)
        statuses.add(response.status_code)
    assert 400 in statuses or field == "model", f"got {statuses}. {LOOK}"
    check_still_serving(server)


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_of_the_limit_and_one_byte_more(server: Server, chunked: bool) -> None:
    def send(size: int) -> httpx.Response:
        raw = json.dumps(GOOD[COMPLETIONS]).encode().ljust(size)
        return server.post(COMPLETIONS, (raw[i : i + 99_999] for i in range(0, size, 99_999)) if chunked else raw)

    response = send(MAX_BODY_BYTES)
    assert response.status_code == 200, f"a body of exactly {MAX_BODY_BYTES} bytes: got {response.text[:200]}. {LOOK}"
    for size in (MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES):
        error = check_error(send(size), 413, "body")
        assert "1,000,000" in error["message"], f"the message names the limit: {error['message']!r}. {LOOK}"
        check_still_serving(server)


def test_a_body_that_never_ends_is_refused_at_the_limit(server: Server) -> None:
    with server.send_raw(request_bytes(COMPLETIONS, b" " * (MAX_BODY_BYTES + 1), length=10**12)) as connection:
        answer = read_until(connection, b'"code":')
    assert answer.startswith(b"HTTP/1.1 413 "), f"expected 413 once the limit is passed, got {answer[:200]!r}. {LOOK}"
    check_still_serving(server)


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", COMPLETIONS, 405, "POST"),
        ("PUT", CHAT, 405, "POST"),
        ("DELETE", CHAT, 405, "POST"),
        ("OPTIONS", CHAT, 405, "POST"),
        ("POST", "/health", 405, "GET"),
        ("POST", "/v1/models", 405, "GET"),
        ("POST", "/generate", 404, None),
        ("POST", "/v1/embeddings", 404, None),
        ("POST", "/completions", 404, None),
        ("GET", "/docs", 404, None),
        ("GET", "/openapi.json", 404, None),
        ("GET", "/v1/%ff", 404, None),
    ],
)
def test_a_wrong_method_or_path(server: Server, method: str, path: str, status: int, allow: str | None) -> None:
    response = server.client.request(method, path, content=json.dumps(GOOD[COMPLETIONS]).encode())
    error = check_error(response, status, None)
    assert error["param"] is None, f"no field is to blame for {method} {path}: {error}. {LOOK}"
    assert response.headers.get("allow") == allow, f"expected Allow: {allow}, got {response.headers}. {LOOK}"
    check_still_serving(server)


# Arbitrary requests

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]) | JSON_VALUES},
        optional={"content": st.text(max_size=8) | JSON_VALUES},
    ),
    max_size=2,
)
FIELD_VALUES: dict[str, st.SearchStrategy] = {
    "prompt": st.text(min_size=1, max_size=20) | st.lists(st.integers(0, 4095), min_size=1, max_size=5),
    "messages": MESSAGES | st.just([USER]),
    "model": st.just("tiny"),
    "max_tokens": st.integers(1, 3),
    "min_tokens": st.integers(0, 3),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(0, 5000),
    "top_p": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "stop_token_ids": st.lists(st.integers(0, 4095), max_size=3),
    "stop": st.text(min_size=1, max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "user": st.text(max_size=5),
    "n": st.just(1),
}
PROMPT_OF = {COMPLETIONS: "prompt", CHAT: "messages"}
OTHERS = sorted(FIELD_VALUES.keys() - {"prompt", "messages"})


@st.composite
def request_bodies(draw: st.DrawFn, path: str) -> dict[str, object]:
    """A prompt, some fields with good values and, in half of the bodies, a field or two with any value at all."""
    names = {PROMPT_OF[path], *draw(st.sets(st.sampled_from(OTHERS), max_size=4))}
    body = {name: draw(FIELD_VALUES[name]) for name in sorted(names)}
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from([*FIELD_VALUES, "logprobs", "x"]), min_size=1, max_size=2)):
            body[name] = draw(JSON_VALUES)
    return body


def check_whole_answer(answer: dict[str, Any], body: object) -> None:
    usage, (choice,) = answer["usage"], answer["choices"]
    assert choice["finish_reason"] in ("stop", "length"), f"{body}: got {answer}. {LOOK_ANSWER}"
    assert usage["completion_tokens"] >= 1, f"{body}: got {usage}. {LOOK_ANSWER}"
    total = usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["total_tokens"] == total <= CONTEXT, f"{body}: {usage} in a context of {CONTEXT}. {LOOK_ANSWER}"


def check_streamed_answer(text: str, body: object) -> None:
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), f"{body}: a stream ends with data: [DONE], got {text[-200:]!r}."
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [r for r in reasons if r] and set(reasons) <= {"stop", "length", None}, f"{body}: got {text}. {LOOK_ANSWER}"


@both_endpoints
def test_any_body_is_answered_or_refused(server: Server, path: str) -> None:
    statuses: list[int] = []

    @settings(max_examples=120, **BUDGET)
    @given(body=request_bodies(path))
    def check(body: dict[str, object]) -> None:
        response = server.post(path, body)
        statuses.append(response.status_code)
        if response.status_code != 200:
            check_error(response, 404 if "model" in body and response.status_code == 404 else 400, None)
        elif response.headers["content-type"].startswith("text/event-stream"):
            check_streamed_answer(response.text, body)
        else:
            check_whole_answer(response.json(), body)

    check()
    assert statuses.count(200) >= 15 and statuses.count(400) >= 15, f"this test should send both kinds: {statuses}"
    check_still_serving(server)


@both_endpoints
def test_any_bytes_are_refused(server: Server, path: str) -> None:
    good = json.dumps(GOOD[path]).encode()

    @settings(max_examples=60, **BUDGET)
    @given(body=any_bytes(good))
    def check(body: bytes) -> None:
        response = server.post(path, body)
        if response.status_code != 200:
            check_error(response, 404 if response.status_code == 404 else 400, None)

    check()
    check_still_serving(server)
