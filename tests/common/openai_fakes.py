"""A scripted engine and a server over it, for the tests of common/openai_app.

The engine answers at once and deterministically, or, with `manual` set, only what a test puts into its streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from common.openai_app import AppOptions, create_app
from common.outputs import CompletionOutput, FinishReason, Logprob
from common.sampling_params import SamplingParams
from common.serve import running_app
from common.serving import GenerationError, QueueFullError
from tests.http_checks import (
    CHAT,
    COMPLETIONS,
    DEADLINE_S,
    USER,
    Watched,
    request_bytes,
    send_raw,
    until,
)

CONTEXT = 64
VOCAB = 4100  # a little more than the tokenizer's 4096, as padded embeddings have
GOOD: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Hi", "max_tokens": 2},
    CHAT: {"messages": [USER], "max_tokens": 2},
}


class FakeStream:
    """One request at the fake engine. `put` adds an output, or an error that ends it, from any thread."""

    def __init__(self, prompt: list[int], params: SamplingParams, extra: dict[str, Any]) -> None:
        self.prompt, self.params, self.extra = prompt, params, extra
        self.ended = False
        self.num_aborts = 0
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[CompletionOutput | Exception | None] = asyncio.Queue()

    def put(self, *outputs: CompletionOutput | Exception | None) -> None:
        """None ends the stream without a finish_reason, as no engine should."""
        for output in outputs:
            self.ended |= not isinstance(output, CompletionOutput) or output.finish_reason is not None
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, output)

    async def __aiter__(self) -> AsyncIterator[CompletionOutput]:
        while (output := await self._outputs.get()) is not None:
            if isinstance(output, Exception):
                raise output
            yield output
            if output.finish_reason:
                return


def delta(
    text: str,
    token_ids: list[int],
    finish_reason: FinishReason | None = None,
    stop_reason: int | str | None = None,
    logprobs: list[dict[int, Logprob]] | None = None,
) -> CompletionOutput:
    return CompletionOutput(0, text, token_ids, finish_reason, stop_reason, logprobs)


class FakeEngine:
    """Token k of an answer is the letter (seed + length of the prompt + k) places after a, with a space.

    letters: the token ids of " a" to " y"; after y comes a again.

    script: what to answer to every request instead. capacity: how many streams may be open at once. refusal: what
    generate raises, if anything.
    """

    model_name = "tiny"
    max_model_len = max_request_len = CONTEXT
    max_num_unfinished = 10_000
    vocab_size = VOCAB

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.letters = [tokenizer.encode(f" {chr(ord('a') + number)}")[0] for number in range(25)]
        self.manual = False
        self.script: list[CompletionOutput | Exception | None] | None = None
        self.is_alive = True
        self.default_sampling: dict[str, Any] = {}
        self.capacity = 10_000
        self.refusal: Exception | None = None
        self.streams: list[FakeStream] = []
        self.calls: list[tuple[str, threading.Thread]] = []
        self.gauges = {"num_requests_running": 3.0, "kv_cache_usage_perc": 0.25}

    def start(self) -> None:
        asyncio.get_running_loop()
        self.calls.append(("start", threading.current_thread()))

    def shutdown(self) -> None:
        self.calls.append(("shutdown", threading.current_thread()))

    def stats(self) -> Mapping[str, float]:
        return self.gauges

    def generate(self, prompt_token_ids: list[int], params: SamplingParams, **extra: Any) -> FakeStream:
        assert params.n == 1, f"the app makes n requests of one sample each, got n={params.n}"
        if self.refusal is not None:
            raise self.refusal
        if self.num_open >= self.capacity:
            raise QueueFullError(f"{self.capacity} requests are waiting (capacity), try again later")
        stream = FakeStream(prompt_token_ids, params, extra)
        self.streams.append(stream)
        if not self.manual:
            stream.put(*(self.answer(prompt_token_ids, params) if self.script is None else self.script))
        return stream

    def abort(self, stream: FakeStream) -> None:
        stream.num_aborts += 1

    def answer(self, prompt: list[int], params: SamplingParams) -> Iterator[CompletionOutput]:
        num_tokens = min(params.max_tokens, self.max_model_len - len(prompt))
        start = len(prompt) + (params.seed or 0)
        for number in range(num_tokens):
            token_id = self.letters[(start + number) % 25]
            output = delta(
                str(self.tokenizer.decode([token_id])),
                [token_id],
                "length" if number == num_tokens - 1 else None,
                logprobs=None if params.logprobs is None else [self.logprobs(token_id, params.logprobs)],
            )
            if number == 0 and params.prompt_logprobs is not None:
                output = replace(output, prompt_logprobs=self.prompt_logprobs(prompt, params.prompt_logprobs))
            yield output

    def logprobs(self, token_id: int, num_top: int) -> dict[int, Logprob]:
        """The sampled token is the second likeliest; the others are the letters after it."""
        place = self.letters.index(token_id)
        others = [self.letters[(place + number) % 25] for number in range(1, num_top + 2)]
        ranked = [others[0], token_id, *others[1:]]
        all_of_them = {token_id: Logprob(-0.5 * 2, 2)}
        all_of_them |= {other: Logprob(-0.5 * rank, rank) for rank, other in enumerate(ranked[:num_top], 1)}
        return all_of_them

    def prompt_logprobs(self, prompt: list[int], num_top: int) -> list[dict[int, Logprob] | None]:
        """The token at position p has the log probability -p and rank 9; the likeliest ones are letters."""
        likeliest = {token_id: Logprob(-0.25 * rank, rank) for rank, token_id in enumerate(self.letters[:num_top], 1)}
        entries = [{token_id: Logprob(-float(place), 9), **likeliest} for place, token_id in enumerate(prompt)]
        return [None, *entries[1:]]

    @property
    def num_open(self) -> int:
        return sum(not (stream.ended or stream.num_aborts) for stream in self.streams)

    @property
    def aborts(self) -> list[int]:
        return [stream.num_aborts for stream in self.streams]


def tasks_of(app: Watched) -> list[str]:
    """The tasks of the app's own code that are still on the event loop."""
    if app.loop is None:
        return []

    async def list_tasks() -> list[str]:
        return [repr(task) for task in asyncio.all_tasks()]

    tasks = asyncio.run_coroutine_threadsafe(list_tasks(), app.loop).result(DEADLINE_S)
    return [task for task in tasks if "common/openai_app" in task]


@dataclass
class Server:
    url: str
    engine: FakeEngine
    app: Watched
    client: httpx.Client

    def post(self, path: str, body: object, **fields: Any) -> httpx.Response:
        """bytes and iterators of bytes are sent unchanged; anything else as JSON, with fields added."""
        is_raw = isinstance(body, bytes) or hasattr(body, "__next__")
        content: Any = body if is_raw else json.dumps({**body, **fields} if fields else body).encode()  # type: ignore[dict-item]
        return self.client.post(path, content=content, headers={"Content-Type": "application/json"})

    def whole(self, path: str, **fields: Any) -> dict[str, Any]:
        """The complete answer to a good request with these fields."""
        response = self.post(path, {**GOOD[path], **fields})
        assert response.status_code == 200, f"expected an answer, got {response.status_code}: {response.text}"
        return response.json()

    def events(self, path: str, **fields: Any) -> list[dict[str, Any]]:
        """The same as events; [DONE] is checked and dropped."""
        response = self.post(path, {**GOOD[path], **fields, "stream": True})
        assert response.status_code == 200, f"expected a stream, got {response.status_code}: {response.text}"
        return parse_events(response.text)

    def send(self, path: str, **fields: Any) -> socket.socket:
        """Send a request and leave its answer in the socket."""
        return self.send_raw(request_bytes(path, json.dumps({**GOOD[path], **fields}).encode()))

    def send_raw(self, data: bytes) -> socket.socket:
        return send_raw(self.url, data)

    def until_streams(self, number: int) -> list[FakeStream]:
        until(lambda: len(self.engine.streams) >= number, f"{number} streams at the engine")
        return self.engine.streams

    def until_answered(self) -> None:
        until(lambda: self.app.num_ended == self.app.num_begun, "the server to be done with all requests")


def parse_events(text: str) -> list[dict[str, Any]]:
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", ""), f"a stream ends with data: [DONE], got {text[-200:]!r}"
    assert all(event.startswith("data: {") for event in events), f"expected one data line per event, got {text!r}"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextlib.contextmanager
def serving(
    engine: FakeEngine, options: AppOptions | None = None, raises: type[Exception] | None = None
) -> Iterator[Server]:
    """A server over the engine. At the end no open stream, task or unexpected exception may be left."""
    app = Watched(create_app(engine, options))
    with (
        running_app(app) as url,
        # verify=False: there is no TLS here, and to load the certificates takes longer than most tests
        httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False, verify=False) as client,
    ):
        server = Server(url, engine, app, client)
        try:
            yield server
            server.until_answered()
            until(lambda: not tasks_of(app), f"all tasks of the requests to have ended: {tasks_of(app)}")
        finally:
            leaked = [number for number, stream in enumerate(engine.streams) if not (stream.ended or stream.num_aborts)]
            for number in leaked:
                engine.streams[number].put(GenerationError("the test is over"))  # or the server would wait for it
    assert not leaked, f"streams {leaked} neither ended nor were aborted"
    assert set(engine.aborts) <= {0, 1}, f"no stream is aborted more than once, got {engine.aborts}"
    unexpected = [error for error in app.errors if raises is None or not isinstance(error, raises)]
    assert not unexpected, f"no request may raise in the server: {unexpected!r}"


def check_error(
    response: httpx.Response, status: int, param: str | None, *words: str, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    """The response is an error in OpenAI's form. Returns its content."""
    assert response.status_code == status, (
        f"expected status {status}, got {response.status_code}: {response.text[:300]}"
    )
    return check_error_body(response.json(), param, *words, kind=kind)


def check_error_body(
    body: dict[str, Any], param: str | None, *words: str, kind: str = "invalid_request_error"
) -> dict[str, Any]:
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, f"got {body}"
    error = body["error"]
    assert error["type"] == kind, f"expected type {kind}, got {error}"
    assert error["param"] == param, f"expected the error to blame {param!r}, got {error}"
    assert param is None or error["message"].startswith(f"{param}: "), f"the message must name {param!r}: {error}"
    assert 0 < len(error["message"]) < 700, f"an error must not echo all that was sent: {error['message'][:100]}…"
    for word in words:
        assert word in error["message"], f"expected {word!r} in the message, got {error['message']!r}"
    return error
