"""The endpoints beside the two that generate: tokens, load, version, health."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from common.openai_app import AppOptions
from common.openai_app.fields import CHAT_FIELDS, COMPLETION_FIELDS, TEMPLATE_FIELDS
from common.openai_app.schema import BODIES
from tests.common.openai_fakes import CONTEXT, GOOD, FakeEngine, Server, check_error, serving
from tests.http_checks import CHAT, COMPLETIONS, USER


@pytest.fixture(scope="module")
def server(tiny_tokenizer: PreTrainedTokenizerBase) -> Iterator[Server]:
    with serving(FakeEngine(tiny_tokenizer)) as server:
        yield server


def test_tokenize_and_back(server: Server) -> None:
    for text in ("", "Hello, world", "日本語 🦊", " ", "a" * 5_000):
        found = server.post("/tokenize", {"prompt": text}).json()
        assert found == {
            "count": len(found["tokens"]), "max_model_len": CONTEXT, "tokens": server.engine.tokenizer.encode(text),
            "token_strs": None,
        }, f"{text[:20]!r}: got {str(found)[:200]}"  # fmt: skip
        assert server.post("/detokenize", {"tokens": found["tokens"]}).json() == {"prompt": text}
    found = server.post("/tokenize", {"prompt": "Hello, world", "return_token_strs": True}).json()
    assert len(found["token_strs"]) == found["count"] and all(isinstance(each, str) for each in found["token_strs"])


def test_the_tokens_of_a_chat(server: Server) -> None:
    found = server.post("/tokenize", {"messages": [USER], "model": "tiny"}).json()
    server.whole("/v1/chat/completions")
    assert found["tokens"] == server.engine.streams[-1].prompt, "as the chat endpoint would compute them"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [1, 4096]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [True]}, "tokens[0]"),
    ],
)
def test_wrong_bodies(server: Server, path: str, body: dict[str, object], param: str) -> None:
    check_error(server.post(path, body), 400, param)
    check_error(server.post(path, {**body, "model": "gpt-9"}), 404, "model")
    check_error(server.post(path, b"{"), 400, "body")


def test_health_version_and_load(server: Server) -> None:
    for path in ("/health", "/ping"):
        assert server.client.get(path).json() == {"status": "ok"}
        head = server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), f"HEAD {path}: {head.status_code} {head.content!r}"
    assert isinstance(server.client.get("/version").json()["version"], str)
    server.engine.gauges = {"num_requests_running": 3, "num_requests_waiting": 4, "kv_cache_usage_perc": 0.5}
    assert server.client.get("/load").json() == {"server_load": 7}


def test_what_needs_the_key(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(FakeEngine(tiny_tokenizer), AppOptions(api_key="secret")) as server:
        for path in ("/tokenize", "/detokenize", "/v1/responses"):
            check_error(server.post(path, {"prompt": "a"}), 401, None)
        for path in ("/v1/models", "/v1/models/tiny", "/load"):
            check_error(server.client.get(path), 401, None)
        for path in ("/health", "/ping", "/version", "/metrics"):
            assert server.client.get(path).status_code == 200, f"{path} needs no key"


def test_root_path(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """A proxy in front shows the server under /llm, and passes the path on whole or without it."""
    with serving(FakeEngine(tiny_tokenizer), AppOptions(root_path="/llm")) as server:
        for path in ("/llm/v1/models", "/v1/models"):
            assert server.client.get(path).status_code == 200, f"{path} under the root path /llm"


def test_openapi_describes_every_endpoint_and_field(server: Server) -> None:
    described = server.client.get("/openapi.json").json()
    others = {"/v1/models", "/v1/models/{name}", "/load", "/health", "/ping", "/version", "/metrics"}
    assert described["paths"].keys() == BODIES.keys() | others
    both = CHAT_FIELDS & COMPLETION_FIELDS - {"n", "best_of", "logprobs", "max_tokens", "prompt_logprobs"}
    of_responses = {"input", "instructions", "max_output_tokens", *both - {"return_token_ids"}, *TEMPLATE_FIELDS}
    for path, fields in (
        (CHAT, CHAT_FIELDS),
        (COMPLETIONS, COMPLETION_FIELDS),
        ("/v1/responses", of_responses),
    ):
        operation = described["paths"][path]["post"]
        properties = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert properties.keys() == fields, f"{path}: a new field needs a line in common/openai_app/schema.py"
        seed = properties["seed"]["anyOf"][0]
        assert (seed["minimum"], seed["maximum"]) == (-(2**63), 2**63 - 1), f"{path}: a float can't hold these: {seed}"
        assert isinstance(properties["top_k"]["anyOf"][0]["minimum"], int), f"{path}: an integer's limits are integers"
        assert operation["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}


OPTION = {"anyOf": [{"type": "boolean"}, {"type": "null"}]}
OPTIONS = {name: OPTION for name in ("include_usage", "continuous_usage_stats", "include_obfuscation")}


@pytest.mark.parametrize(
    ("field", "described", "good", "wrong"),
    [
        (
            "logprobs",
            {"anyOf": [{"enum": [False]}, {"type": "integer", "minimum": 0, "maximum": 20}]},
            [False, 0, 20],
            [True, 21],
        ),
        (
            "truncate_prompt_tokens",
            {"anyOf": [{"enum": [-1]}, {"type": "integer", "minimum": 1}]},
            [-1, 1],
            [0, -2],
        ),
        (
            "stream_options",
            {"type": "object", "properties": OPTIONS, "additionalProperties": False},
            [{}, {"include_usage": None}, {"include_obfuscation": True}],
            [{"include_usage": 1}, {"x": True}],
        ),
    ],
)
def test_openapi_allows_what_is_served(
    server: Server, field: str, described: object, good: list[object], wrong: list[object]
) -> None:
    """At the places where the two once differed."""
    assert BODIES[COMPLETIONS]["properties"][field] == {"anyOf": [described, {"type": "null"}]}
    body = {**GOOD[COMPLETIONS], "stream": field == "stream_options"}
    for status, values in ((200, good), (400, wrong)):
        got = [server.post(COMPLETIONS, {**body, field: value}).status_code for value in values]
        assert got == [status] * len(values), f"{field}: expected status {status} for each of {values}, got {got}"
