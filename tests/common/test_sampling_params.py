"""common/sampling_params.py: every refusal names field, value and limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from common.errors import FieldError, openai_error
from common.sampling_params import SamplingParams, check_known_fields, check_vocabulary, show

REFUSED: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "an integer of at least 1, got 0"),
    ("max_tokens", -5, "an integer of at least 1, got -5"),
    ("max_tokens", 1.0, "an integer of at least 1, got 1.0"),
    ("max_tokens", True, "an integer of at least 1, got True"),
    ("max_tokens", "5", "an integer of at least 1, got '5'"),
    ("min_tokens", -1, "an integer from 0 to 128 (max_tokens), got -1"),
    ("min_tokens", 129, "an integer from 0 to 128 (max_tokens), got 129"),
    ("min_tokens", None, "an integer from 0 to 128 (max_tokens), got None"),
    ("temperature", -0.5, "a number from 0 to 100, got -0.5"),
    ("temperature", 100.5, "a number from 0 to 100, got 100.5"),
    ("temperature", float("nan"), "a number from 0 to 100, got nan"),
    ("temperature", float("inf"), "a number from 0 to 100, got inf"),
    ("temperature", False, "a number from 0 to 100, got False"),
    ("temperature", "hot", "a number from 0 to 100, got 'hot'"),
    ("temperature", 10**400, "a number from 0 to 100, got 1000"),
    ("top_k", -1, "an integer of at least 0, got -1"),
    ("top_k", 0.5, "an integer of at least 0, got 0.5"),
    ("top_p", 0, "a number above 0 and up to 1, got 0"),
    ("top_p", 0.0, "a number above 0 and up to 1, got 0"),
    ("top_p", 1.01, "a number from 0 to 1, got 1.01"),
    ("top_p", -0.1, "a number from 0 to 1, got -0.1"),
    ("top_p", float("nan"), "a number from 0 to 1, got nan"),
    ("top_p", -(10**400), "a number from 0 to 1, got -1000"),
    ("seed", -1, f"an integer from 0 to {2**63 - 1}, got -1"),
    ("seed", 2**63, f"an integer from 0 to {2**63 - 1}, got {2**63}"),
    ("seed", 1.5, f"an integer from 0 to {2**63 - 1}, got 1.5"),
    ("stop_token_ids", "12", "a list of integers, got '12'"),
    ("stop_token_ids", 12, "a list of integers, got 12"),
    ("stop_token_ids", {12}, "a list of integers, got {12}"),
    ("stop_token_ids", [1, -2], "an integer of at least 0, got -2"),
    ("stop_token_ids", [1, "2"], "an integer of at least 0, got '2'"),
    ("stop_token_ids", [True], "an integer of at least 0, got True"),
    ("stop_token_ids", [1] * 129, "at most 128 ids, got 129"),
    ("ignore_eos", 1, "true or false, got 1"),
    ("ignore_eos", "yes", "true or false, got 'yes'"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_refusal_names_field_value_and_limit(field: str, value: object, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field, f"the error blames {caught.value.field!r}, expected {field!r}"
    assert str(caught.value).startswith(f"{field}: expected {message}"), f"got {caught.value}"
    assert len(str(caught.value)) < 200, f"the message echoes all of a long value: {caught.value}"


def test_every_field_has_a_refusal_above() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {field for field, _, _ in REFUSED} == fields, "a new field needs its bad values in this file"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1, "min_tokens": 1},
        {"max_tokens": 10**30, "min_tokens": 10**30},
        {"temperature": 0},
        {"temperature": 100},
        {"top_k": 0},
        {"top_k": 10**30},
        {"top_p": 1},
        {"seed": 0},
        {"seed": 2**63 - 1},
        {"stop_token_ids": [0] * 128},
        {"stop_token_ids": ()},
    ],
    ids=str,
)
def test_the_limits_themselves_are_accepted(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    for name, value in fields.items():
        got = getattr(params, name)
        assert got == (tuple(value) if name == "stop_token_ids" else value), f"{name}={value} became {got}"


@pytest.mark.parametrize(("temperature", "expected"), [(1e-50, 0), (9e-6, 0), (1e-5, 1e-5), (0.5, 0.5)])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(temperature: float, expected: float) -> None:
    assert SamplingParams(temperature=temperature).temperature == expected


@pytest.mark.parametrize(("top_p", "expected"), [(1e-50, 1e-9), (1e-9, 1e-9), (0.1, 0.1)])
def test_a_top_p_that_float32_rounds_to_0_is_lifted(top_p: float, expected: float) -> None:
    assert SamplingParams(top_p=top_p).top_p == expected


def test_params_cannot_be_changed() -> None:
    ids = [1, 2]
    params = SamplingParams(stop_token_ids=ids)  # type: ignore[arg-type]
    ids.append(3)
    assert params.stop_token_ids == (1, 2), "the caller's list must not reach into the params"
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="topk"):
        SamplingParams(topk=5)  # type: ignore[call-arg]


def test_from_body_takes_its_fields_and_leaves_the_rest() -> None:
    body = {"prompt": "Hi", "max_tokens": 7, "stop_token_ids": [4], "seed": None, "top_p": None, "stream": True}
    assert SamplingParams.from_body(body) == SamplingParams(max_tokens=7, stop_token_ids=(4,))
    assert SamplingParams.from_body({}) == SamplingParams()
    with pytest.raises(FieldError, match="^top_k: expected an integer of at least 0, got 'x'$"):
        SamplingParams.from_body({"top_k": "x"})


def test_unknown_fields_are_refused() -> None:
    check_known_fields({"prompt": "Hi", "top_k": 1}, ("prompt",))
    with pytest.raises(FieldError) as caught:
        check_known_fields({"top_k": 1, "max_token": 5}, ("prompt",))
    assert caught.value.field == "max_token"
    for name in ("unknown field", "max_tokens", "prompt"):
        assert name in str(caught.value), f"the message should help: {caught.value}"
    with pytest.raises(FieldError, match="^prompt: unknown"):
        check_known_fields({"prompt": "Hi"}, ())


def test_stop_tokens_must_be_in_the_vocabulary() -> None:
    check_vocabulary(SamplingParams(stop_token_ids=(0, 319)), 320)
    with pytest.raises(FieldError, match=r"^stop_token_ids: expected ids below 320 \(the vocabulary\), got 320$"):
        check_vocabulary(SamplingParams(stop_token_ids=(0, 320)), 320)


def test_show_is_short_whatever_it_is_given() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert show([1, "a"]) == "[1, 'a']"
    assert show("x" * 1000) == "'" + "x" * 59 + "…"
    assert show(deep) == "a list, nested too deeply"
    while deep:  # unwound by hand: some Pythons overflow the stack when they free such a list
        deep = deep.pop()


def test_an_error_as_openai_writes_it() -> None:
    error = FieldError("top_k", "expected less")
    assert isinstance(error, ValueError)
    assert openai_error(str(error), error.field) == {
        "error": {"message": "top_k: expected less", "type": "invalid_request_error", "param": "top_k", "code": None}
    }
