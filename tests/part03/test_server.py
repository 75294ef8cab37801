"""Part 3 over HTTP, end to end: the API gives what LLM.generate gives, and a client that goes away frees its blocks.

What the API takes and refuses is tested in tests/common; here it runs over this part's engine.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from common.outputs import CompletionOutput
from common.prompts import encode_prompt
from common.sampling_params import SamplingParams
from common.serve import ServerConfig, running_app
from part03_paged_attention.api.async_engine import AsyncLLM
from part03_paged_attention.api.server import create_app
from part03_paged_attention.config import EngineConfig
from part03_paged_attention.core.engine import LLMEngine
from part03_paged_attention.llm import LLM
from part03_paged_attention.messages import StepInput, StepOutput
from tests.http_checks import CHAT, COMPLETIONS, DEADLINE_S, both_endpoints, request_bytes, until

LOOK = 'Look at api/server.py::create_app and api/async_engine.py::AsyncLLM; README "What changed".'
LOOK_GONE = 'Look at api/async_engine.py::AsyncLLM.abort; README of part 2, "When the client goes away".'
LOOK_FAIL = "Look at api/async_engine.py::AsyncLLM._step and core/engine.py::LLMEngine.fail."
FLAGS: dict[str, Any] = dict(model="tiny", device="cpu", num_kv_blocks=64, max_num_seqs=4)
TEXTS = ["Once upon a time there was", "What is a KV cache?", "Hi", "a b a b a"]


class Steps:
    """In front of an engine's executor: a step waits for a permit, and can be made to fail."""

    def __init__(self, engine: LLMEngine) -> None:
        self.permits, self.is_open, self.fails = threading.Semaphore(0), False, False
        self.execute, engine.executor.execute = engine.executor.execute, self.wait_and_execute  # type: ignore

    def wait_and_execute(self, step: StepInput) -> StepOutput:
        if not self.is_open and not self.permits.acquire(timeout=DEADLINE_S):
            raise TimeoutError("no permit for this step; did it run on the event loop's thread?")
        if self.fails:
            raise ZeroDivisionError("the cat sat on it")
        return self.execute(step)

    def open(self) -> None:
        self.is_open = True
        self.permits.release()


@dataclass
class Server:
    llm: AsyncLLM
    steps: Steps
    client: httpx.Client

    @property
    def engine(self) -> LLMEngine:
        return self.llm.engine

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """A whole answer."""
        response = self.client.post(path, json=fields)
        assert response.status_code == 200, f"{fields}: expected 200, got {response.text}. {LOOK}"
        return response.json()

    def stream(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of a streamed answer, without [DONE]."""
        response = self.client.post(path, json={**fields, "stream": True})
        assert response.status_code == 200, f"{fields}: expected 200, got {response.text}. {LOOK}"
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events.pop() == "[DONE]", f"a stream ends with [DONE], got {response.text[-200:]}. {LOOK}"
        return [json.loads(event) for event in events]

    def metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        match = re.search(rf"^engine:{name} (\S+)$", text, re.MULTILINE)
        assert match, f"/metrics has no engine:{name}: {text[:2_000]}. {LOOK}"
        return float(match[1])


@contextlib.contextmanager
def serving(is_open: bool = True, api_key: str | None = None, **flags: Any) -> Iterator[Server]:
    """is_open: steps need no permits."""
    llm = AsyncLLM(EngineConfig(**{**FLAGS, **flags}))
    steps = Steps(llm.engine)
    if is_open:
        steps.open()
    with running_app(create_app(llm, ServerConfig(api_key=api_key))) as url:
        try:
            with httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False) as client:
                yield Server(llm, steps, client)
        finally:
            steps.open()  # so that whatever still runs ends


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def stepped() -> Iterator[Server]:
    with serving(is_open=False) as server:
        yield server


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(EngineConfig(**FLAGS))


def body_for(path: str, text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}


def generate(llm: LLM, body: dict[str, Any], **fields: Any) -> CompletionOutput:
    prompt = encode_prompt(body, llm.tokenizer, llm.max_model_len)
    return llm.generate([prompt], SamplingParams(**fields))[0].outputs[0]


def check_all_free(server: Server) -> None:
    until(lambda: not server.engine.has_unfinished_requests, f"the engine to become idle. {LOOK_GONE}")
    used = server.engine.blocks.num_used_blocks
    assert used == 0, f"nothing runs, and {used} blocks are used. {LOOK_GONE}"


@both_endpoints
@pytest.mark.parametrize("fields", [{"temperature": 0}, {"temperature": 1.5, "seed": 5}], ids=str)
def test_streamed_and_whole_answers_are_generates(server: Server, llm: LLM, path: str, fields: dict[str, Any]) -> None:
    for text in TEXTS[:2]:
        body, params = body_for(path, text), {"max_tokens": 8, **fields}
        expected = generate(llm, body, **params)
        whole = server.ask(path, **body, **params)["choices"][0]
        got = whole["message"]["content"] if path == CHAT else whole["text"]
        assert (got, whole["finish_reason"]) == (expected.text, expected.finish_reason), (
            f"{text!r}, {params}: LLM.generate says {expected.text!r}, the server {whole}. {LOOK}"
        )
        events = server.stream(path, **body, **params)
        pieces = [event["choices"][0] for event in events]
        joined = "".join(piece["delta"].get("content", "") if path == CHAT else piece["text"] for piece in pieces)
        assert joined == got, f"{text!r}, {params}: whole {got!r}, streamed {joined!r}. {LOOK}"
        assert pieces[-1]["finish_reason"] == expected.finish_reason, f"{text!r}: got {pieces[-1]}. {LOOK}"
    check_all_free(server)


def test_logprobs(server: Server, llm: LLM) -> None:
    fields: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    expected = generate(llm, {"prompt": TEXTS[0]}, logprobs=2, **fields).logprobs or []
    wanted = [next(iter(entry.values())).logprob for entry in expected]
    got = server.ask(COMPLETIONS, prompt=TEXTS[0], logprobs=2, **fields)["choices"][0]["logprobs"]
    assert got["token_logprobs"] == pytest.approx(wanted, abs=1e-3), f"expected {wanted}, got {got}. {LOOK}"
    chat = server.ask(CHAT, **body_for(CHAT, TEXTS[1]), logprobs=True, top_logprobs=2, **fields)
    wanted = [next(iter(entry.values())).logprob for entry in generate(
        llm, body_for(CHAT, TEXTS[1]), logprobs=2, **fields).logprobs or []]  # fmt: skip
    content = chat["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == pytest.approx(wanted, abs=1e-3), f"got {content}. {LOOK}"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content), f"expected two each, got {content}. {LOOK}"


def test_a_chat_needs_no_max_tokens(server: Server) -> None:
    """Also where the KV cache is smaller than the context."""
    assert server.llm.limits.num_kv_tokens < server.llm.max_model_len
    server.ask(CHAT, messages=[{"role": "user", "content": "Hi"}], temperature=0)


@both_endpoints
def test_two_answers_to_one_prompt(server: Server, llm: LLM, path: str) -> None:
    """They run in one batch, each with a seed of its own."""
    body, fields = body_for(path, TEXTS[0]), {"max_tokens": 8, "temperature": 1.5, "ignore_eos": True}
    choices = server.ask(path, **body, **fields, n=2, seed=7)["choices"]
    got = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in choices]
    expected = [generate(llm, body, **fields, seed=seed).text for seed in (7, 8)]
    assert got == expected, f"n=2, seed=7: expected the answers of seeds 7 and 8, {expected}, got {got}. {LOOK}"
    assert got[0] != got[1], f"two answers at temperature 1.5 are the same: {got}. {LOOK}"


def test_a_batch_of_prompts(server: Server, llm: LLM) -> None:
    """More than run at once, and in the order of the prompts."""
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    prompts = [*TEXTS, "one and", "two and"]
    answer = server.ask(COMPLETIONS, prompt=prompts, **fields)
    got = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    expected = [(number, generate(llm, {"prompt": text}, **fields).text) for number, text in enumerate(prompts)]
    assert got == expected, f"a batch of {len(prompts)} prompts: expected {expected}, got {got}. {LOOK}"
    assert answer["usage"]["completion_tokens"] == 36, f"expected 6 · 6 tokens, got {answer['usage']}. {LOOK}"


def test_penalties_and_bias_reach_the_sampler(server: Server, llm: LLM) -> None:
    fields: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "ignore_eos": True}
    plain = server.ask(COMPLETIONS, prompt="the the the the", **fields)["choices"][0]["text"]
    for change in ({"repetition_penalty": 2.0}, {"frequency_penalty": 2.0}, {"logit_bias": {"100": 100}}):
        got = server.ask(COMPLETIONS, prompt="the the the the", **fields, **change)["choices"][0]["text"]
        expected = generate(llm, {"prompt": "the the the the"}, **fields, **change).text
        assert got == expected, f"{change}: expected {expected!r}, got {got!r}. {LOOK}"
        assert got != plain or "logit_bias" not in change, f"{change} changes nothing: {got!r}. {LOOK}"


def test_a_request_that_can_never_fit_is_refused() -> None:
    with serving(num_kv_blocks=1 + 2) as small:
        response = small.client.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 100})
        assert response.status_code == 400, f"a pool of 32 tokens: expected status 400, got {response.text}. {LOOK}"
        message = response.json()["error"]["message"]
        assert "32 tokens" in message, f"the message names the limit, 32 tokens: {message!r}. {LOOK}"
        assert small.ask(COMPLETIONS, prompt="Hi", max_tokens=5)["choices"], f"a small request still works. {LOOK}"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_blocks(stepped: Server, stream: bool) -> None:
    """Within two steps."""
    engine, steps = stepped.engine, stepped.steps
    body = {"prompt": TEXTS[0], "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": stream}
    content = json.dumps(body).encode()
    url = stepped.client.base_url
    with socket.create_connection((url.host, url.port or 0), timeout=DEADLINE_S) as connection:
        connection.sendall(request_bytes(COMPLETIONS, content))
        until(lambda: engine.running, f"the request to run. {LOOK}")
        steps.permits.release(3)
        until(lambda: engine.num_steps == 3, f"three steps. {LOOK}")
        assert engine.blocks.num_used_blocks > 0, "a request that runs holds blocks"
    until(lambda: stepped.metric("request_aborted_total") == 1, f"the server to notice the client. {LOOK_GONE}")
    steps.permits.release(2)
    check_all_free(stepped)
    assert engine.num_steps <= 5, (
        f"the client is gone: expected at most 2 more steps, got {engine.num_steps - 3}. {LOOK_GONE}"
    )
    steps.open()
    assert stepped.ask(COMPLETIONS, prompt="Hi", max_tokens=3)["choices"], f"the server goes on. {LOOK}"


def test_metrics_while_requests_run_and_wait(stepped: Server) -> None:
    engine, number = stepped.engine, 7
    body = {"prompt": [100] * 20, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    threads = [threading.Thread(target=stepped.ask, args=(COMPLETIONS,), kwargs=body) for _ in range(number)]
    threads[0].start()
    until(lambda: engine.running, f"the first request to run. {LOOK}")
    for thread in threads[1:]:
        thread.start()
    until(lambda: stepped.metric("num_requests_waiting") == number - 1, f"{number - 1} requests to wait. {LOOK}")
    running, usage = stepped.metric("num_requests_running"), stepped.metric("kv_cache_usage_perc")
    assert (running, usage) == (1, 2 / 63), (
        f"one request of 20 tokens in a pool of 63 blocks of 16: expected 1 running and a usage of 2/63, got {running} "
        f"and {usage}. Look at api/async_engine.py::AsyncLLM.stats."
    )
    stepped.steps.open()
    for thread in threads:
        thread.join(DEADLINE_S)
    check_all_free(stepped)
    got = {
        name: stepped.metric(name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    }
    assert set(got.values()) == {0}, f"an idle server: expected 0 everywhere, got {got}. {LOOK}"
    generated = stepped.metric("generation_tokens_total")
    assert generated == 3 * number, f"expected {3 * number} generated tokens, got {generated}. {LOOK}"


def test_a_failed_step_is_a_500_and_the_next_request_succeeds(stepped: Server) -> None:
    stepped.steps.open()
    for _ in range(2):  # with a good step between the two
        stepped.steps.fails = True
        response = stepped.client.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 3})
        assert response.status_code == 500, f"expected 500, got {response.status_code}: {response.text}. {LOOK_FAIL}"
        error = response.json()["error"]
        assert "ZeroDivisionError: the cat sat on it" in error["message"], f"got {error}. {LOOK_FAIL}"
        stepped.steps.fails = False
        check_all_free(stepped)
        assert stepped.ask(COMPLETIONS, prompt="Hi", max_tokens=3)["choices"], f"the server goes on. {LOOK_FAIL}"
        assert stepped.client.get("/health").status_code == 200, f"one failed step ends no engine. {LOOK_FAIL}"


def test_two_failed_steps_in_a_row_end_the_engine(stepped: Server) -> None:
    """Open streams end with an error event, and /health says 503."""
    streamed: list[str] = []

    def stream(max_tokens: int) -> None:
        body = {"prompt": TEXTS[0], "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        streamed.append(stepped.client.post(COMPLETIONS, json=body).text)

    threads = []
    for number in range(2):
        threads.append(threading.Thread(target=stream, args=(20 + number,)))
        threads[-1].start()
        until(lambda: stepped.engine.running, f"the request to run. {LOOK}")
        if number == 0:
            stepped.steps.permits.release(3)
            until(lambda: stepped.engine.num_steps == 3, f"three good steps. {LOOK}")
        stepped.steps.fails = True
        stepped.steps.permits.release(1)
        threads[-1].join(DEADLINE_S)
        assert len(streamed) == number + 1, f"stream {number} did not end with its step. {LOOK_FAIL}"
    for number, text in enumerate(streamed):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert len(events) > 3 * (1 - number), f"stream {number}: the events of good steps come first: {text}."
        error = next((json.loads(event)["error"] for event in events if event.startswith('{"error"')), None)
        assert error is not None and "ZeroDivisionError: the cat sat on it" in error["message"], (
            f"stream {number}: expected an error event with the cause, got {text[-300:]}. {LOOK_FAIL}"
        )
    cause = "two steps in a row failed, the second with ZeroDivisionError: the cat sat on it"
    until(lambda: not stepped.llm.is_alive, f"the engine to end. {LOOK_FAIL}")
    assert stepped.llm.cause_of_death == cause, f"expected {cause!r}, got {stepped.llm.cause_of_death!r}. {LOOK_FAIL}"
    assert stepped.client.get("/health").status_code == 503, (
        f"/health of an engine that has ended: expected 503. {LOOK_FAIL}"
    )
    response = stepped.client.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 3})
    assert response.status_code == 503, f"a request to an engine that has ended: got {response.text}. {LOOK_FAIL}"
    check_all_free(stepped)


def test_api_key() -> None:
    with serving(api_key="secret") as server:
        body = {"prompt": "Hi", "max_tokens": 2}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer secret"}, 200),
        ):
            got = server.client.post(COMPLETIONS, json=body, headers=headers).status_code
            assert got == status, f"--api-key secret, headers {headers}: expected {status}, got {got}. {LOOK}"
        assert server.client.get("/health").status_code == 200, f"/health needs no key. {LOOK}"
