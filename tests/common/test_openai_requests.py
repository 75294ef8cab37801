"""common/openai_app: bad requests get an error that names field, value and limit, and no request is ever a 500."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from common.errors import FieldError
from common.openai_app import AppOptions
from common.serve import ServerConfig
from tests.bad_requests import BODIES, BUDGET, INF, JSON_VALUES, NAN, STREAM_OPTIONS, any_bytes
from tests.bad_requests import WRONG_VALUES as ALWAYS_WRONG
from tests.common.openai_fakes import CONTEXT, GOOD, FakeEngine, Server, check_error, parse_events, serving
from tests.http_checks import CHAT, COMPLETIONS, USER, both_endpoints, read_until, request_bytes

MAX_BODY_BYTES = 20_000


@pytest.fixture(scope="module")
def server(tiny_tokenizer: PreTrainedTokenizerBase) -> Iterator[Server]:
    with serving(FakeEngine(tiny_tokenizer), AppOptions(max_body_bytes=MAX_BODY_BYTES)) as server:
        yield server


# Fields

WRONG_VALUES: dict[str, list[object]] = {
    **ALWAYS_WRONG,
    "stop_token_ids": [*ALWAYS_WRONG["stop_token_ids"], [4100]],
    "n": [129, 0, -1, 1.5, True, "1", [], {}, 10**30, NAN],
    "best_of": [2, 0, True, 1.5, "1", [], NAN],
    "presence_penalty": [2.1, -2.1, "0", False, [], NAN],
    "frequency_penalty": [2.1, -3, "0", False],
    "cache_salt": ["", 5, True, ["a"], {}, "x" * 1001, "\ud83e"],
    "repetition_penalty": [0, -1, 2.1, "1", True, NAN],
    "logit_bias": [
        {"a": 1},
        {"-1": 1},
        {"01": 1},
        {"5": 101},
        {"5": "1"},
        {"5": None},
        {"4100": 1},
        [],
        [[5, 1]],
        5,
        "",
    ],
    "tools": [[], [{}], {}, "x", 0, False],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, {}, [], "text"],
    "echo": ["", 0, 1, "true"],
    "suffix": ["x", 5, [], False],
    "priority": [1, "1", False],
    "min_tokens": [*ALWAYS_WRONG["min_tokens"]],
    "allowed_token_ids": [[5]],
    "tool_choice": ["auto", {}],
    "modalities": [["audio"], "text"],
    "max_completion_tokens": ["5", 1.5, True, [], {}, 0, -1, ""],
}


@both_endpoints
@pytest.mark.parametrize("field", WRONG_VALUES)
def test_a_wrong_value_is_refused(server: Server, path: str, field: str) -> None:
    for value in WRONG_VALUES[field]:
        check_error(server.post(path, {**GOOD[path], field: value}), 400, field)
    assert server.post(path, GOOD[path]).status_code == 200


@both_endpoints
@pytest.mark.parametrize("field", ["max_tokens", "seed", "temperature"])
def test_an_integer_with_thousands_of_digits(server: Server, path: str, field: str) -> None:
    """Python parses at most 4,300 digits; the client should read which of its fields is wrong."""
    body = json.dumps({**GOOD[path], field: 123456}).replace("123456", "9" * 5_000)
    check_error(server.post(path, body.encode()), 400, field, "got inf")


@both_endpoints
@pytest.mark.parametrize("value", ["5", 1.5, 20.5, True, False, [], {}, -1, NAN, INF, ""])
def test_a_wrong_min_tokens_where_max_tokens_has_its_default(server: Server, path: str, value: object) -> None:
    body = {name: v for name, v in GOOD[path].items() if name != "max_tokens"}
    check_error(server.post(path, {**body, "min_tokens": value}), 400, "min_tokens", "expected")


@both_endpoints
def test_fields_of_the_other_endpoint(server: Server, path: str) -> None:
    others = {CHAT: {"echo": True, "prompt": "Hi"}, COMPLETIONS: {"messages": [USER], "top_logprobs": 2}}
    for name, value in others[path].items():
        check_error(server.post(path, GOOD[path], **{name: value}), 400, name)
    response = server.post(COMPLETIONS, GOOD[COMPLETIONS], max_completion_tokens=2)
    check_error(response, 400, "max_completion_tokens", "not supported")


def test_two_limits_that_contradict_each_other(server: Server) -> None:
    response = server.post(CHAT, {"messages": [USER], "max_tokens": 2, "max_completion_tokens": 3})
    check_error(response, 400, "max_completion_tokens", "3 contradicts max_tokens, 2")


@both_endpoints
@pytest.mark.parametrize("case", STREAM_OPTIONS)
def test_wrong_stream_options(server: Server, path: str, case: str) -> None:
    fields, param = STREAM_OPTIONS[case]
    check_error(server.post(path, GOOD[path], **fields), 400, param)


@both_endpoints
@pytest.mark.parametrize("name", ["gpt-9", "", "\ud800", "x" * 5000, 5, True, [], {}])
def test_an_unknown_model_is_404(server: Server, path: str, name: object) -> None:
    for stream in (False, True):
        error = check_error(server.post(path, GOOD[path], model=name, stream=stream), 404, "model", "'tiny'")
        assert error["code"] == "model_not_found"


@both_endpoints
@pytest.mark.parametrize("name", ["max_token", "Prompt", "", "\ud800", "x" * 5000, "\n", "'"])
def test_an_unknown_field_is_ignored_and_logged_once(
    server: Server, path: str, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.errors._ignored", set())
    for _ in range(2):
        assert server.post(path, {**GOOD[path], name: 1}).status_code == 200
        assert server.post(CHAT, {**GOOD[CHAT], "messages": [{**USER, name: 1}]}).status_code == 200
    lines = [record.getMessage() for record in caplog.records if "unknown field" in record.getMessage()]
    assert len(lines) == 2 and max(map(len, lines)) < 200, f"one line for each, in the body and in messages: {lines}"


# Prompts

LONG = [5] * CONTEXT
PARTS: list[Any] = [{"type": "text", "text": "Hi"}]
PROMPTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "none": ({}, "prompt", "got none"),
    "null": ({"prompt": None}, "prompt", "got none"),
    "empty": ({"prompt": ""}, "prompt", "empty"),
    "an object": ({"prompt": {}}, "prompt", "expected text or token ids, got {}"),
    "no token ids": ({"prompt": []}, "prompt", "empty"),
    "token id too high": ({"prompt": [5, 4096]}, "prompt[1]", "4095"),
    "too long": ({"prompt": LONG}, "prompt", f"{CONTEXT} tokens"),
    "half a surrogate pair": ({"prompt": "a\ud800b"}, "prompt", "surrogate"),
    "token ids in a batch": ({"prompt": [[1], [1, 2, 3, 4, 5, 6, 7, -1]]}, "prompt[1][7]", "4095, got -1"),
    "a number in a batch of strings": ({"prompt": ["Hi", 5]}, "prompt", "got both"),
    "a text among token ids": ({"prompt": [5, "Hi"]}, "prompt[1]", "a token id from 0 to 4095, got 'Hi'"),
    "texts and token ids in a batch": ({"prompt": ["Hi", [5]]}, "prompt", "got both"),
    "an empty one in a batch": ({"prompt": ["Hi", ""]}, "prompt[1]", "empty"),
    "an empty list in a batch": ({"prompt": [[5], []]}, "prompt[1]", "empty"),
    "a long one in a batch": ({"prompt": [[5], LONG]}, "prompt[1]", f"maximum context length is {CONTEXT} tokens"),
    "a surrogate in a batch": ({"prompt": ["a", "\ud800"]}, "prompt[1]", "surrogate"),
    "a batch of 129": ({"prompt": ["a"] * 129}, "prompt", "at most 128 prompts, got 129"),
    "messages": ({"messages": [USER]}, "messages", "not supported"),
}
MESSAGES: dict[str, tuple[object, str, str]] = {
    "none": (None, "messages", "got none"),
    "empty": ([], "messages", "at least one"),
    "text": ("Hi", "messages", "a list"),
    "a message is text": ([USER, "Hi"], "messages[1]", "role and content"),
    "unknown role": ([{"role": "tool", "content": "Hi"}], "messages[0].role", "developer, got 'tool'"),
    "role is a list": ([{"role": [], "content": "Hi"}], "messages[0].role", "got []"),
    "no content": ([USER, {"role": "user"}], "messages[1].content", "expected text"),
    "content is empty": ([{**USER, "content": []}], "messages[0].content", "got []"),
    "part is text": ([{**USER, "content": ["Hi"]}], "messages[0].content[0]", "got 'Hi'"),
    "part is an image": ([{**USER, "content": [*PARTS, {"type": "image_url"}]}], "messages[0].content[1]", "image_url"),
    "part's text is 5": ([{**USER, "content": [{**PARTS[0], "text": 5}]}], "messages[0].content[0].text", "got 5"),
    "surrogate in a part": (
        [{**USER, "content": [{**PARTS[0], "text": "\ud800"}]}],
        "messages[0].content[0].text",
        "sur",
    ),
    "name is a number": ([{**USER, "name": 5}], "messages[0].name", "expected text, got 5"),
    "tool calls": ([{**USER, "tool_calls": [{}]}], "messages[0].tool_calls", "not supported"),
    "too long": ([{**USER, "content": "a b c d e f g" * CONTEXT}], "messages", "max_model_len"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_a_wrong_prompt_is_refused(server: Server, case: str) -> None:
    fields, param, word = PROMPTS[case]
    for stream in (False, True):
        check_error(server.post(COMPLETIONS, {"max_tokens": 1, "stream": stream, **fields}), 400, param, word)


@pytest.mark.parametrize("case", MESSAGES)
def test_wrong_messages_are_refused(server: Server, case: str) -> None:
    messages, param, word = MESSAGES[case]
    response = server.post(CHAT, {"messages": messages, "max_tokens": 1})
    error = check_error(response, 400, param, word)
    assert error["code"] == ("context_length_exceeded" if case == "too long" else None), f"got {error}"


def test_a_chat_without_max_tokens_uses_all_that_fits(server: Server) -> None:
    """Up to the end of the context or the KV cache: without a limit in the request, none can be too high."""
    body = {"messages": [USER]}
    num_prompt_tokens = server.post(CHAT, body).json()["usage"]["prompt_tokens"]
    assert server.engine.streams[-1].params.max_tokens == CONTEXT - num_prompt_tokens
    for max_request_len, expected in ((num_prompt_tokens + 7, 7), (num_prompt_tokens - 1, 1)):
        server.engine.max_request_len = max_request_len
        server.post(CHAT, body)
        got = server.engine.streams[-1].params.max_tokens
        assert got == expected, f"{num_prompt_tokens} + {expected} fit, expected max_tokens {expected}, got {got}"


def test_the_longest_prompt_and_the_largest_batch_that_fit(server: Server) -> None:
    answer = server.whole(COMPLETIONS, prompt=[5] * (CONTEXT - 1), max_tokens=9)
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (1, "length")
    answer = server.whole(COMPLETIONS, prompt=[[5]] * 128, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == list(range(128))
    assert len(server.whole(COMPLETIONS, n=16, max_tokens=1)["choices"]) == 16


def test_a_model_without_a_chat_template(engine: FakeEngine) -> None:
    engine.tokenizer = copy.deepcopy(engine.tokenizer)
    engine.tokenizer.chat_template = None
    with serving(engine) as server:
        check_error(server.post(CHAT, GOOD[CHAT]), 400, "messages", "chat template")
        assert server.post(COMPLETIONS, GOOD[COMPLETIONS]).status_code == 200


# Bodies

SMALL_BODIES = {name: body for name, body in BODIES.items() if len(body) <= MAX_BODY_BYTES}
SMALL_BODIES["deeply nested lists"] = b"[" * 15_000


@both_endpoints
@pytest.mark.parametrize("case", SMALL_BODIES)
def test_a_body_that_is_not_a_json_object(server: Server, path: str, case: str) -> None:
    check_error(server.post(path, SMALL_BODIES[case]), 400, "body")


@pytest.mark.parametrize("field", ["temperature", "stop", "prompt", "model", "n", "logit_bias", "tools", "best_of"])
def test_a_value_nested_just_not_too_deeply_to_parse(server: Server, field: str) -> None:
    start = json.dumps({k: v for k, v in GOOD[COMPLETIONS].items() if k != field})[:-1].encode()
    for depth in range(850, 1010, 20):
        response = server.post(COMPLETIONS, start + b', "%s": ' % field.encode() + b"[" * depth + b"]" * depth + b"}")
        assert response.status_code in (400, 404), f"depth {depth}: got {response.status_code} {response.text[:200]}"


@pytest.mark.parametrize("chunked", [False, True], ids=["with its length", "chunked"])
def test_a_body_of_the_limit_and_one_byte_more(server: Server, chunked: bool) -> None:
    def send(size: int) -> httpx.Response:
        raw = json.dumps(GOOD[COMPLETIONS]).encode().ljust(size)
        return server.post(COMPLETIONS, (raw[i : i + 999] for i in range(0, size, 999)) if chunked else raw)

    assert send(MAX_BODY_BYTES).status_code == 200
    for size in (MAX_BODY_BYTES + 1, 3 * MAX_BODY_BYTES):
        check_error(send(size), 413, "body", "at most 20,000 bytes", "got more" if chunked else f"got {size:,}")
    assert server.post(COMPLETIONS, GOOD[COMPLETIONS]).status_code == 200


def test_a_body_announced_too_large_is_refused_before_it_arrives(server: Server) -> None:
    with server.send_raw(request_bytes(COMPLETIONS, b"", length=10**12)) as connection:
        answer = read_until(connection, b'"code":')
    assert answer.startswith(b"HTTP/1.1 413 ") and b"1,000,000,000,000" in answer, f"got {answer!r}"


def test_a_body_that_does_not_arrive_is_408(engine: FakeEngine) -> None:
    with serving(engine, AppOptions(body_timeout_s=0.1)) as server:
        for content, length in ((b"", 10), (b'{"pro', 10)):
            with server.send_raw(request_bytes(CHAT, content, length)) as connection:
                answer = read_until(connection, b'"code":null}}')
                while chunk := connection.recv(1000):
                    answer += chunk
            assert answer.startswith(b"HTTP/1.1 408 "), f"got {answer!r}"
            assert b"\r\nconnection: close\r\n" in answer.lower(), "the rest of the body may never come"
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["param"] == "body" and "within 0.1 s" in error["message"], f"got {error}"
            assert f"got {len(content)} bytes" in error["message"], f"got {error}"
        assert server.post(CHAT, GOOD[CHAT]).status_code == 200


def test_the_default_limits() -> None:
    assert AppOptions() == AppOptions(api_key=None, max_body_bytes=1_000_000, body_timeout_s=30.0)


# Paths and keys


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", COMPLETIONS, 405, "POST"),
        ("PUT", CHAT, 405, "POST"),
        ("OPTIONS", CHAT, 405, "POST"),
        ("POST", "/health", 405, "GET, HEAD"),
        ("POST", "/metrics", 405, "GET"),
        ("POST", "/v1/models", 405, "GET"),
        ("POST", "/v1/embeddings", 404, None),
        ("GET", "/redoc", 404, None),
        ("GET", "/v1/%ff", 404, None),
    ],
)
def test_a_wrong_method_or_path(server: Server, method: str, path: str, status: int, allow: str | None) -> None:
    response = server.client.request(method, path, content=json.dumps(GOOD[COMPLETIONS]).encode())
    check_error(response, status, None)
    got = response.headers.get("allow")
    assert (got and sorted(got.split(", "))) == (allow and allow.split(", ")), f"expected Allow: {allow}, got {got}"


KEY = "sk-schlüssel"


def test_an_api_key_guards_v1_and_nothing_else(engine: FakeEngine) -> None:
    with serving(engine, AppOptions(api_key=KEY)) as server:
        wrong = [None, "", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", KEY, f"Basic {KEY}", "Bearer sk"]
        for given_key in wrong:
            headers = {} if given_key is None else {"Authorization": given_key.encode()}
            for method, path in (("GET", "/v1/models"), ("POST", CHAT), ("POST", COMPLETIONS)):
                response = server.client.request(method, path, json=GOOD.get(path), headers=headers)
                error = check_error(response, 401, None, "Authorization: Bearer")
                assert error["code"] == "invalid_api_key", f"got {error}"
                assert response.headers["www-authenticate"] == "Bearer"
                assert KEY not in response.text, "the error must not contain the key"
        for scheme in ("Bearer", "bearer"):
            headers = {"Authorization": f"{scheme} {KEY}".encode()}
            assert server.client.get("/v1/models", headers=headers).status_code == 200
            assert server.client.post(CHAT, json=GOOD[CHAT], headers=headers).status_code == 200
        assert server.client.get("/health").status_code == server.client.get("/metrics").status_code == 200
        raw = request_bytes(CHAT, b"", length=10)
        with server.send_raw(raw) as connection:  # no key, no reading of the body
            assert read_until(connection, b'"code":').startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("key", ["", " ", "secret\n", " secret", "sec\nret", "secr\u00e9t"])
def test_a_key_that_no_client_can_send(key: str) -> None:
    """An empty variable in the environment must not open the server."""
    with pytest.raises(FieldError, match="^api_key: expected ASCII") as caught:
        ServerConfig(api_key=key)
    assert "secret" not in str(caught.value)


def test_without_a_key_any_key_is_accepted(server: Server) -> None:
    assert server.client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 200


# Arbitrary requests

TOKEN_IDS = st.lists(st.integers(0, 4095), min_size=1, max_size=5)
TEXTS = st.text(min_size=1, max_size=8)
FIELD_VALUES: dict[str, st.SearchStrategy] = {
    "prompt": TEXTS | TOKEN_IDS | st.lists(TEXTS, min_size=1, max_size=3) | st.lists(TOKEN_IDS, min_size=1, max_size=3),
    "messages": st.just([USER])
    | st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "developer"]) | JSON_VALUES},
            optional={
                "content": st.text(max_size=8)
                | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS | JSON_VALUES}), max_size=2),
                "name": st.text(max_size=3),
            },
        ),
        max_size=2,
    ),
    "model": st.just("tiny"),
    "max_tokens": st.integers(1, 3),
    "min_tokens": st.integers(0, 3),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(0, 5000),
    "top_p": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "stop": TEXTS | st.lists(TEXTS, max_size=4),
    "stop_token_ids": st.lists(st.integers(0, 4095), max_size=3),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "user": st.text(max_size=5),
    "n": st.integers(1, 3),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "logit_bias": st.dictionaries(st.integers(0, 4095).map(str), st.floats(-100, 100), max_size=3),
    "logprobs": st.integers(0, 5) | st.booleans(),
    "top_logprobs": st.integers(0, 3),
    "echo": st.booleans(),
    "best_of": st.integers(1, 2),
}
PROMPT_OF = {COMPLETIONS: "prompt", CHAT: "messages"}
OTHERS = sorted(FIELD_VALUES.keys() - {"prompt", "messages"})


@st.composite
def request_bodies(draw: st.DrawFn, path: str) -> dict[str, object]:
    """A prompt, some fields with good values and, in half of the bodies, a field or two with any value at all."""
    names = {PROMPT_OF[path], *draw(st.sets(st.sampled_from(OTHERS), max_size=4))}
    body = {name: draw(FIELD_VALUES[name]) for name in sorted(names)}
    if draw(st.booleans()):
        for name in draw(st.lists(st.sampled_from([*FIELD_VALUES, "suffix", "tools", "x"]), min_size=1, max_size=2)):
            body[name] = draw(JSON_VALUES)
    return body


@both_endpoints
def test_any_body_is_answered_or_refused(server: Server, path: str) -> None:
    statuses: list[int] = []

    @settings(max_examples=80, **BUDGET)
    @given(body=request_bodies(path))
    def check(body: dict[str, object]) -> None:
        response = server.post(path, body)
        statuses.append(response.status_code)
        if response.status_code != 200:
            assert response.status_code == 400 or (response.status_code == 404 and "model" in body), response.text
            assert 0 < len(response.json()["error"]["message"]) < 700
        elif response.headers["content-type"].startswith("text/event-stream"):
            reasons = [c["finish_reason"] for event in parse_events(response.text) for c in event["choices"]]
            assert set(reasons) <= {None, "length"} and "length" in reasons, response.text
        else:
            usage, choices = response.json()["usage"], response.json()["choices"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
            assert [choice["index"] for choice in choices] == list(range(len(choices)))

    check()
    assert statuses.count(200) >= 10 and statuses.count(400) >= 10, f"this test should send both kinds: {statuses}"


@both_endpoints
def test_any_bytes_are_answered_or_refused(server: Server, path: str) -> None:
    good = json.dumps(GOOD[path]).encode()

    @settings(max_examples=60, **BUDGET)
    @given(body=any_bytes(good))
    def check(body: bytes) -> None:
        assert server.post(path, body).status_code in (200, 400, 404)

    check()


# The model's own defaults


def test_a_request_that_names_no_sampling_gets_the_models(engine: FakeEngine) -> None:
    engine.default_sampling = {"temperature": 0.3, "top_p": 0.9, "min_p": 0.1}
    cases: list[tuple[dict[str, Any], tuple[float, float, float]]] = [
        ({}, (0.3, 0.9, 0.1)),
        ({"temperature": None, "top_p": None}, (0.3, 0.9, 0.1)),
        ({"temperature": 0}, (0.0, 0.9, 0.1)),
        ({"temperature": 1, "top_p": 1, "min_p": 0}, (1.0, 1.0, 0.0)),
    ]
    with serving(engine) as server:
        for path in (CHAT, COMPLETIONS):
            for fields, expected in cases:
                server.whole(path, **fields)
                params = server.engine.streams[-1].params
                got = (params.temperature, params.top_p, params.min_p)
                assert got == expected, f"{path}, {fields}: expected {expected}, got {got}"
