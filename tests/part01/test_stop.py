"""`check_stop`: the order of its checks, and how `generate` uses the result."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from part01_simple_server.server import LLM, check_stop

LOOK = 'Look at server.py::check_stop; README "When to stop".'
MASK = 'Look at min_tokens in server.py::LLM.generate; README "When to stop".'
EOS = frozenset({2, 3})
PROMPT = [980, 899, 414, 14, 1115, 469, 288, 265, 1321, 274]  # "One fine day, Nora went to the market and"

STOP_CASES: dict[str, tuple[list[int], dict[str, Any], tuple[str, int | None] | None]] = {
    "nothing ends it": ([10, 11], {}, None),
    "max_tokens": ([10, 11], {"max_tokens": 2}, ("length", None)),
    "max_tokens of 1": ([10], {"max_tokens": 1}, ("length", None)),
    "one below max_tokens": ([10], {"max_tokens": 2}, None),
    "EOS": ([10, 2], {}, ("stop", None)),
    "the other EOS": ([10, 3], {}, ("stop", None)),
    "EOS at once": ([2], {}, ("stop", None)),
    "EOS as the last allowed token": ([10, 2], {"max_tokens": 2}, ("stop", None)),
    "only the newest token counts": ([2, 10], {}, None),
    "ignore_eos": ([10, 2], {"ignore_eos": True}, None),
    "ignore_eos at max_tokens": ([10, 2], {"ignore_eos": True, "max_tokens": 2}, ("length", None)),
    "stop_token_ids": ([10, 50], {"stop_token_ids": [49, 50]}, ("stop", 50)),
    "stop_token_ids as the last allowed token": ([10, 50], {"stop_token_ids": [50], "max_tokens": 2}, ("stop", 50)),
    "an older stop token": ([50, 10], {"stop_token_ids": [50]}, None),
    "token 0 as a stop token": ([10, 0], {"stop_token_ids": [0]}, ("stop", 0)),
    "EOS before stop_token_ids": ([10, 2], {"stop_token_ids": [2]}, ("stop", None)),
    "ignored EOS in stop_token_ids": ([10, 2], {"stop_token_ids": [2], "ignore_eos": True}, ("stop", 2)),
    "EOS below min_tokens": ([2], {"min_tokens": 2}, None),
    "EOS as the token that reaches min_tokens": ([10, 2], {"min_tokens": 2}, ("stop", None)),
    "stop_token_ids below min_tokens": ([50], {"stop_token_ids": [50], "min_tokens": 2}, None),
    "stop_token_ids at min_tokens": ([10, 50], {"stop_token_ids": [50], "min_tokens": 2}, ("stop", 50)),
    "min_tokens equal to max_tokens, both reached": ([10, 11], {"min_tokens": 2, "max_tokens": 2}, ("length", None)),
}


@pytest.mark.parametrize("case", STOP_CASES)
def test_check_stop(case: str) -> None:
    output, fields, expected = STOP_CASES[case]
    got = check_stop(5, output, SamplingParams(**fields), EOS, max_model_len=1000)
    assert got == expected, f"{case}: after {output} with {fields}, expected {expected}, got {got}. {LOOK}"


@pytest.mark.parametrize(
    ("num_prompt_tokens", "output", "fields", "expected"),
    [
        (17, [10, 11], {}, None),
        (18, [10, 11], {}, ("length", None)),
        (18, [10, 2], {}, ("stop", None)),
        (18, [10, 50], {"stop_token_ids": [50]}, ("stop", 50)),
        (19, [10], {"min_tokens": 5}, ("length", None)),
        (19, [2], {"min_tokens": 5}, ("length", None)),
    ],
    ids=[
        "room for one more",
        "full",
        "full, with EOS",
        "full, with a stop token",
        "full below min_tokens",
        "EOS, too early",
    ],
)
def test_check_stop_at_the_end_of_the_context(
    num_prompt_tokens: int, output: list[int], fields: dict, expected: tuple[str, int | None] | None
) -> None:
    got = check_stop(num_prompt_tokens, output, SamplingParams(**fields), EOS, max_model_len=20)
    assert got == expected, (
        f"{num_prompt_tokens} prompt tokens and output {output} with {fields} in a context of 20: "
        f"expected {expected}, got {got}. {LOOK}"
    )


def run(llm: LLM, **fields: Any) -> CompletionOutput:
    return llm.generate(PROMPT, SamplingParams(**{"temperature": 0, "max_tokens": 16, **fields})).outputs[0]


@pytest.fixture(scope="module")
def free_run(llm: LLM) -> list[int]:
    """16 greedy tokens that nothing stopped: the tests below make one of them a stop token."""
    return run(llm, ignore_eos=True).token_ids


@pytest.fixture(scope="module")
def end(llm: LLM, free_run: list[int]) -> int:
    """A late position in the free run whose token is new there and visible in the text."""
    new = [
        i
        for i, t in enumerate(free_run)
        if t not in free_run[:i] and llm.tokenizer.decode([t], skip_special_tokens=True)
    ]
    assert new and new[-1] >= 2, f"the model repeats itself at once, {free_run}: choose another prompt for this test"
    return new[-1]


@pytest.mark.parametrize("kind", ["EOS", "stop_token_ids"])
def test_a_stop_token_ends_the_answer(
    llm: LLM, free_run: list[int], end: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = free_run[end]
    if kind == "EOS":
        monkeypatch.setattr(llm, "eos_token_ids", frozenset({token}))
    output = run(llm, stop_token_ids=[] if kind == "EOS" else [token], ignore_eos=kind != "EOS")
    expected = ("stop", None if kind == "EOS" else token)
    got = (output.finish_reason, output.stop_reason)
    assert got == expected, f"token {token} by {kind}: expected (finish, stop) reason {expected}, got {got}. {LOOK}"
    assert output.token_ids == free_run[: end + 1], (
        f"token_ids end with the stop token {token}: expected {free_run[: end + 1]}, got {output.token_ids}. {LOOK}"
    )
    shown = llm.tokenizer.decode(free_run[:end], skip_special_tokens=True)
    assert output.text == shown, f"the text leaves the stop token out: expected {shown!r}, got {output.text!r}. {LOOK}"


def test_length_keeps_the_last_token_in_the_text(llm: LLM, free_run: list[int], end: int) -> None:
    output = run(llm, max_tokens=end + 1, ignore_eos=True)
    got = (output.token_ids, output.finish_reason, output.stop_reason)
    expected = (free_run[: end + 1], "length", None)
    assert got == expected, f"max_tokens={end + 1}, (tokens, reasons): expected {expected}, got {got}. {LOOK}"
    shown = llm.tokenizer.decode(free_run[: end + 1], skip_special_tokens=True)
    assert output.text == shown, f"nothing stopped this text: expected {shown!r}, got {output.text!r}. {LOOK}"


def test_eos_as_the_last_permitted_token_is_a_stop(
    llm: LLM, free_run: list[int], end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "eos_token_ids", frozenset({free_run[end]}))
    got = run(llm, max_tokens=end + 1).finish_reason
    assert got == "stop", f"EOS as token {end + 1} of max_tokens={end + 1}: expected 'stop', got {got!r}. {LOOK}"


@pytest.mark.parametrize("kind", ["EOS", "stop_token_ids"])
def test_min_tokens_masks_stop_tokens(
    llm: LLM, free_run: list[int], end: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, min_tokens = free_run[end], end + 3
    if kind == "EOS":
        monkeypatch.setattr(llm, "eos_token_ids", frozenset({token}))
    output = run(
        llm,
        stop_token_ids=[] if kind == "EOS" else [token],
        ignore_eos=kind != "EOS",
        min_tokens=min_tokens,
        max_tokens=24,
    )
    got = output.token_ids
    assert got[:end] == free_run[:end], (
        f"before the stop token nothing changes: expected {free_run[:end]}, got {got[:end]}. {MASK}"
    )
    assert token not in got[:min_tokens], (
        f"{kind} {token} has a logit of -inf before min_tokens: expected the first {min_tokens} tokens without it, got "
        f"{got[:min_tokens]}. {MASK}"
    )
    assert len(got) >= min_tokens, f"min_tokens: expected at least {min_tokens} tokens, got {len(got)}. {MASK}"


def test_min_tokens_allows_a_stop_token_once_reached(
    llm: LLM, free_run: list[int], end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "eos_token_ids", frozenset({free_run[end]}))
    output = run(llm, min_tokens=end)
    assert output.token_ids == free_run[: end + 1] and output.finish_reason == "stop", (
        f"min_tokens={end} are generated before EOS, token {end + 1}: expected {free_run[: end + 1]} and 'stop', "
        f"got {output.token_ids} and {output.finish_reason!r}. {MASK}"
    )


def test_min_tokens_does_not_mask_an_ignored_eos(
    llm: LLM, free_run: list[int], end: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "eos_token_ids", frozenset({free_run[end]}))
    got = run(llm, min_tokens=16, ignore_eos=True).token_ids
    assert got == free_run, f"ignore_eos makes EOS a token like any other: expected {free_run}, got {got}. {MASK}"


@pytest.mark.parametrize(("max_model_len", "expected"), [(16, 6), (11, 1), (26, 16), (1000, 16)])
@pytest.mark.parametrize("min_tokens", [0, 16])
def test_the_end_of_the_context_ends_the_answer(
    llm: LLM, free_run: list[int], max_model_len: int, expected: int, min_tokens: int
) -> None:
    short = copy.copy(llm)
    short.max_model_len = max_model_len
    output = run(short, ignore_eos=True, min_tokens=min_tokens)
    assert output.token_ids == free_run[:expected] and output.finish_reason == "length", (
        f"a prompt of 10 in a context of {max_model_len}, max_tokens=16, min_tokens={min_tokens}: expected {expected} "
        f"tokens and 'length', got {len(output.token_ids)} and {output.finish_reason!r}. {LOOK}"
    )
