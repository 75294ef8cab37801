"""Part 7 over HTTP: cached_tokens, salts, the gauges, and POST /reset_prefix_cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.checkpoint import load_tokenizer, resolve_checkpoint
from common.cli import parse_config
from common.serve import ServerConfig
from common.serving import GenerationError
from part07_prefix_caching import config
from part07_prefix_caching.api.server import create_app
from part07_prefix_caching.config import EngineConfig
from tests.common.openai_fakes import FakeEngine
from tests.forked_servers import ForkedServer, Host, until
from tests.http_checks import CHAT, COMPLETIONS

PART, RESET = Path(config.__file__).parent.name, "/reset_prefix_cache"
KEY = {"Authorization": "Bearer sesame"}
LESSON = 'README "What a client sees"'
LOOK = f"Look at __main__.py and api/server.py::create_app; {LESSON}."
LOOK_USAGE = f"Look at core/engine.py::LLMEngine._append and api/output_processor.py; {LESSON}."
LOOK_RESET = f"Look at api/server.py::create_app and api/async_engine.py::AsyncLLM.reset_prefix_cache; {LESSON}."
LOOK_SALT = 'Look at core/validation.py::SAMPLING_FIELDS and core/block_manager.py::BlockManager.hash_blocks; README "A block\'s hash".'  # noqa: E501
LOOK_STATS = f"Look at core/engine_core.py::EngineCore.stats; {LESSON}."
FLAGS = ["--block-size", "8", "--num-kv-blocks", "101", "--api-key", "sesame"]
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 3}


@pytest.fixture(scope="module")
def server(one_host: Host) -> Iterator[ForkedServer]:
    yield one_host.serve(PART, *FLAGS, step_s=0.01)
    one_host.ask(end=True)


@pytest.fixture(autouse=True)
def reset(server: ForkedServer) -> None:
    """Each test begins with an empty cache."""
    answer = post(server, RESET)
    assert answer.status_code == 200, (
        f"no request runs: expected 200, got {answer.status_code}: {answer.text}. {LOOK_RESET}"
    )


def post(server: ForkedServer, path: str, headers: dict[str, str] = KEY, **fields: Any) -> httpx.Response:
    return server.post(path, {**GREEDY, **fields} if fields else b"", headers)


def usage_of(server: ForkedServer, path: str, stream: bool, **fields: Any) -> dict[str, Any]:
    """Of a whole answer, or of a stream's last event."""
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = post(server, path, **fields)
    assert answer.status_code == 200, f"{fields}: expected 200, got {answer.status_code}: {answer.text}. {LOOK}"
    if not stream:
        return answer.json()["usage"]
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    usages = [json.loads(event).get("usage") for event in events[:-1]]
    assert events[-1] == "[DONE]" and not any(usages[:-1]), f"one usage, in the last event: {answer.text}. {LOOK_USAGE}"
    return usages[-1]


def cached_of(usage: dict[str, Any]) -> int | None:
    return usage.get("prompt_tokens_details", {}).get("cached_tokens")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_cached_tokens_in_the_usage(server: ForkedServer, path: str, stream: bool) -> None:
    content = "Once upon a time there was a fox who lived in an old mill by the river, and Nora."
    body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]} if path == CHAT else {"prompt": content}
    usages = [usage_of(server, path, stream, **body) for _ in range(2)]
    length = usages[0]["prompt_tokens"]
    got, expected = [cached_of(usage) for usage in usages], [0, (length - 1) // 8 * 8]
    assert got == expected and length > 16, (
        f"the same {length} tokens twice, block_size=8: expected cached_tokens {expected}, got {got}. {LOOK_USAGE}"
    )


def test_several_prompts_and_answers(server: ForkedServer) -> None:
    """A prompt counts once, by its first answer."""
    prompts = [[5] * 20, [6] * 12]
    first = usage_of(server, COMPLETIONS, False, prompt=prompts, n=2)
    second = usage_of(server, COMPLETIONS, True, prompt=prompts, n=2)
    got = (first["prompt_tokens"], cached_of(first), cached_of(second))
    assert got == (32, 0, 24), f"20 and 12 tokens, twice, n=2: expected (32, 0, 24), got {got}. {LOOK_USAGE}"


def test_a_salt_is_a_field_of_a_request(server: ForkedServer) -> None:
    got = [cached_of(usage_of(server, COMPLETIONS, False, prompt=[7] * 20, **salt)) for salt in (
        {}, {"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": None}, {"cache_salt": "ä🦊"},
    )]  # fmt: skip
    assert got == [0, 0, 16, 0, 16, 0], (
        f"salts none, a, a, b, null, ä🦊: expected [0, 0, 16, 0, 16, 0], got {got}. {LOOK_SALT}"
    )


@pytest.mark.parametrize("salt", ["", 5, ["a"], True, {}, "x" * 1_001, "half\ud83e"], ids=lambda salt: repr(salt)[:12])
def test_a_bad_salt_is_refused(server: ForkedServer, salt: object) -> None:
    answer = post(server, COMPLETIONS, prompt=[7] * 20, cache_salt=salt)
    assert answer.status_code == 400, (
        f"{salt!r:.20}: expected 400, got {answer.status_code}: {answer.text}. {LOOK_SALT}"
    )
    error = answer.json()["error"]
    assert error["param"] == "cache_salt" and "cache_salt: " in error["message"], f"got {error}. {LOOK_SALT}"
    assert post(server, COMPLETIONS, prompt=[7] * 20).status_code == 200, "the next one is served"


def test_gauges(server: ForkedServer) -> None:
    names = ("prefix_cache_queries", "prefix_cache_hits")
    before = [server.gauge(name, LOOK_STATS) for name in names]
    for _ in range(2):
        usage_of(server, COMPLETIONS, False, prompt=[8] * 20)
    got = [server.gauge(name, LOOK_STATS) - was for name, was in zip(names, before, strict=True)]
    assert got == [40, 16], (
        f"20 tokens twice, block_size=8: expected {names} to grow by [40, 16], got {got}. {LOOK_STATS}"
    )


def test_reset(server: ForkedServer) -> None:
    for expected in (0, 16):
        got = cached_of(usage_of(server, COMPLETIONS, False, prompt=[9] * 20))
        assert got == expected, f"expected {expected} cached tokens, got {got}. {LOOK_USAGE}"
    answer = post(server, RESET)
    assert (answer.status_code, answer.json()) == (200, {"status": "reset"}), f"got {answer.text}. {LOOK_RESET}"
    got = cached_of(usage_of(server, COMPLETIONS, False, prompt=[9] * 20))
    assert got == 0, f"after a reset: expected 0 cached tokens, got {got}. {LOOK_RESET}"


def test_no_reset_while_a_request_runs(server: ForkedServer) -> None:
    body = {**GREEDY, "prompt": [9] * 20, "max_tokens": 400, "stream": True}
    with server.stream(COMPLETIONS, body, KEY) as stream:
        chunks = stream.iter_text()  # without a reference, the stream would end
        first = next(chunks)
        assert stream.status_code == 200 and first.startswith("data: "), f"got {first}"
        answer = post(server, RESET)
        assert answer.status_code == 409, (
            f"a request runs: expected 409, got {answer.status_code}: {answer.text}. {LOOK_RESET}"
        )
        error = answer.json()["error"]
        assert "requests are in the engine" in error["message"], f"got {error}. {LOOK_RESET}"
    for name in ("num_requests_running", "kv_cache_usage_perc"):
        until(lambda name=name: server.gauge(name, LOOK_STATS) == 0, f"a request to end whose client has gone. {LOOK}")
    got = cached_of(usage_of(server, COMPLETIONS, False, prompt=[9] * 20))
    assert got == 16, f"the reset was refused, so the prompt is still cached: expected 16, got {got}. {LOOK_RESET}"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}], ids=["none", "wrong"])
def test_a_reset_needs_the_key(server: ForkedServer, headers: dict[str, str]) -> None:
    usage_of(server, COMPLETIONS, False, prompt=[9] * 20)
    answer = post(server, RESET, headers)
    assert answer.status_code == 401, f"expected 401, got {answer.status_code}: {answer.text}. {LOOK_RESET}"
    assert answer.json()["error"]["code"] == "invalid_api_key", f"got {answer.text}. {LOOK_RESET}"
    got = cached_of(usage_of(server, COMPLETIONS, False, prompt=[9] * 20))
    assert got == 16, f"the reset was refused, so the prompt is still cached: expected 16, got {got}. {LOOK_RESET}"


def test_a_reset_is_a_post(server: ForkedServer) -> None:
    assert server.get(RESET).status_code == 405, f"GET must not reset: expected 405. {LOOK_RESET}"


# The route alone


class ResettableEngine(FakeEngine):
    answer_to_reset: bool | Exception = True

    async def reset_prefix_cache(self) -> bool:
        if isinstance(self.answer_to_reset, Exception):
            raise self.answer_to_reset
        return self.answer_to_reset


def ask(answer: bool | Exception, api_key: str | None) -> httpx.Response:
    engine = ResettableEngine(load_tokenizer(resolve_checkpoint("tiny")))
    engine.answer_to_reset = answer
    app = create_app(engine, ServerConfig(api_key=api_key))  # type: ignore[arg-type]

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(RESET)

    return asyncio.run(post())


@pytest.mark.parametrize(
    ("answer", "api_key", "expected"),
    [(True, None, 200), (False, None, 409), (True, "k", 401), (GenerationError("the engine core has died"), None, 500)],
)
def test_statuses(answer: bool | Exception, api_key: str | None, expected: int) -> None:
    got = ask(answer, api_key)
    assert got.status_code == expected, f"{answer!r}, key {api_key!r}: {expected}, got {got.status_code}. {LOOK_RESET}"
    assert expected == 200 or "error" in got.json(), f"an error in OpenAI's form: {got.text}. {LOOK_RESET}"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [([], (True, 0)), (["--no-enable-prefix-caching"], (False, 0)), (["--prefix-caching-hash-seed", "7"], (True, 7))],
)
def test_the_flags(argv: list[str], expected: tuple[bool, int]) -> None:
    config = parse_config(EngineConfig, "", PART, argv)
    got = (config.enable_prefix_caching, config.prefix_caching_hash_seed)
    assert got == expected, (
        f"{argv}: expected (enable_prefix_caching, prefix_caching_hash_seed) {expected}, got {got}. Look at config.py; "
        f"{LESSON}."
    )
