"""common/openai_app: the official openai client, sync and async, and the course's own load client."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import operator
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import openai
import pytest

from common.load_client import LoadConfig, run_load
from common.openai_app import AppOptions
from common.serving import GenerationError
from common.workloads import WorkloadRequest
from tests.common.openai_fakes import FakeEngine, Server, delta, serving
from tests.http_checks import USER, until

CHAT_CALL: dict[str, Any] = {"model": "tiny", "messages": [USER], "max_tokens": 3, "temperature": 0}
COMPLETION_CALL: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "temperature": 0}
WITH_USAGE: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}


@contextlib.contextmanager
def openai_client(server: Server, api_key: str = "none") -> Iterator[openai.OpenAI]:
    http_client = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=api_key, max_retries=0, timeout=60, http_client=http_client
    ) as client:
        yield client


def on_async_client(server: Server, test: Callable[[openai.AsyncOpenAI], Awaitable[None]]) -> None:
    async def run() -> None:
        http_client = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, http_client=http_client
        ) as client:
            await test(client)

    asyncio.run(run())


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai_client(server) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(**CHAT_CALL)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].message.content == " k l m"
    chunks = list(client.chat.completions.create(**CHAT_CALL, **WITH_USAGE))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == " k l m"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    follow_up = [USER, whole.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "Go on"}]}]
    assert client.chat.completions.create(**{**CHAT_CALL, "messages": follow_up}).choices[0].message.content


def test_completions(client: openai.OpenAI) -> None:
    whole = client.completions.create(**COMPLETION_CALL)
    pieces = list(client.completions.create(**COMPLETION_CALL, **WITH_USAGE))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text == " c d e"
    assert pieces[-1].usage == whole.usage
    echoed = client.completions.create(**COMPLETION_CALL, echo=True, best_of=1, suffix=None)
    assert echoed.choices[0].text == "Hi c d e"


def test_several_answers(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT_CALL, n=3, seed=0)
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [" k l m", " l m n", " m n o"] and whole.usage is not None and whole.usage.completion_tokens == 9
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**CHAT_CALL, n=3, seed=0, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    batch = client.completions.create(**{**COMPLETION_CALL, "prompt": ["a", "a b", "a b c"]}, n=2, seed=0)
    assert [choice.text[:2] for choice in batch.choices] == [" b", " c", " c", " d", " d", " e"]
    assert [choice.index for choice in batch.choices] == list(range(6))


def test_logprobs(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(**CHAT_CALL, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert chat is not None and chat.content is not None and len(chat.content) == 3
    first = chat.content[0]
    assert (first.token, first.logprob, first.bytes) == (" k", -1.0, [32, 107])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [(" l", -0.5), (" k", -1.0)]
    chunks = list(client.chat.completions.create(**CHAT_CALL, logprobs=True, top_logprobs=2, stream=True))
    streamed = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert streamed == chat.content
    completion = client.completions.create(**COMPLETION_CALL, logprobs=1).choices[0].logprobs
    assert completion is not None and completion.tokens == [" c", " d", " e"]
    assert completion.token_logprobs == [-1.0] * 3 and completion.text_offset == [0, 2, 4]
    assert completion.top_logprobs is not None and completion.top_logprobs[0] == {" c": -1.0, " d": -0.5}


def test_fields_that_client_users_may_send(client: openai.OpenAI, server: Server) -> None:
    client.chat.completions.create(
        **CHAT_CALL, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100}, user="Bo", seed=3, top_p=0.9,
        stop=["END"], response_format={"type": "text"},
        extra_body={"top_k": 5, "min_tokens": 1, "ignore_eos": True, "stop_token_ids": [7], "repetition_penalty": 1.1},
    )  # fmt: skip
    params = server.engine.streams[0].params
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.logit_bias, params.stop, params.seed, params.top_p) == (((5, -100.0),), ("END",), 3, 0.9)
    assert (params.top_k, params.min_tokens, params.ignore_eos, params.stop_token_ids) == (5, 1, True, (7,))


# Fields of the client that ask for something this server does not do, whatever their value.
ONLY_NULL = {"audio", "functions", "prediction", "tools", "web_search_options", "moderation"}
NEUTRAL: dict[str, Any] = {
    "best_of": 1, "echo": False, "frequency_penalty": 0, "function_call": "none", "logit_bias": {}, "logprobs": None,
    "max_completion_tokens": 3, "max_tokens": 3, "metadata": {}, "modalities": ["text"], "n": 1,
    "parallel_tool_calls": True, "presence_penalty": 0, "prompt_cache_key": "a", "prompt_cache_retention": "24h",
    "prompt_cache_options": {}, "reasoning_effort": "none", "response_format": {"type": "text"},
    "safety_identifier": "a", "seed": 1, "service_tier": "auto", "stop": [], "store": False, "stream": False,
    "stream_options": None, "suffix": "", "temperature": 0, "tool_choice": "none", "top_logprobs": 0, "top_p": 1,
    "user": "Bo", "verbosity": "low",
}  # fmt: skip


@pytest.mark.parametrize(("path", "call"), [("chat.completions", CHAT_CALL), ("completions", COMPLETION_CALL)])
def test_every_field_that_the_client_has_may_be_null_or_neutral(
    client: openai.OpenAI, path: str, call: dict[str, Any]
) -> None:
    create = operator.attrgetter(path)(client).create
    names = inspect.signature(create).parameters.keys() - call.keys()
    names = {name for name in names if not name.startswith("extra_")} - {"timeout"}
    unknown = names - NEUTRAL.keys() - ONLY_NULL
    assert not unknown, f"openai {openai.__version__} has new fields, {unknown}: say in this test what becomes of them"
    expected = create(**call).choices
    for name in sorted(names | {"temperature", "max_tokens"}):
        assert create(**{**call, name: None}).choices, f"{path}: {name}=None is refused"
        if name in NEUTRAL:
            assert create(**{**call, name: NEUTRAL[name]}).choices[0].finish_reason == expected[0].finish_reason
        else:
            with pytest.raises(openai.BadRequestError) as caught:
                create(**{**call, name: [{"type": "function"}]})
            assert "not supported by this engine" in str(caught.value), f"{path}: {name}: {caught.value}"


def test_what_a_stream_helper_puts_together(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.script = [delta(f" {letter}", [token]) for letter, token in zip("klm", engine.letters[10:13], strict=True)]
    engine.script += [delta("", [2], "stop")]
    expected = client.chat.completions.create(**CHAT_CALL)
    with client.chat.completions.stream(**CHAT_CALL) as stream:
        events = list(stream)
    whole = stream.get_final_completion()
    assert whole.choices[0].message.content == expected.choices[0].message.content
    assert whole.choices[0].finish_reason == expected.choices[0].finish_reason
    deltas = [event.delta for event in events if event.type == "content.delta" and event.delta]
    assert "".join(deltas) == whole.choices[0].message.content and len(deltas) == 3, "a delta for each token"
    again = client.chat.completions.create(
        **{**CHAT_CALL, "messages": [USER, whole.choices[0].message.model_dump(), USER]}
    )
    assert again.choices[0].message.content, "what came back may be sent again as it is"


def test_async(server: Server) -> None:
    async def test(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        whole = await client.chat.completions.create(**CHAT_CALL)
        chunks = [chunk async for chunk in await client.chat.completions.create(**CHAT_CALL, **WITH_USAGE)]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage

        async def complete(number: int) -> list[str]:
            call = {**COMPLETION_CALL, "seed": number, "n": 2}
            if number % 2:
                return [choice.text for choice in (await client.completions.create(**call)).choices]
            texts = ["", ""]
            async for piece in await client.completions.create(**call, stream=True):
                texts[piece.choices[0].index] += piece.choices[0].text
            return texts

        answers = await asyncio.gather(*map(complete, range(200)))
        letters = "abcdefghijklmnopqrstuvwxy" * 9
        expected = [["".join(f" {x}" for x in letters[2 + s + j : 5 + s + j]) for j in range(2)] for s in range(200)]
        assert answers == expected, "two hundred requests at once, streamed and not: each gets its own answers"

    on_async_client(server, test)


def test_errors_are_the_client_s_exceptions(engine: FakeEngine) -> None:
    with serving(engine, AppOptions(api_key="secret", max_body_bytes=2000), raises=KeyError) as server:
        with openai_client(server, "wrong") as client, pytest.raises(openai.AuthenticationError) as unknown:
            client.chat.completions.create(**CHAT_CALL)
        assert unknown.value.code == "invalid_api_key"
        with openai_client(server, "secret") as client:
            with pytest.raises(openai.BadRequestError) as bad:
                client.chat.completions.create(**{**CHAT_CALL, "temperature": 200}, stream=True)
            assert bad.value.param == "temperature" and "2, got 200" in str(bad.value)
            with pytest.raises(openai.NotFoundError) as missing:
                client.completions.create(**{**COMPLETION_CALL, "model": "gpt-9"})
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.NotFoundError):
                client.embeddings.create(model="tiny", input="Hi")
            with pytest.raises(openai.APIStatusError) as large:
                client.completions.create(**{**COMPLETION_CALL, "prompt": "x" * 3000})
            assert large.value.status_code == 413
            engine.capacity = 0
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(**COMPLETION_CALL, stream=True)
            assert "retry-after" in full.value.response.headers
            engine.capacity, engine.script = 10, [delta("a", [1]), GenerationError("the cat sat on the GPU")]
            with pytest.raises(openai.InternalServerError, match="the cat sat on the GPU"):
                client.completions.create(**COMPLETION_CALL)
            texts = []
            with pytest.raises(openai.APIError, match="the cat sat on the GPU"):
                for piece in client.completions.create(**COMPLETION_CALL, stream=True):
                    texts.append(piece.choices[0].text)
            assert texts == ["a"]
            engine.refusal = KeyError("x")
            with pytest.raises(openai.InternalServerError, match="KeyError"):
                client.completions.create(**COMPLETION_CALL)
            engine.is_alive = False
            with pytest.raises(openai.InternalServerError, match="engine has died") as dead:
                client.chat.completions.create(**CHAT_CALL)
            assert dead.value.status_code == 503


def test_a_stream_that_is_closed_aborts_all_its_choices(engine: FakeEngine) -> None:
    engine.manual = True
    with serving(engine) as server, openai_client(server) as client:
        with client.chat.completions.create(**CHAT_CALL, n=3, stream=True) as chunks:
            server.until_streams(3)[0].put(delta("a", [1]))
            next(iter(chunks))
        until(lambda: engine.aborts == [1, 1, 1], "three aborts")


def test_an_async_call_that_is_cancelled_aborts_all_its_choices(engine: FakeEngine) -> None:
    engine.manual = True
    with serving(engine) as server:

        async def test(client: openai.AsyncOpenAI) -> None:
            call = asyncio.ensure_future(client.chat.completions.create(**CHAT_CALL, n=2))
            await asyncio.to_thread(server.until_streams, 2)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

        on_async_client(server, test)
        until(lambda: engine.aborts == [1, 1], "two aborts")


def test_the_load_client(server: Server) -> None:
    requests = [
        WorkloadRequest("chat", 0.0, 8, messages=[USER], ignore_eos=True),
        WorkloadRequest("tokens", 0.0, 8, prompt_token_ids=[70, 71, 72], ignore_eos=True, seed=3),
    ]
    report = asyncio.run(run_load(LoadConfig(server.url, "tiny", max_concurrency=2), requests))
    for result in report.results:
        assert (result.error, result.output_tokens, result.finish_reason) == (None, 8, "length"), f"got {result}"
