"""Server-sent events: frames, order, text and usage, over a socket, by raw HTTP and by the official client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import torch
from torch import Tensor

from common.load_client import LoadConfig, SseParser, run_load
from common.sampling_params import SamplingParams
from common.serve import running_app
from common.testing import assert_same_greedy, reference_greedy
from common.workloads import WorkloadRequest
from part02_streaming.engine import LLM
from part02_streaming.server import create_app
from tests.http_checks import CHAT, COMPLETIONS, DEADLINE_S, both_endpoints, request_bytes

LOOK = 'Look at openai_api.py::stream_events; README "Server-sent events".'
LOOK_TEXT = 'Look at detokenizer.py and openai_api.py::stream_events; README "Stop strings".'
LOOK_ERROR = 'Look at openai_api.py::stream_events and async_engine.py; README "Server-sent events".'
LOOK_CLIENT = 'Look at openai_api.py and server.py::add_error_handlers; README "Bad input".'

PROMPTS = ["Once upon a time", "What is a KV cache?", "The fox, 1 2 3", "naïve café 日本 🦊"]
NUM_TOKENS = 16


class ScriptedLLM(LLM):
    """Tokenizer and settings of another LLM, and a model whose tokens are the script, whatever the prompt."""

    def __init__(self, llm: LLM) -> None:
        vars(self).update(vars(llm))
        self.script: list[int] = []
        self.fails_after: int | None = None  # so many tokens, and it raises
        self.permits: threading.Semaphore | None = None  # each token costs one
        self.num_tokens = 0  # of the present request

    def forward(self, token_ids: list[int], first_position: int, cache: object) -> Tensor:
        if first_position == 0:
            self.num_tokens = 0
        if self.num_tokens == self.fails_after:
            raise RuntimeError("the cat sat on the GPU")
        if self.permits is not None and not self.permits.acquire(timeout=DEADLINE_S):
            raise TimeoutError("no permit for this token: its client did not read the one before")
        logits = torch.zeros(self.model.config.vocab_size)
        logits[self.script[self.num_tokens]] = 1.0
        self.num_tokens += 1
        return logits


@dataclass
class Server:
    url: str
    llm: LLM
    client: httpx.Client

    def body(self, path: str, prompt: str, **fields: Any) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": prompt}]} if path == CHAT else {"prompt": prompt}
        return {"max_tokens": NUM_TOKENS, "temperature": 0, **asked, **fields}

    def whole(self, path: str, prompt: str, **fields: Any) -> dict[str, Any]:
        response = self.client.post(path, json=self.body(path, prompt, **fields))
        assert response.status_code == 200, f"expected 200, got {response.text}"
        return response.json()

    def stream(self, path: str, prompt: str, **fields: Any) -> Streamed:
        response = self.client.post(path, json=self.body(path, prompt, stream=True, **fields))
        assert response.status_code == 200, f"expected 200, got {response.text}"
        return read_stream(response, path == CHAT)

    def play(self, text: str | bytes, **fields: Any) -> Streamed:
        """Stream a completion whose tokens spell text: all of them, unless a stop string ends it."""
        llm = scripted(self)
        llm.script = tokens_of(llm, text)
        return self.stream(COMPLETIONS, "Hi", **{"max_tokens": len(llm.script), **fields})


def scripted(server: Server) -> ScriptedLLM:
    assert isinstance(server.llm, ScriptedLLM)
    return server.llm


def tokens_of(llm: LLM, text: str | bytes) -> list[int]:
    """bytes become one token each, even if they are not text."""
    if isinstance(text, str):
        return llm.tokenizer.encode(text, add_special_tokens=False)
    vocabulary = llm.tokenizer.get_vocab()
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's: these bytes are their own characters
    others = [byte for byte in range(256) if byte not in letters]
    return [vocabulary[chr(byte if byte in letters else 256 + others.index(byte))] for byte in text]


@dataclass
class Streamed:
    """The contents of a stream. content and reasons come from the chunks with a choice."""

    chunks: list[dict[str, Any]]
    content: list[str] = field(default_factory=list)
    reasons: list[tuple[str, Any]] = field(default_factory=list)  # (finish_reason, stop_reason)
    errors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.content)


def read_stream(response: httpx.Response, is_chat: bool) -> Streamed:
    """Check the framing, byte for byte, and parse the chunks."""
    kind, raw = response.headers["content-type"], response.content
    assert kind.split(";")[0] == "text/event-stream", f"content type: expected text/event-stream, got {kind}. {LOOK}"
    assert re.fullmatch(rb"(data: [^\r\n]+\n\n)+", raw), (
        f"expected frames of `data: …` and two \\n, got {raw!r}. {LOOK}"
    )
    frames = [frame.removeprefix(b"data: ") for frame in raw.removesuffix(b"\n\n").split(b"\n\n")]
    assert frames.count(b"[DONE]") == 1, f"expected [DONE] once, got {frames.count(b'[DONE]')} times: {raw!r}. {LOOK}"
    assert frames[-1] == b"[DONE]", f"expected [DONE] last, got {frames[-1]!r}. {LOOK}"
    streamed = Streamed([json.loads(frame) for frame in frames[:-1]])
    for chunk in streamed.chunks:
        if "error" in chunk:
            streamed.errors.append(chunk["error"])
            continue
        for choice in chunk["choices"]:
            content = choice["delta"].get("content") if is_chat else choice["text"]
            streamed.content += [content] if content else []
            streamed.reasons += [(choice["finish_reason"], choice["stop_reason"])] if choice["finish_reason"] else []
    return streamed


@contextlib.contextmanager
def serving(llm: LLM, max_queued_requests: int = 64) -> Iterator[Server]:
    with (
        running_app(create_app(llm, max_queued_requests)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False, verify=False) as client,
    ):
        yield Server(url, llm, client)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Server]:
    with serving(llm) as server:
        yield server


@pytest.fixture(scope="module")
def player_server(llm: LLM) -> Iterator[Server]:
    with serving(ScriptedLLM(llm)) as server:
        yield server


@pytest.fixture
def player(player_server: Server) -> Server:
    """A server whose model outputs a script."""
    llm = scripted(player_server)
    llm.script, llm.fails_after, llm.permits = [], None, None
    return player_server


# Frames and their order


@both_endpoints
def test_the_chunks_of_a_stream(server: Server, path: str) -> None:
    streamed, is_chat = server.stream(path, "Once upon a time", ignore_eos=True), path == CHAT
    chunks = streamed.chunks
    kind, prefix = ("chat.completion.chunk", "chatcmpl-") if is_chat else ("text_completion", "cmpl-")
    for chunk in chunks:
        expected = ["id", "object", "created", "model", "choices"]
        assert list(chunk) == expected, f"fields of a chunk: expected {expected}, got {list(chunk)}. {LOOK}"
        assert (chunk["object"], chunk["model"]) == (kind, "tiny"), f"expected {kind} of tiny, got {chunk}. {LOOK}"
        assert chunk["id"].startswith(prefix), f"expected an id like {prefix}…, got {chunk}. {LOOK}"
        same = [(chunk[name], chunks[0][name]) for name in ("id", "created")]
        assert all(a == b for a, b in same), f"all chunks have the same id and created, got {same}. {LOOK}"
        assert len(chunk["choices"]) == 1 and chunk["choices"][0]["index"] == 0, f"one choice a chunk: {chunk}. {LOOK}"
    *before, last = [chunk["choices"][0] for chunk in chunks]
    if is_chat:
        role = before.pop(0)["delta"]
        assert role == {"role": "assistant", "content": ""}, f"the role comes first, got {role}. {LOOK}"
    assert 1 <= len(before) <= NUM_TOKENS, f"{NUM_TOKENS} tokens make no more chunks, got {len(before)}. {LOOK}"
    for choice in before:
        content = choice["delta"].get("content") if is_chat else choice["text"]
        assert content, f"a chunk in the middle has text, got {choice}. {LOOK}"
        assert not is_chat or list(choice["delta"]) == ["content"], f"the role comes once: {choice}. {LOOK}"
        assert choice["finish_reason"] is None, f"only the last choice has a finish_reason: {choice}. {LOOK}"
    end = {"delta": {}} if is_chat else {"text": ""}
    expected = {"index": 0, "logprobs": None, "finish_reason": "length", **end, "stop_reason": None}
    assert last == expected, f"the last choice: expected {expected}, got {last}. {LOOK}"


@both_endpoints
def test_usage_comes_only_if_asked_for(server: Server, path: str) -> None:
    plain = server.stream(path, "The fox", ignore_eos=True)
    for options in (None, {}, {"include_usage": False}, {"include_usage": None}):
        streamed = server.stream(path, "The fox", ignore_eos=True, stream_options=options)
        assert not any("usage" in chunk for chunk in streamed.chunks), f"stream_options={options}: no usage. {LOOK}"
    streamed = server.stream(path, "The fox", ignore_eos=True, stream_options={"include_usage": True})
    *before, last = streamed.chunks
    usage = server.whole(path, "The fox", ignore_eos=True)["usage"]
    assert usage["completion_tokens"] == NUM_TOKENS, f"max_tokens={NUM_TOKENS}, got {usage}"
    assert last["usage"] == usage, f"usage: expected {usage}, got {last.get('usage')}. {LOOK}"
    assert last["choices"] == [], f"the chunk with the usage has no choices, got {last['choices']}. {LOOK}"
    assert {key: last[key] for key in ("id", "object")} == {key: before[0][key] for key in ("id", "object")}
    for chunk in before:
        assert "usage" in chunk and chunk["usage"] is None, f"chunks before have usage null, got {chunk}. {LOOK}"
    assert streamed.content == plain.content, f"the usage changes the text. {LOOK}"
    assert len(before) == len(plain.chunks), f"the usage comes in one additional chunk, got {streamed.chunks}. {LOOK}"


def test_usage_counts_tokens_and_not_events(player: Server) -> None:
    """A fox of four tokens is one event, and a stop string none; each token counts."""
    text = "a🦊bcSTOPd"
    streamed = player.play(text, stop=["STOP"], stream_options={"include_usage": True})
    num_tokens = len(tokens_of(player.llm, text)) - 1  # d is never sampled
    usage = streamed.chunks[-1]["usage"]
    assert streamed.text == "a🦊bc", f"expected 'a🦊bc', got {streamed.content}. {LOOK_TEXT}"
    assert usage["completion_tokens"] == num_tokens, f"expected {num_tokens} tokens, got {usage}. {LOOK}"
    assert usage["total_tokens"] == usage["prompt_tokens"] + num_tokens, f"got {usage}. {LOOK}"


@both_endpoints
def test_a_stream_of_one_token_without_text(player: Server, path: str) -> None:
    scripted(player).script = sorted(player.llm.eos_token_ids)
    streamed = player.stream(path, "Hi", stream_options={"include_usage": True})
    assert (streamed.text, streamed.reasons) == ("", [("stop", None)]), f"got {streamed}. {LOOK}"
    num_chunks = 3 if path == CHAT else 2  # the role, the finish reason, the usage
    assert len(streamed.chunks) == num_chunks, f"expected {num_chunks} chunks, got {streamed.chunks}. {LOOK}"
    assert streamed.chunks[-1]["usage"]["completion_tokens"] == 1, f"the end token counts: {streamed.chunks}. {LOOK}"


def test_each_event_comes_before_the_next_token_is_computed(player: Server) -> None:
    llm = scripted(player)
    llm.script, llm.permits = tokens_of(llm, b"abcdef"), threading.Semaphore(1)
    body = player.body(CHAT, "Hi", stream=True, max_tokens=6)
    try:
        with player.client.stream("POST", CHAT, json=body, timeout=DEADLINE_S) as response:
            parser, chunks = SseParser(), response.iter_bytes()
            events: list[str] = []
            for number, letter in enumerate(["assistant", *"abcdef", "length"]):
                while len(events) <= number:
                    events += [data for _, data in parser.feed(next(chunks))]
                assert letter in events[number], f"event {number}: expected {letter!r}, got {events[number]}. {LOOK}"
                assert llm.num_tokens == min(max(number, 1), 6), f"{llm.num_tokens} tokens at event {number}. {LOOK}"
                if number:  # the role comes with the first token
                    llm.permits.release()
    except httpx.ReadTimeout:
        pytest.fail(f"no event for {DEADLINE_S} s, though its token was computed: events must not be collected. {LOOK}")
    finally:
        llm.permits.release(10)


# Text


ANSWERS = [
    "Nora went to the mill. There she met a fox.",
    "A cache.\nIt keeps the keys\nand the values.",
    "1 2 3, quick as a fox",
    "naïve café 日本 🦊 of the wood 👩‍👩‍👧!",
]


@both_endpoints
@pytest.mark.parametrize("free", ANSWERS)
def test_joined_deltas_equal_the_whole_answer(player: Server, path: str, free: str) -> None:
    llm = scripted(player)
    llm.script = tokens_of(llm, free)
    for stops in ([], ["."], [" the"], ["e", "zzz", "\n"]):
        fields: dict[str, Any] = {"max_tokens": len(llm.script), **({"stop": stops} if stops else {})}
        whole, streamed = player.whole(path, "Hi", **fields), player.stream(path, "Hi", **fields)
        (choice,) = whole["choices"]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert streamed.text == text, f"stop={stops}: expected {text!r}, got {streamed.text!r}. {LOOK_TEXT}"
        reasons = [(choice["finish_reason"], choice["stop_reason"])]
        assert streamed.reasons == reasons, f"stop={stops}: expected {reasons}, got {streamed.reasons}. {LOOK}"
        found = [free.index(stop) for stop in stops if stop in free]
        assert text == (free[: min(found)] if found else free), f"stop={stops}: {free!r} became {text!r}. {LOOK_TEXT}"
        for stop in stops:
            assert stop not in streamed.text, f"the stop string {stop!r} is in the text {text!r}. {LOOK_TEXT}"


def test_sampled_answers_are_the_same_streamed_and_whole(server: Server) -> None:
    for seed in range(3):
        fields: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "seed": seed, "ignore_eos": True}
        text = server.whole(COMPLETIONS, "The", **fields)["choices"][0]["text"]
        streamed = server.stream(COMPLETIONS, "The", **fields).text
        assert streamed == text, f"seed {seed}: expected {text!r}, got {streamed!r}. {LOOK_TEXT}"


TEXTS = {
    "emoji": "a🦊b 👩‍👩‍👧!",
    "many scripts": "naïve 日本語 عربى Ωμέγα",
    "what looks like the end of a frame": 'data: [DONE]\n\ndata: {"x": 1}\n\n',
    "line ends": "a\nb\r\nc\rd\r\n\r\n",
    "what some take for line ends": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg",
    "quotes and escapes": 'say "\\n" \x00\x1b\t\x7f',
    "only half characters till the end": "🦊🦊",
}


@pytest.mark.parametrize("case", TEXTS)
def test_any_text_is_sent_unchanged(player: Server, case: str) -> None:
    text = TEXTS[case]
    for spelled in (text, text.encode()):  # as its usual tokens, and byte by byte
        streamed = player.play(spelled)
        assert streamed.text == text, f"expected {text!r}, got {streamed.content!r}. {LOOK_TEXT}"
        assert "\ufffd" not in streamed.text, f"half a character leaked: {streamed.content!r}. {LOOK_TEXT}"
        assert streamed.reasons == [("length", None)], f"got {streamed.reasons}. {LOOK}"
    with openai_client(player) as client:
        scripted(player).script = tokens_of(player.llm, text)
        num_tokens = len(scripted(player).script)
        chunks = client.completions.create(model="tiny", prompt="Hi", max_tokens=num_tokens, stream=True, temperature=0)
        got = "".join(chunk.choices[0].text for chunk in chunks)
    assert got == text, f"openai's client: expected {text!r}, got {got!r}. {LOOK}"


def test_a_character_is_sent_whole_and_once(player: Server) -> None:
    streamed = player.play("x🦊y".encode())
    assert streamed.content == ["x", "🦊", "y"], f"expected the fox in one event, got {streamed.content}. {LOOK_TEXT}"


@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_half_a_character_at_the_end_is_streamed_as_in_the_whole_answer(player: Server, num_bytes: int) -> None:
    raw = b"ab" + "🦊".encode()[:num_bytes]
    streamed = player.play(raw)
    whole = player.whole(COMPLETIONS, "Hi", max_tokens=len(raw))["choices"][0]["text"]
    assert streamed.text == whole, f"expected {whole!r}, got {streamed.content!r}. {LOOK_TEXT}"
    assert streamed.content[:2] == ["a", "b"] and streamed.text[2:].strip("\ufffd") == "", f"got {streamed.content!r}."


STOPS: dict[str, tuple[str, list[str], str, str | None]] = {
    "across tokens": ("ABCDEFGHIJKL", ["DEFGHIJ"], "ABC", "DEFGHIJ"),
    "at the very end": ("ABCDEF", ["DEF"], "ABC", "DEF"),
    "at the very start": ("ABCDEF", ["ABC"], "", "ABC"),
    "begun and never finished": ("ABCDEFG", ["DEFGX"], "ABCDEFG", None),
    "begun, broken off, begun again": ("ABABABACX", ["ABAC"], "ABAB", "ABAC"),
    "the one that is complete first": ("xABCDy", ["ABCD", "BC"], "xA", "BC"),
    "a single character": ("ABC", ["B"], "A", "B"),
    "half an emoji apart": ("a🦊b", ["🦊"], "a", "🦊"),
    "another emoji of the same first bytes": ("a🦊b", ["🦉"], "a🦊b", None),
    "a blank line": ("ab\n\ncd", ["\n\n"], "ab", "\n\n"),
}


@pytest.mark.parametrize("case", STOPS)
def test_no_part_of_a_stop_string_is_shown(player: Server, case: str) -> None:
    text, stop, expected, reason = STOPS[case]
    for spelled in (text, text.encode()):
        streamed = player.play(spelled, stop=stop)
        shown = ""
        for delta in streamed.content:
            shown += delta
            assert expected.startswith(shown), f"stop={stop}: {shown!r} was shown, expected {expected!r}. {LOOK_TEXT}"
        assert shown == expected, f"stop={stop}: expected {expected!r}, got {shown!r}. {LOOK_TEXT}"
        reasons = [("stop", reason) if reason else ("length", None)]
        assert streamed.reasons == reasons, f"stop={stop}: expected {reasons}, got {streamed.reasons}. {LOOK_TEXT}"


def test_streamed_greedy_answers_are_the_reference_s(server: Server) -> None:
    llm, greedy = server.llm, SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    for prompt in PROMPTS:
        token_ids = llm.tokenizer.encode(prompt)
        expected = reference_greedy(llm.model, token_ids, NUM_TOKENS, sorted(llm.eos_token_ids))
        streamed = server.stream(COMPLETIONS, prompt, stream_options={"include_usage": True})
        got = [token_id for output in llm.stream(token_ids, greedy) for token_id in output.token_ids]
        assert_same_greedy(llm.model, token_ids, got, expected, f"{prompt!r}")
        text = llm.tokenizer.decode(got, skip_special_tokens=True)
        assert streamed.text == text, f"{prompt!r}: expected {text!r}, got {streamed.text!r}. {LOOK_TEXT}"
        count = streamed.chunks[-1]["usage"]["completion_tokens"]
        assert count == len(got), f"{prompt!r}: expected {len(got)} tokens, got {count}. {LOOK}"


# Errors


@both_endpoints
@pytest.mark.parametrize("num_before", [0, 2])
def test_an_error_in_mid_stream_becomes_an_event(player: Server, path: str, num_before: int) -> None:
    llm = scripted(player)
    llm.script, llm.fails_after = tokens_of(llm, b"abcd"), num_before
    streamed = player.stream(path, "Hi", max_tokens=4, stream_options={"include_usage": True})
    assert streamed.content == list("ab")[:num_before], f"expected the text before the error: {streamed}. {LOOK_ERROR}"
    assert len(streamed.errors) == 1, f"expected one error event, got {streamed.chunks}. {LOOK_ERROR}"
    assert "error" in streamed.chunks[-1], f"nothing but [DONE] follows an error: {streamed.chunks}. {LOOK_ERROR}"
    (error,) = streamed.errors
    assert set(error) == {"message", "type", "param", "code"}, f"expected OpenAI's form, got {error}. {LOOK_ERROR}"
    assert error["type"] == "internal_error" and error["param"] is None, f"got {error}. {LOOK_ERROR}"
    for word in ("RuntimeError", "the cat sat on the GPU"):
        assert word in error["message"], f"the error names the cause: expected {word!r}, got {error}. {LOOK_ERROR}"
    assert streamed.reasons == [], f"an answer that failed has not finished: got {streamed.reasons}. {LOOK_ERROR}"
    llm.fails_after = None
    again = player.stream(path, "Hi", max_tokens=4)
    assert again.text == "abcd", f"the next request must succeed, got {again}. {LOOK_ERROR}"


@both_endpoints
def test_an_error_of_a_whole_answer_is_500(player: Server, path: str) -> None:
    llm = scripted(player)
    llm.script, llm.fails_after = tokens_of(llm, b"abcd"), 2
    response = player.client.post(path, json=player.body(path, "Hi", max_tokens=4))
    assert response.status_code == 500, f"expected 500, got {response.status_code}: {response.text}. {LOOK_CLIENT}"
    error = response.json()["error"]
    assert error["type"] == "internal_error" and "the cat sat on the GPU" in error["message"], f"got {error}."


@both_endpoints
def test_an_error_before_the_first_event_has_its_status(server: Server, path: str) -> None:
    response = server.client.post(path, json=server.body(path, "Hi", stream=True, temperature=-1))
    assert response.status_code == 400, f"expected 400, got {response.status_code}: {response.text}. {LOOK_CLIENT}"
    assert response.json()["error"]["param"] == "temperature", f"got {response.text}. {LOOK_CLIENT}"


# Clients


@contextlib.contextmanager
def openai_client(server: Server) -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http_client
    ) as client:
        yield client


def on_async_client(server: Server, test: Any) -> None:
    async def run() -> None:
        http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http_client
        ) as client:
            await test(client)

    asyncio.run(run())


CALL: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0}
CHAT_CALL: dict[str, Any] = {**CALL, "messages": [{"role": "user", "content": "What is a KV cache?"}]}
COMPLETION_CALL: dict[str, Any] = {**CALL, "prompt": "Once upon a time"}
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


def test_the_official_client(server: Server) -> None:
    with openai_client(server) as client:
        assert [model.id for model in client.models.list()] == ["tiny"], "models.list()"
        whole = client.chat.completions.create(**CHAT_CALL)
        assert whole.choices[0].message.role == "assistant" and whole.usage is not None, f"got {whole}. {LOOK_CLIENT}"
        chunks = list(client.chat.completions.create(**CHAT_CALL, **WITH_USAGE))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content, f"chat: expected {whole}, got {text!r}. {LOOK}"
        assert chunks[0].choices[0].delta.role == "assistant", f"the role comes first: {chunks[0]}. {LOOK}"
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason, f"got {chunks[-2]}. {LOOK}"
        assert chunks[-1].usage == whole.usage, f"usage: expected {whole.usage}, got {chunks[-1]}. {LOOK}"
        completion = client.completions.create(**COMPLETION_CALL)
        pieces = list(client.completions.create(**COMPLETION_CALL, **WITH_USAGE))
        text = "".join(piece.choices[0].text for piece in pieces if piece.choices)
        assert text == completion.choices[0].text, f"completion: expected {completion}, got {text!r}. {LOOK}"
        assert pieces[-1].usage == completion.usage, f"usage: expected {completion.usage}, got {pieces[-1]}. {LOOK}"
        stopped = client.completions.create(**COMPLETION_CALL, stop=[text[4:6]], extra_body={"ignore_eos": True})
        assert stopped.choices[0].text == text[: text.index(text[4:6])], f"got {stopped}. {LOOK_TEXT}"


def test_the_official_client_may_send_values_that_change_nothing(server: Server) -> None:
    """Values that change nothing, of fields that this part does not support."""
    with openai_client(server) as client:
        expected = client.chat.completions.create(**CHAT_CALL)
        answer = client.chat.completions.create(
            **CHAT_CALL, n=1, presence_penalty=0.0, frequency_penalty=0, logit_bias={}, user="Bo", seed=3, top_p=1,
            logprobs=False, response_format={"type": "text"}, stop=None,
        )  # fmt: skip
        assert answer.choices == expected.choices, f"expected {expected}, got {answer}. {LOOK_CLIENT}"


def test_the_official_async_client(server: Server) -> None:
    async def test(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["tiny"], "models.list()"
        whole = await client.chat.completions.create(**CHAT_CALL)
        stream = await client.chat.completions.create(**CHAT_CALL, **WITH_USAGE)
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content, f"chat: expected {whole}, got {text!r}. {LOOK}"
        assert chunks[-1].usage == whole.usage, f"usage: expected {whole.usage}, got {chunks[-1]}. {LOOK}"

        async def complete(stream: bool) -> str:
            if not stream:
                return (await client.completions.create(**COMPLETION_CALL)).choices[0].text
            pieces = await client.completions.create(**COMPLETION_CALL, stream=True)
            return "".join([piece.choices[0].text async for piece in pieces])

        texts = await asyncio.gather(*(complete(stream) for stream in (True, False) * 4))
        assert len(set(texts)) == 1, f"eight at once, streamed and not: expected one text, got {set(texts)}. {LOOK}"

    on_async_client(server, test)


def test_the_official_client_s_exceptions(server: Server, player: Server) -> None:
    with openai_client(server) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**{**CHAT_CALL, "temperature": 200})
        assert bad.value.param == "temperature" and "temperature" in str(bad.value), f"got {bad.value!r}. {LOOK_CLIENT}"
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(**{**COMPLETION_CALL, "model": "gpt-9"}, stream=True)
        assert missing.value.code == "model_not_found", f"got {missing.value!r}. {LOOK_CLIENT}"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="tiny", input="Hi")
    llm = scripted(player)
    llm.script, llm.fails_after = tokens_of(llm, b"abcd"), 2
    with openai_client(player) as client:
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**COMPLETION_CALL)
        texts: list[str] = []
        with pytest.raises(openai.APIError, match="the cat sat on the GPU"):
            for piece in client.completions.create(**COMPLETION_CALL, stream=True):
                texts.append(piece.choices[0].text)
        assert texts == ["a", "b"], f"expected the text before the error, got {texts}. {LOOK_ERROR}"

    async def test(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(**{**COMPLETION_CALL, "max_tokens": 0}, stream=True)
        with pytest.raises(openai.APIError, match="the cat sat on the GPU"):
            async for _ in await client.chat.completions.create(**CHAT_CALL, stream=True):
                pass

    on_async_client(player, test)


def test_a_full_queue_is_the_official_client_s_rate_limit_error(llm: LLM) -> None:
    player = ScriptedLLM(llm)
    player.script, player.permits = tokens_of(player, b"abcd"), threading.Semaphore(0)
    with serving(player, max_queued_requests=0) as server, openai_client(server) as client:
        try:
            with client.completions.create(**{**COMPLETION_CALL, "max_tokens": 4}, stream=True) as running:
                player.permits.release()
                assert next(iter(running)).choices[0].text == "a"
                for stream in (True, False):
                    with pytest.raises(openai.RateLimitError) as full:
                        client.completions.create(**COMPLETION_CALL, stream=stream)
                    assert "retry-after" in full.value.response.headers, f"got {full.value.response.headers}."
                player.permits.release(3)
                assert "".join(piece.choices[0].text for piece in running) == "bcd", (
                    f"the running one continues. {LOOK}"
                )
        finally:
            player.permits.release(10)


def test_the_load_client_accepts_the_stream(server: Server) -> None:
    messages = [{"role": "user", "content": "What is a KV cache?"}]
    requests = [
        WorkloadRequest("chat", 0.0, 8, messages=messages, ignore_eos=True),
        WorkloadRequest("tokens", 0.0, 8, prompt_token_ids=[70, 71, 72], ignore_eos=True),
    ]
    report = asyncio.run(run_load(LoadConfig(server.url, "tiny", max_concurrency=2), requests))
    for result in report.results:
        assert result.error is None, f"{result.request_id}: {result.error}. {LOOK}"
        assert (result.output_tokens, result.finish_reason) == (8, "length"), f"got {result}. {LOOK}"
        assert result.text, f"{result.request_id} has no text. {LOOK}"


@both_endpoints
def test_the_stream_over_a_bare_socket(player: Server, path: str) -> None:
    """HTTP/1.1 with chunks, and the connection stays open for the next request."""
    llm = scripted(player)
    llm.script = tokens_of(llm, b"abc")
    content = json.dumps(player.body(path, "Hi", stream=True, max_tokens=3)).encode()
    host, port = player.url.removeprefix("http://").split(":")
    request = request_bytes(path, content)
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        for _ in range(2):
            connection.sendall(request)
            data = b""
            while not data.endswith(b"\r\n0\r\n\r\n"):
                chunk = connection.recv(65536)
                assert chunk, f"the connection ended within the stream: {data!r}. {LOOK}"
                data += chunk
            assert data.startswith(b"HTTP/1.1 200 "), f"got {data!r}. {LOOK}"
            assert b"\r\ntransfer-encoding: chunked\r\n" in data.lower(), f"got {data!r}. {LOOK}"
            assert b"\r\ncache-control: no-cache\r\n" in data.lower(), f"no cache may keep a stream: {data!r}. {LOOK}"
            assert data.count(b"data: [DONE]\n\n") == 1, f"got {data!r}. {LOOK}"
