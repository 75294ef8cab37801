"""common/prompts.py: batches of prompts and OpenAI's newer forms of messages, which parts 3 and later accept."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from common.errors import FieldError
from common.prompts import (
    check_messages,
    encode_prompt,
    encode_prompts,
    plain_messages,
    split_prompts,
    stop_at_special_tokens,
)
from common.sampling_params import SamplingParams

USER = {"role": "user", "content": "Hi"}


def test_one_prompt_is_encoded_as_encode_prompt_does(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    for body in ({"prompt": "Once upon a time"}, {"prompt": [5, 0, 4095]}, {"messages": messages, "prompt": None}):
        assert encode_prompts(body, tiny_tokenizer, 100) == [encode_prompt(body, tiny_tokenizer, 100)], f"for {body}"


def test_batches(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = tiny_tokenizer.encode("one"), tiny_tokenizer.encode("two 🦊")
    for prompt, expected in (
        (["one", "two 🦊"], [one, two]),
        ([one, two], [one, two]),
        (["one"], [one]),
        ([[7]], [[7]]),
        ([[7]] * 128, [[7]] * 128),
    ):
        got = encode_prompts({"prompt": prompt}, tiny_tokenizer, 100)
        assert got == expected, f"for {prompt!r}"
        assert got[0] is not prompt[0], "the request's own lists must not be handed on"


def test_names_of_prompts() -> None:
    assert split_prompts("a") == [("prompt", "a")]
    assert split_prompts([1, 2]) == [("prompt", [1, 2])]
    assert split_prompts([]) == [("prompt", [])]
    assert split_prompts([[2], [1]]) == [("prompt[0]", [2]), ("prompt[1]", [1])]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "neither": ({}, "prompt", "got neither"),
    "both": ({"prompt": ["a"], "messages": [USER]}, "prompt", "got prompt and messages"),
    "number": ({"prompt": 7}, "prompt", "expected text or token ids, got 7"),
    "no ids": ({"prompt": []}, "prompt", "at least one token"),
    "a text among ids": ({"prompt": [1, "Hi"]}, "prompt[1]", "a token id from 0 to 4095, got 'Hi'"),
    "an id among texts": (
        {"prompt": ["Hi", 1]},
        "prompt",
        "expected a list of texts or a list of lists of token ids, got both",
    ),
    "null among texts": (
        {"prompt": ["Hi", None]},
        "prompt",
        "expected a list of texts or a list of lists of token ids, got both",
    ),
    "a wrong id": ({"prompt": [[1], [1, 2, 3, 4, 5, 6, 7, 4096]]}, "prompt[1][7]", "from 0 to 4095, got 4096"),
    "a list too deep": ({"prompt": [[1], [[2]]]}, "prompt[1][0]", "a token id from 0 to 4095, got [2]"),
    "an empty text": ({"prompt": ["a", ""]}, "prompt[1]", "at least one token, got an empty prompt"),
    "an empty list": ({"prompt": [[]]}, "prompt[0]", "at least one token, got an empty prompt"),
    "too long": (
        {"prompt": [[1] * 99, [1] * 100]},
        "prompt[1]",
        "This model's maximum context length is 100 tokens (max_model_len). The prompt has 100",
    ),
    "surrogate": ({"prompt": ["a", "b\ud83e"]}, "prompt[1]", "half a surrogate pair at character 1"),
    "129 prompts": ({"prompt": ["a"] * 129}, "prompt", "at most 128 prompts, got 129"),
    "long messages": ({"messages": [{**USER, "content": "a " * 200}]}, "messages", "maximum context length is 100"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_is_wrong(tiny_tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    body, field, message = REFUSED[case]
    with pytest.raises(FieldError) as caught:
        encode_prompts(body, tiny_tokenizer, 100)
    assert caught.value.field == field, f"the error blames {caught.value.field!r}, expected {field!r}"
    assert str(caught.value).startswith(f"{field}: ") and message in str(caught.value), f"got {caught.value}"


def test_plain_messages() -> None:
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": ""}, {"type": "text", "text": "brief."}]
    messages = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": "Hi", "name": "Bo"},
        {"role": "assistant", "content": "", "name": None},
    ]
    assert plain_messages(messages) == [
        {"role": "system", "content": "Be\n\nbrief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
    ]
    assert messages[0]["role"] == "developer", "the request's own messages stay as they are"


def test_parts_1_and_2_take_plain_messages_only() -> None:
    assert check_messages([USER]) == [USER]
    for message, field in (
        ({**USER, "role": "developer"}, "messages[0].role"),
        ({**USER, "content": [{"type": "text", "text": "Hi"}]}, "messages[0].content"),
    ):
        with pytest.raises(FieldError) as caught:
            check_messages([message])
        assert caught.value.field == field


@pytest.mark.parametrize("check", [check_messages, plain_messages])
@pytest.mark.parametrize("name", ["\ud800", "x" * 5000])
def test_an_unknown_field_is_dropped(check: Any, name: str) -> None:
    assert check([{**USER, name: 1, "name": "Bo", "tool_calls": [], "refusal": None}]) == [USER]


def test_stop_strings_that_are_special_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """The text does not show them, so they are looked for among the tokens."""
    start, end = tiny_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    params = SamplingParams(stop=["<|im_start|>", "x", "<|im_end|>"], stop_token_ids=[7, end])
    got = stop_at_special_tokens(params, tiny_tokenizer)
    assert (got.stop, got.stop_token_ids) == (("x",), (7, end, start)), f"got {got}"
    plain = SamplingParams(stop=["x"])
    assert stop_at_special_tokens(plain, tiny_tokenizer) is plain
    with pytest.raises(FieldError, match="^stop: .*is never found: .*im_end"):
        stop_at_special_tokens(SamplingParams(stop=["<|im_end|>\n"]), tiny_tokenizer)
