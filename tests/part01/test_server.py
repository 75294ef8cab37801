"""The HTTP boundary of part 1: good answers have the right fields, and nothing that a client sends is a 500."""

from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from common.errors import FieldError
from common.prompts import PROMPT_FIELDS, encode_prompt
from common.sampling_params import SamplingParams
from common.testing import small_model
from part01_simple_server.server import LLM, MAX_BODY_BYTES, create_app

LOOK = 'Look at server.py::create_app; README "Bad input".'
GOOD = {"prompt": "Hi", "max_tokens": 2, "temperature": 0}
CONTEXT = 32
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def client(llm: LLM) -> FlaskClient:
    """A server whose context is 32 tokens: short enough that no request of these tests takes long."""
    short = copy.copy(llm)
    short.max_model_len = CONTEXT
    return create_app(short).test_client()


def post(client: FlaskClient, body: object) -> TestResponse:
    """bytes are sent unchanged; anything else as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post("/generate", data=raw, content_type="application/json")


def check_error(response: TestResponse, status: int, param: str | None) -> str:
    """The response is an error in OpenAI's form. Returns its message."""
    text = response.get_data(as_text=True)
    assert response.status_code == status, f"expected status {status}, got {response.status_code}: {text[:200]}. {LOOK}"
    body = json.loads(text)
    assert list(body) == ["error"] and set(body["error"]) == {"message", "type", "param", "code"}, (
        f"an error has OpenAI's form {{'error': {{message, type, param, code}}}}, got {text[:200]}. {LOOK}"
    )
    error = body["error"]
    assert error["type"] == "invalid_request_error", (
        f"expected type invalid_request_error, got {error['type']!r}. {LOOK}"
    )
    assert isinstance(error["message"], str) and error["message"], f"an error needs a message: {text[:200]}. {LOOK}"
    if param is not None:
        assert error["param"] == param, f"expected the error to name {param!r}, got {error['param']!r}: {text}. {LOOK}"
        assert error["message"].startswith(f"{param}: "), f"the message must name {param!r}: {error['message']}. {LOOK}"
    assert len(error["message"]) < 600, f"an error must not echo all that was sent: {error['message'][:100]}…. {LOOK}"
    return error["message"]


def check_still_serving(client: FlaskClient) -> None:
    response = post(client, GOOD)
    assert response.status_code == 200, f"after a refused request a good one got {response.status_code}. {LOOK}"


def refuse(client: FlaskClient, body: object, param: str | None, *words: str, status: int = 400) -> None:
    message = check_error(post(client, body), status, param)
    for word in words:
        assert word in message, f"expected {word!r} in the message, got {message!r}. {LOOK}"
    check_still_serving(client)


# Good requests


def test_a_prompt_is_answered(client: FlaskClient, llm: LLM) -> None:
    response = post(client, {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0, "ignore_eos": True})
    assert response.status_code == 200, f"expected 200, got {response.get_data(as_text=True)}. {LOOK}"
    body = response.get_json()
    expected = ["text", "token_ids", "finish_reason", "stop_reason", "usage"]
    assert list(body) == expected, f"fields of an answer: expected {expected}, got {list(body)}. {LOOK}"
    assert len(body["token_ids"]) == 5, f"max_tokens=5: expected 5 tokens, got {body['token_ids']}. {LOOK}"
    assert body["text"] == llm.tokenizer.decode(body["token_ids"], skip_special_tokens=True)
    assert (body["finish_reason"], body["stop_reason"]) == ("length", None), f"got {body}. {LOOK}"
    count = len(llm.tokenizer.encode("Once upon a time"))
    expected_usage = {"prompt_tokens": count, "completion_tokens": 5, "total_tokens": count + 5}
    assert body["usage"] == expected_usage, f"usage: expected {expected_usage}, got {body['usage']}. {LOOK}"


def test_messages_go_through_the_chat_template(client: FlaskClient, llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    body = {"messages": messages, "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    answer = post(client, body).get_json()
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    same = post(client, {**body, "messages": None, "prompt": text}).get_json()
    assert answer == same, f"messages must become the template's text: expected {same}, got {answer}. {LOOK}"
    assert answer["usage"]["prompt_tokens"] == len(encode_prompt(body, llm.tokenizer, CONTEXT))


def test_a_prompt_may_be_token_ids(client: FlaskClient, llm: LLM) -> None:
    text = "Once upon a time"
    expected = post(client, {**GOOD, "prompt": text}).get_json()
    answer = post(client, {**GOOD, "prompt": llm.tokenizer.encode(text)}).get_json()
    assert answer == expected, f"the token ids of {text!r}: expected {expected}, got {answer}. {LOOK}"


def test_a_stop_token_is_reported(client: FlaskClient) -> None:
    free = post(client, {**GOOD, "ignore_eos": True}).get_json()["token_ids"]
    answer = post(client, {**GOOD, "ignore_eos": True, "stop_token_ids": [free[0]]}).get_json()
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", free[0]), f"got {answer}. {LOOK}"
    assert answer["token_ids"] == free[:1] and answer["text"] == "", f"got {answer}. {LOOK}"
    assert answer["usage"]["completion_tokens"] == 1, f"the stop token counts: got {answer['usage']}. {LOOK}"


def test_null_means_the_default(client: FlaskClient) -> None:
    nulls = dict.fromkeys(("messages", "top_k", "top_p", "seed", "stop_token_ids", "ignore_eos", "min_tokens"))
    expected, got = post(client, GOOD).get_json(), post(client, {**GOOD, **nulls}).get_json()
    assert got == expected, f"null fields change the answer: expected {expected}, got {got}. {LOOK}"


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_only_json_is_read(client: FlaskClient, content_type: str | None) -> None:
    """A web page may send anything else to this server without being asked."""
    response = client.post("/generate", data=json.dumps(GOOD), content_type=content_type)
    message = check_error(response, 415, None)
    assert "application/json" in message and (content_type or "none") in message, f"got {message!r}. {LOOK}"
    assert client.post("/generate", data=json.dumps(GOOD), content_type="application/json; a=b").status_code == 200


def test_health(client: FlaskClient) -> None:
    response = client.get("/health")
    assert (response.status_code, response.get_json()) == (200, {"status": "ok", "model": "tiny"}), response.data


# Bad requests

WRONG_VALUES: dict[str, list[object]] = {
    "max_tokens": ["5", 1.5, True, [], {}, 0, -1, -(10**30)],
    "min_tokens": ["5", 1.5, False, [], {}, -1, 3, 10**30],
    "temperature": ["1", True, [], {}, -0.1, 2.01, -1, 10**400, float("nan"), float("inf"), -float("inf")],
    "top_k": ["5", 1.5, True, [], {}, -1],
    "top_p": ["1", True, [], {}, -0.1, 0, 1.1, 10**400, float("nan"), float("inf")],
    "seed": ["5", 1.5, True, [], {}, -(2**63) - 1, 2**63],
    "stop_token_ids": ["5", 5, {}, True, [1.5], ["5"], [True], [None], [[1]], [-1], [4096], [10**30], [1] * 129],
    "ignore_eos": ["true", 1, 0, [], {}],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [pytest.param(f, v, id=f"{f}={str(v)[:12]}") for f, values in WRONG_VALUES.items() for v in values],
)
def test_a_wrong_value_is_refused(client: FlaskClient, field: str, value: object) -> None:
    refuse(client, {**GOOD, field: value}, field, "expected")


def test_a_huge_stop_token_is_refused_below_min_tokens_too(client: FlaskClient) -> None:
    refuse(client, {**GOOD, "min_tokens": 1, "stop_token_ids": [99_999]}, "stop_token_ids", "4096", "99999")


@pytest.mark.parametrize("body", [{"temperature": 1e-50}, {"top_p": 1e-50}, {"temperature": 1e-30, "top_p": 1e-30}])
def test_numbers_that_float32_rounds_to_zero_are_served(client: FlaskClient, body: dict) -> None:
    got, expected = post(client, {**GOOD, "temperature": 1, **body}), post(client, GOOD)
    assert got.status_code == 200, f"{body} is within limits: expected 200, got {got.get_data(as_text=True)}. {LOOK}"
    assert got.get_json() == expected.get_json(), f"{body} leaves only the likeliest token. {LOOK}"


PROMPT_CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "neither": ({}, "prompt", "neither"),
    "both": ({"prompt": "Hi", "messages": [USER]}, "prompt", "prompt and messages"),
    "both null": ({"prompt": None, "messages": None}, "prompt", "neither"),
    "empty prompt": ({"prompt": ""}, "prompt", "empty"),
    "prompt is a number": ({"prompt": 5}, "prompt", "expected text"),
    "prompt is false": ({"prompt": False}, "prompt", "expected text"),
    "prompt is a list of strings": ({"prompt": ["Hi"]}, "prompt[0]", "expected a token id"),
    "prompt is an empty list": ({"prompt": []}, "prompt", "empty"),
    "prompt has an id too many": ({"prompt": [5, 4096]}, "prompt[1]", "4095"),
    "prompt is an object": ({"prompt": {}}, "prompt", "expected text"),
    "lone surrogate in the prompt": ({"prompt": "a\ud800b"}, "prompt", "surrogate"),
    "no messages": ({"messages": []}, "messages", "at least one"),
    "messages is text": ({"messages": "Hi"}, "messages", "list"),
    "messages is an object": ({"messages": USER}, "messages", "list"),
    "a message is text": ({"messages": [USER, "Hi"]}, "messages[1]", "role and content"),
    "a message is null": ({"messages": [None]}, "messages[0]", "role and content"),
    "unknown role": ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role", "'robot'"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages[0].role", "user"),
    "role is a list": ({"messages": [{"role": [], "content": "Hi"}]}, "messages[0].role", "user"),
    "no content": ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "expected text"),
    "content is a list": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "expected text"),
    "lone surrogate in a message": (
        {"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content", "surrogate"
    ),
    "tool calls": ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROMPT_CASES)
def test_a_wrong_prompt_is_refused(client: FlaskClient, case: str) -> None:
    fields, param, word = PROMPT_CASES[case]
    refuse(client, {"max_tokens": 1, **fields}, param, word)


@pytest.mark.parametrize("name", ["max_token", "stream", "stop", "Prompt", "", "\ud800", "x" * 5000])
def test_an_unknown_field_is_refused(client: FlaskClient, name: str) -> None:
    response = post(client, {**GOOD, name: 1})
    message = check_error(response, 400, None)
    assert "unknown field" in message and "max_tokens" in message, f"expected the known fields, got {message!r}. {LOOK}"
    param = response.get_json()["error"]["param"]
    assert param == name or len(name) > 60 or not name.isascii(), f"expected param {name!r}, got {param!r}. {LOOK}"
    check_still_serving(client)


def test_stop_strings_are_refused_by_the_engine_too(llm: LLM) -> None:
    """SamplingParams knows them, but this part does not: they must not be silently dropped."""
    before = llm.num_positions_computed
    with pytest.raises(FieldError, match="^stop: not supported by this part, got .'END'") as caught:
        llm.generate([100, 101], SamplingParams(stop=("END",)))
    assert caught.value.field == "stop"
    got = llm.num_positions_computed - before
    assert got == 0, f"a request is refused before the model runs, but it computed {got} positions"


def test_the_longest_prompt_that_fits(client: FlaskClient, llm: LLM) -> None:
    text = {count: "a" + " a" * (count - 1) for count in (CONTEXT - 1, CONTEXT, CONTEXT + 1, 5 * CONTEXT)}
    for count, prompt in text.items():
        assert len(llm.tokenizer.encode(prompt)) == count, "this test counts on one token for each ' a'"
    answer = post(client, {"prompt": text[CONTEXT - 1], "max_tokens": 9, "ignore_eos": True}).get_json()
    assert (len(answer["token_ids"]), answer["finish_reason"]) == (1, "length"), f"room for one token: {answer}. {LOOK}"
    for count in (CONTEXT, CONTEXT + 1, 5 * CONTEXT):
        refuse(client, {"prompt": text[count]}, "prompt", f"{count} tokens", f"{CONTEXT} tokens", "max_model_len")
    messages = [{"role": "user", "content": text[CONTEXT]}]
    refuse(client, {"messages": messages}, "messages", f"{CONTEXT} tokens", "max_model_len")


def test_a_model_without_a_chat_template(llm: LLM) -> None:
    base = copy.copy(llm)
    base.tokenizer = copy.deepcopy(llm.tokenizer)
    base.tokenizer.chat_template = None
    refuse(create_app(base).test_client(), {"messages": [USER]}, "messages", "chat template")


BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"prompt=Hi",
    "cut short": b'{"prompt": "Hi"',
    "two values": b"{} {}",
    "trailing comma": b'{"prompt": "Hi",}',
    "text": b'"Hi"',
    "null": b"null",
    "a number": b"5",
    "a list": b'[{"prompt": "Hi"}]',
    "NaN": b"NaN",
    "deeply nested lists": b"[" * 100_000,
    "deeply nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "invalid UTF-8": b'{"prompt": "\xff\xfe\x80"}',
    "UTF-8 cut in a character": '{"prompt": "ä'.encode()[:-1],
    "random bytes": bytes(range(256)),
    "UTF-16 without an end": b"\x00{\x00",
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_is_not_a_json_object(client: FlaskClient, case: str) -> None:
    refuse(client, BODIES[case], "body")


@pytest.mark.parametrize("literal", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "max_tokens"])
def test_literals_that_are_not_numbers(client: FlaskClient, field: str, literal: bytes) -> None:
    refuse(client, b'{"prompt": "Hi", "%s": %s}' % (field.encode(), literal), field, "expected")


@pytest.mark.parametrize("field", ["temperature", "stop_token_ids", "prompt", "messages"])
def test_a_value_nested_just_not_too_deeply_to_parse(client: FlaskClient, field: str) -> None:
    """json.loads fails at some depth; below it the message must be able to quote the parsed value."""
    rest = {key: value for key, value in GOOD.items() if key not in ("prompt", field)}
    other = {} if field in PROMPT_FIELDS else {"prompt": "Hi"}
    start = json.dumps({**other, **rest})[:-1].encode()
    for depth in range(850, 1010):
        response = post(client, start + b', "%s": ' % field.encode() + b"[" * depth + b"]" * depth + b"}")
        assert response.status_code == 400, f"{field} nested {depth} deep: got {response.status_code}. {LOOK}"
    check_still_serving(client)


def test_a_body_of_the_limit_and_one_byte_more(client: FlaskClient) -> None:
    raw = json.dumps(GOOD).encode()
    response = post(client, raw + b" " * (MAX_BODY_BYTES - len(raw)))
    assert response.status_code == 200, f"a body of exactly {MAX_BODY_BYTES} bytes: got {response.data[:200]!r}. {LOOK}"
    refuse(client, raw + b" " * (MAX_BODY_BYTES + 1 - len(raw)), "body", "1,000,000", "1000001", status=413)


def post_chunked(client: FlaskClient, raw: bytes) -> TestResponse:
    """Without a Content-Length, as with `Transfer-Encoding: chunked`: the length is not known in advance."""
    return client.post(
        "/generate", input_stream=io.BytesIO(raw), environ_overrides={"wsgi.input_terminated": True},
        headers={"Transfer-Encoding": "chunked"}, content_type="application/json",
    )  # fmt: skip


def test_a_body_without_a_length_has_the_same_limit(client: FlaskClient) -> None:
    raw = json.dumps(GOOD).encode()
    response = post_chunked(client, raw + b" " * (MAX_BODY_BYTES - len(raw)))
    assert response.status_code == 200, f"a chunked body of the limit: got {response.data[:200]!r}. {LOOK}"
    for extra in (1, 2, 5 * MAX_BODY_BYTES):
        message = check_error(post_chunked(client, raw + b" " * (MAX_BODY_BYTES + extra - len(raw))), 413, "body")
        assert "1,000,000" in message and message.endswith("got more"), f"{extra} bytes more: got {message!r}. {LOOK}"
    check_still_serving(client)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/generate", 405),
        ("PUT", "/generate", 405),
        ("DELETE", "/generate", 405),
        ("POST", "/health", 405),
        ("GET", "/", 404),
        ("POST", "/generate/", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/static/../server.py", 404),
    ],
)
def test_a_wrong_method_or_path(client: FlaskClient, method: str, path: str, status: int) -> None:
    response = client.open(path, method=method, data=json.dumps(GOOD))
    check_error(response, status, None)
    assert response.get_json()["error"]["param"] is None, f"no field is to blame for {method} {path}. {LOOK}"
    allowed, good = response.headers.get("Allow"), "GET" if path == "/health" else "POST"
    assert (good in (allowed or "").split(", ")) if status == 405 else allowed is None, (
        f"{method} {path}: status 405 must list what is allowed, {good} among it, and no other status lists any; "
        f"got Allow: {allowed}. {LOOK}"
    )
    check_still_serving(client)


# Arbitrary requests

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=3)}), min_size=1, max_size=2)
ODD_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES | JSON_VALUES}, optional={"content": st.text(max_size=8) | JSON_VALUES}),
    max_size=2,
)
FIELD_VALUES: dict[str, st.SearchStrategy] = {
    "prompt": st.text(max_size=20) | st.lists(st.integers(0, 4095), max_size=20),
    "messages": MESSAGES,
    "max_tokens": st.integers(1, 3),
    "min_tokens": st.integers(0, 3),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(0, 8192),
    "top_p": st.floats(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop_token_ids": st.lists(st.integers(0, 4095), max_size=3),
    "ignore_eos": st.booleans(),
}


@st.composite
def request_bodies(draw: st.DrawFn, is_spoiled: bool) -> dict[str, object]:
    """A prompt and some fields with values of the right type; if spoiled, one or two fields with any value."""
    names = draw(st.sets(st.sampled_from(sorted(FIELD_VALUES.keys() - PROMPT_FIELDS)), max_size=4))
    body = {name: draw(FIELD_VALUES[name]) for name in sorted(names | {draw(st.sampled_from(PROMPT_FIELDS))})}
    if is_spoiled:
        for name in draw(st.lists(st.sampled_from([*FIELD_VALUES, "n"]), min_size=1, max_size=2)):
            body[name] = draw(ODD_MESSAGES | JSON_VALUES if name == "messages" else JSON_VALUES)
    return body


def check_answer(answer: dict, body: dict) -> None:
    count, usage = len(answer["token_ids"]), answer["usage"]
    assert answer["finish_reason"] in ("stop", "length"), f"{body}: got {answer}. {LOOK}"
    assert usage["completion_tokens"] == count >= 1, f"{body}: {count} tokens and {usage}. {LOOK}"
    assert usage["total_tokens"] == usage["prompt_tokens"] + count <= CONTEXT, (
        f"{body}: {usage} in a context of {CONTEXT}. {LOOK}"
    )


@pytest.fixture(scope="module")
def quick_client(llm: LLM) -> FlaskClient:
    """As client, over a random model of a few thousand parameters, for which every eighth token ends an answer."""
    quick = copy.copy(llm)
    quick.max_model_len = CONTEXT
    quick.model = small_model("llama", seed=0, vocab_size=llm.model.config.vocab_size)
    quick.eos_token_ids = frozenset(range(0, llm.model.config.vocab_size, 8))
    return create_app(quick).test_client()


@pytest.mark.parametrize(("is_spoiled", "status"), [(False, 200), (True, 400)])
def test_any_body_is_answered_or_refused(quick_client: FlaskClient, is_spoiled: bool, status: int) -> None:
    statuses: list[int] = []

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(body=request_bodies(is_spoiled))
    def check(body: dict) -> None:
        response = post(quick_client, body)
        statuses.append(response.status_code)
        if response.status_code == 200:
            check_answer(response.get_json(), body)
        else:
            check_error(response, 400, None)

    check()
    assert statuses.count(status) >= 15, f"this test should see status {status} more often: {statuses}"
