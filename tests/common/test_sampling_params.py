"""common/sampling_params.py: every refusal names field, value and limit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from common.errors import FieldError, openai_error
from common.sampling_params import (
    MAX_COUNT,
    SamplingParams,
    check_known_fields,
    check_supported,
    check_vocabulary,
    show,
)

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
    ("seed", -(2**63) - 1, f"an integer from {-(2**63)} to {2**63 - 1}, got {-(2**63) - 1}"),
    ("seed", 2**63, f"an integer from {-(2**63)} to {2**63 - 1}, got {2**63}"),
    ("seed", 1.5, f"an integer from {-(2**63)} to {2**63 - 1}, got 1.5"),
    ("stop_token_ids", "12", "a list of integers, got '12'"),
    ("stop_token_ids", 12, "a list of integers, got 12"),
    ("stop_token_ids", {12}, "a list of integers, got {12}"),
    ("stop_token_ids", [1, -2], "an integer of at least 0, got -2"),
    ("stop_token_ids", [1, "2"], "an integer of at least 0, got '2'"),
    ("stop_token_ids", [True], "an integer of at least 0, got True"),
    ("stop_token_ids", [1] * 129, "at most 128 ids, got 129"),
    ("stop", 5, "a string or a list of strings, got 5"),
    ("stop", None, "a string or a list of strings, got None"),
    ("stop", {"a"}, "a string or a list of strings, got {'a'}"),
    ("stop", ["a", 5], "a string or a list of strings, got ['a', 5]"),
    ("stop", [["a"]], "a string or a list of strings, got [['a']]"),
    ("stop", ["a"] * 17, "at most 16 strings, got 17"),
    ("stop", "", "1 to 1000 characters, got 0"),
    ("stop", ["a", ""], "1 to 1000 characters, got 0"),
    ("stop", "x" * 1001, "1 to 1000 characters, got 1001"),
    ("ignore_eos", 1, "true or false, got 1"),
    ("ignore_eos", "yes", "true or false, got 'yes'"),
    ("include_stop_str_in_output", 1, "true or false, got 1"),
    ("skip_special_tokens", None, "true or false, got None"),
    ("min_p", -0.1, "a number from 0 to 1, got -0.1"),
    ("min_p", 1.01, "a number from 0 to 1, got 1.01"),
    ("min_p", float("nan"), "a number from 0 to 1, got nan"),
    ("min_p", True, "a number from 0 to 1, got True"),
    ("prompt_logprobs", -1, "an integer from 0 to 20, got -1"),
    ("prompt_logprobs", 21, "an integer from 0 to 20, got 21"),
    ("prompt_logprobs", True, "an integer from 0 to 20, got True"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_refusal_names_field_value_and_limit(field: str, value: object, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field, f"the error blames {caught.value.field!r}, expected {field!r}"
    assert str(caught.value).startswith(f"{field}: expected {message}"), f"got {caught.value}"
    assert len(str(caught.value)) < 200, f"the message echoes all of a long value: {caught.value}"


def test_text_that_utf_8_cannot_encode_is_refused() -> None:
    with pytest.raises(FieldError, match="^stop: not valid Unicode: half a surrogate pair$"):
        SamplingParams(stop=("a", "b\ud800"))


def test_every_field_has_a_refusal_above() -> None:
    later = {"n", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "cache_salt"}
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - later  # see test_sampling_params_more.py
    assert {field for field, _, _ in REFUSED} == fields, "a new field needs its bad values in this file"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 1, "min_tokens": 1},
        {"max_tokens": MAX_COUNT, "min_tokens": MAX_COUNT},
        {"temperature": 0},
        {"temperature": 100},
        {"top_k": 0},
        {"top_k": MAX_COUNT},
        {"top_p": 1},
        {"min_p": 0},
        {"min_p": 1},
        {"prompt_logprobs": 0},
        {"prompt_logprobs": 20},
        {"prompt_logprobs": None},
        {"include_stop_str_in_output": True, "skip_special_tokens": False},
        {"seed": 0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"stop_token_ids": [0] * 128},
        {"stop_token_ids": ()},
        {"stop": []},
        {"stop": ["x" * 1000, "\n", " ", "日本"]},
        {"stop": ("a", "a")},
    ],
    ids=str,
)
def test_the_limits_themselves_are_accepted(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    for name, value in fields.items():
        got = getattr(params, name)
        expected = tuple(value) if isinstance(value, list) else value
        assert got == expected, f"{name}={value} became {got}"


def test_values_above_any_models_limit_are_clipped_to_fit_a_tensor() -> None:
    params = SamplingParams(max_tokens=10**30, min_tokens=10**30, top_k=10**30)
    got = (params.max_tokens, params.min_tokens, params.top_k)
    assert got == (MAX_COUNT,) * 3, f"expected {MAX_COUNT} for each of max_tokens, min_tokens, top_k, got {got}"


def test_one_stop_string_means_a_list_of_one() -> None:
    assert SamplingParams(stop="END").stop == ("END",), "four characters of one string are not four strings"  # type: ignore[arg-type]


@pytest.mark.parametrize(("temperature", "expected"), [(1e-50, 0), (9e-6, 0), (1e-5, 1e-5), (0.5, 0.5)])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(temperature: float, expected: float) -> None:
    assert SamplingParams(temperature=temperature).temperature == expected


@pytest.mark.parametrize(("top_p", "expected"), [(1e-50, 1e-9), (1e-9, 1e-9), (0.1, 0.1)])
def test_a_top_p_that_float32_rounds_to_0_is_raised(top_p: float, expected: float) -> None:
    assert SamplingParams(top_p=top_p).top_p == expected


def test_params_cannot_be_changed() -> None:
    ids, strings = [1, 2], ["a"]
    params = SamplingParams(stop_token_ids=ids, stop=strings)  # type: ignore[arg-type]
    ids.append(3)
    strings.append("b")
    got = (params.stop_token_ids, params.stop)
    assert got == ((1, 2), ("a",)), f"the caller's lists must not reach into the params: got {got}"
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 5  # type: ignore[misc]
    with pytest.raises(TypeError, match="topk"):
        SamplingParams(topk=5)  # type: ignore[call-arg]


def test_from_body_reads_its_fields_and_ignores_the_rest() -> None:
    body = {"prompt": "Hi", "max_tokens": 7, "stop_token_ids": [4], "seed": None, "top_p": None, "stream": True}
    assert SamplingParams.from_body(body) == SamplingParams(max_tokens=7, stop_token_ids=(4,))
    assert SamplingParams.from_body({"stop": "a"}) == SamplingParams.from_body({"stop": ["a"]}) != SamplingParams()
    assert SamplingParams.from_body({"stop": None}) == SamplingParams(), "null means the default"
    assert SamplingParams.from_body({}) == SamplingParams()
    with pytest.raises(FieldError, match="^top_k: expected an integer of at least 0, got 'x'$"):
        SamplingParams.from_body({"top_k": "x"})


def test_a_request_has_openai_s_limit_of_the_temperature() -> None:
    """Programs and a model's own defaults may go beyond it."""
    assert SamplingParams.from_body({"temperature": 2}).temperature == 2
    for value in (2.01, 100, -1, "hot"):
        with pytest.raises(FieldError, match="^temperature: expected a number from 0 to 2, got "):
            SamplingParams.from_body({"temperature": value})
    assert SamplingParams.from_body({"temperature": None}, {"temperature": 5.0}).temperature == 5


def test_unknown_fields_are_refused() -> None:
    check_known_fields({"prompt": "Hi", "top_k": None}, ("top_k", "prompt", "max_tokens"))
    with pytest.raises(FieldError) as caught:
        check_known_fields({"top_k": 1, "max_token": 5, "nor": 6}, {"top_k", "prompt", "max_tokens"})
    assert caught.value.field == "max_token"
    expected = "max_token: unknown field: expected one of max_tokens, prompt, top_k"
    assert str(caught.value) == expected, f"the message should help: {caught.value}"
    with pytest.raises(FieldError, match="^top_k: unknown"):
        check_known_fields({"top_k": 1}, ())  # a field of SamplingParams, but one that this server does not take


ASKED: dict[str, Any] = {
    "max_tokens": 5, "min_tokens": 1, "temperature": 0, "top_k": 3, "top_p": 0.5, "seed": 0, "stop_token_ids": [0],
    "stop": "END", "ignore_eos": True,
}  # fmt: skip


@pytest.mark.parametrize("field", ASKED)
def test_unsupported_fields_are_refused(field: str) -> None:
    others = [name for name in ASKED if name != field]
    check_supported(SamplingParams(**{name: ASKED[name] for name in others}), others)
    check_supported(SamplingParams(**{field: ASKED[field]}), [field])
    with pytest.raises(FieldError, match="^" + field + ": not supported by this part, got ") as caught:
        check_supported(SamplingParams(**{field: ASKED[field]}), others)
    assert caught.value.field == field


def test_default_values_are_always_supported() -> None:
    check_supported(SamplingParams(), [])
    check_supported(SamplingParams(stop=[], temperature=1, seed=None), [])  # type: ignore[arg-type]
    with pytest.raises(FieldError) as caught:
        check_supported(SamplingParams(stop="x" * 1000), [])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200, f"the message echoes all of a long value: {caught.value}"


def test_stop_tokens_must_be_in_the_vocabulary() -> None:
    check_vocabulary(SamplingParams(stop_token_ids=(0, 319)), 320)
    with pytest.raises(FieldError, match=r"^stop_token_ids: expected ids below 320 \(the vocabulary\), got 320$"):
        check_vocabulary(SamplingParams(stop_token_ids=(0, 320)), 320)


def test_show_is_always_short() -> None:
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert show([1, "a"]) == "[1, 'a']"
    assert show("x" * 1000) == "'" + "x" * 59 + "…"
    assert show(deep) == "a list, nested too deeply"
    while deep:  # unwound by hand: some Pythons overflow the stack when they free such a list
        deep = deep.pop()


def test_an_error_in_openai_format() -> None:
    error = FieldError("top_k", "expected less")
    assert isinstance(error, ValueError)
    assert openai_error(str(error), error.field) == {
        "error": {"message": "top_k: expected less", "type": "invalid_request_error", "param": "top_k", "code": None}
    }
