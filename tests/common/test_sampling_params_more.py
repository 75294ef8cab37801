"""common/sampling_params.py: the fields that parts 3 and later support, and the log probabilities of outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from common.errors import FieldError
from common.outputs import CompletionOutput, Logprob
from common.sampling_params import SamplingParams, check_supported, check_vocabulary

NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[str, Any, str]] = [
    ("n", 0, "an integer from 1 to 128, got 0"),
    ("n", 129, "an integer from 1 to 128, got 129"),
    ("n", True, "an integer from 1 to 128, got True"),
    ("n", None, "an integer from 1 to 128, got None"),
    ("n", 2.0, "an integer from 1 to 128, got 2.0"),
    ("presence_penalty", -2.01, "a number from -2 to 2, got -2.01"),
    ("presence_penalty", 2.01, "a number from -2 to 2, got 2.01"),
    ("presence_penalty", NAN, "a number from -2 to 2, got nan"),
    ("frequency_penalty", -2.01, "a number from -2 to 2, got -2.01"),
    ("frequency_penalty", 2.01, "a number from -2 to 2, got 2.01"),
    ("frequency_penalty", "0", "a number from -2 to 2, got '0'"),
    ("repetition_penalty", 0, "a number from 1e-05 to 2, got 0"),
    ("repetition_penalty", 1e-300, "a number from 1e-05 to 2, got 1e-300"),
    ("repetition_penalty", -1, "a number from 1e-05 to 2, got -1"),
    ("repetition_penalty", 2.5, "a number from 1e-05 to 2, got 2.5"),
    ("repetition_penalty", INF, "a number from 1e-05 to 2, got inf"),
    ("logit_bias", [], "an object of token ids and numbers, got []"),
    ("logit_bias", None, "an object of token ids and numbers, got None"),
    ("logit_bias", "5", "an object of token ids and numbers, got '5'"),
    ("logit_bias", dict.fromkeys(range(301), 0), "at most 300 entries, got 301"),
    ("logit_bias", {"x": 1}, "token ids as keys, got 'x'"),
    ("logit_bias", {"": 1}, "token ids as keys, got ''"),
    ("logit_bias", {"-5": 1}, "token ids as keys, got '-5'"),
    ("logit_bias", {" 5": 1}, "token ids as keys, got ' 5'"),
    ("logit_bias", {"05": 1}, "token ids as keys, got '05'"),
    ("logit_bias", {"5\n": 1}, "token ids as keys, got '5\\n'"),
    ("logit_bias", {"٥": 1}, "token ids as keys, got '٥'"),
    ("logit_bias", {"9" * 5000: 1}, "token ids as keys, got '999"),
    ("logit_bias", {1.5: 1}, "token ids as keys, got 1.5"),
    ("logit_bias", {True: 1}, "token ids as keys, got True"),
    ("logit_bias", {-1: 1}, "token ids as keys, got -1"),
    ("logit_bias", {5: 100.5}, "a number from -100 to 100, got 100.5"),
    ("logit_bias", {5: -101}, "a number from -100 to 100, got -101"),
    ("logit_bias", {5: "1"}, "a number from -100 to 100, got '1'"),
    ("logit_bias", {5: None}, "a number from -100 to 100, got None"),
    ("logit_bias", {5: NAN}, "a number from -100 to 100, got nan"),
    ("logprobs", -1, "an integer from 0 to 20, got -1"),
    ("logprobs", 21, "an integer from 0 to 20, got 21"),
    ("logprobs", True, "an integer from 0 to 20, got True"),
    ("logprobs", False, "an integer from 0 to 20, got False"),
    ("cache_salt", "", "text of 1 to 1000 characters, got ''"),
    ("cache_salt", "x" * 1001, "text of 1 to 1000 characters, got 'xxx"),
    ("cache_salt", 5, "text of 1 to 1000 characters, got 5"),
    ("cache_salt", True, "text of 1 to 1000 characters, got True"),
    ("cache_salt", ["a"], "text of 1 to 1000 characters, got ['a']"),
    ("cache_salt", b"a", "text of 1 to 1000 characters, got b'a'"),
]


@pytest.mark.parametrize(("field", "value", "message"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_refusal_names_field_value_and_limit(field: str, value: object, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field, f"the error blames {caught.value.field!r}, expected {field!r}"
    assert str(caught.value).startswith(f"{field}: expected {message}"), f"got {caught.value}"
    assert len(str(caught.value)) < 200, f"the message echoes all of a long value: {caught.value}"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"n": 16},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0},
        {"repetition_penalty": 2},
        {"repetition_penalty": 1e-5},
        {"logprobs": 0},
        {"logprobs": 20},
        {"logprobs": None},
        {"cache_salt": None},
        {"cache_salt": "x"},
        {"cache_salt": "x" * 1000},
        {"cache_salt": " 日本 🦊\n"},
    ],
    ids=str,
)
def test_the_limits_themselves_are_accepted(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert {name: getattr(params, name) for name in fields} == fields


@pytest.mark.parametrize("salt", ["\ud83e", "a\udc00b"], ids=ascii)
def test_a_salt_with_half_a_surrogate_pair_is_refused(salt: str) -> None:
    """It could not be encoded in UTF-8 to hash it."""
    with pytest.raises(FieldError, match="^cache_salt: not valid Unicode"):
        SamplingParams(cache_salt=salt)


def test_a_logit_bias_is_stored_as_pairs() -> None:
    params = SamplingParams(logit_bias={"7": -100, 5: 100, "0": 0.5, "100000": 1})  # type: ignore[arg-type]
    assert params.logit_bias == ((0, 0.5), (5, 100.0), (7, -100.0), (100_000, 1.0)), (
        "in the order of the ids, as floats"
    )
    assert all(isinstance(bias, float) for _, bias in params.logit_bias)
    assert SamplingParams(logit_bias={}).logit_bias == ()  # type: ignore[arg-type]
    assert len(SamplingParams(logit_bias=dict.fromkeys(range(300), 1)).logit_bias) == 300  # type: ignore[arg-type]


def test_params_stay_hashable_and_can_be_replaced() -> None:
    bias = {5: 1.0}
    params = SamplingParams(n=3, seed=7, logit_bias=bias, stop="x", logprobs=2)  # type: ignore[arg-type]
    bias[6] = 1.0
    assert params.logit_bias == ((5, 1.0),), "the caller's mapping must not reach into the params"
    one = dataclasses.replace(params, n=1, seed=8)
    assert (one.n, one.seed, one.logit_bias, one.stop, one.logprobs) == (1, 8, ((5, 1.0),), ("x",), 2)
    assert len({params, one, dataclasses.replace(one)}) == 2


def test_from_body() -> None:
    body = {"n": 2, "logit_bias": {"5": 1}, "logprobs": 3, "presence_penalty": None}
    assert SamplingParams.from_body(body) == SamplingParams(n=2, logit_bias=((5, 1.0),), logprobs=3)
    for nothing in (None, False):
        assert SamplingParams.from_body({"logprobs": nothing}).logprobs is None, "a chat says false for none"
    with pytest.raises(FieldError, match="^logprobs: expected an integer from 0 to 20, got True"):
        SamplingParams.from_body({"logprobs": True})
    with pytest.raises(FieldError, match="^n: expected"):
        SamplingParams.from_body({"n": False})
    assert SamplingParams.from_body({"cache_salt": "x"}).cache_salt == "x"
    assert SamplingParams.from_body({"cache_salt": None}).cache_salt is None
    with pytest.raises(FieldError, match="^cache_salt: expected text of 1 to 1000 characters, got ''"):
        SamplingParams.from_body({"cache_salt": ""})


ASKED: dict[str, Any] = {
    "n": 2, "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "logit_bias": {5: 1.0},
    "logprobs": 0, "cache_salt": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", ASKED)
def test_unsupported_fields_are_refused(field: str) -> None:
    others = [name for name in ASKED if name != field]
    check_supported(SamplingParams(**{name: ASKED[name] for name in others}), others)
    with pytest.raises(FieldError, match="^" + field + ": not supported by this part, got "):
        check_supported(SamplingParams(**{field: ASKED[field]}), others)


def test_default_values_are_always_supported() -> None:
    check_supported(SamplingParams(n=1, presence_penalty=0, repetition_penalty=1, logit_bias={}), [])  # type: ignore[arg-type]


def test_biased_tokens_must_be_in_the_vocabulary() -> None:
    check_vocabulary(SamplingParams(logit_bias={0: 1, 319: 1}), 320)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"^logit_bias: expected ids below 320 \(the vocabulary\), got 320$"):
        check_vocabulary(SamplingParams(logit_bias={0: 1, 320: 1}), 320)  # type: ignore[arg-type]


def test_outputs_have_no_logprobs_unless_given() -> None:
    assert CompletionOutput(0, "", [], None, None).logprobs is None
    assert CompletionOutput(0, "", [5], None, None, [{5: Logprob(-0.5, 1)}]).logprobs == [{5: Logprob(-0.5, rank=1)}]
