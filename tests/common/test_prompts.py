"""common/prompts.py: text or messages become token ids, or an error that names what is wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.checkpoint import MODELS_DIR
from common.errors import FieldError
from common.prompts import check_messages, encode_prompt

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODELS_DIR / "tiny")


def test_text_is_tokenized_unchanged(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("Once upon a time", " leading space", "line\n\tbreaks", "日本語 🦊", "\0", "a"):
        ids = encode_prompt({"prompt": text}, tokenizer, 1000)
        assert ids and all(isinstance(token, int) for token in ids), f"{text!r}: got {ids}"
        assert tokenizer.decode(ids) == text, f"{text!r} was decoded as {tokenizer.decode(ids)!r}"


def test_a_prompt_that_is_too_long_is_refused_without_a_warning(
    tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers would log that the model will fail, which is not so."""
    tokenizer = copy.deepcopy(tokenizer)  # it warns once
    for body in ({"prompt": "a b c " * 1_000}, {"messages": [{**USER, "content": "a b c " * 1_000}]}):
        with pytest.raises(FieldError, match="maximum context length"):
            encode_prompt(body, tokenizer, 1_000)
    assert not caplog.records, f"expected nothing in the log, got {caplog.messages}"


def test_token_ids_are_used_unchanged(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [0, 4095, *tokenizer.encode("Once upon a time"), 0]
    body = {"prompt": ids}
    got = encode_prompt(body, tokenizer, 1000)
    assert got == ids, f"token ids must reach the model as they were sent: expected {ids}, got {got}"
    assert got is not body["prompt"], "the request's own list must not be handed on"


def test_messages_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Bye"},
    ]
    ids = encode_prompt({"messages": messages, "prompt": None}, tokenizer, 1000)
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids) == expected
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ids.count(start) == 5, f"the template's markers must be single tokens: expected 5 of {start} in {ids}"


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "neither": ({}, "prompt", "expected either prompt or messages, got neither"),
    "nulls": ({"prompt": None, "messages": None}, "prompt", "got neither"),
    "both": ({"prompt": "", "messages": []}, "prompt", "got prompt and messages"),
    "empty": ({"prompt": ""}, "prompt", "at least one token, got an empty prompt"),
    "number": ({"prompt": 7}, "prompt", "expected text or token ids, got 7"),
    "bytes": ({"prompt": b"Hi"}, "prompt", "expected text or token ids, got b'Hi'"),
    "tuple of ids": ({"prompt": (1, 2)}, "prompt", "expected text or token ids, got (1, 2)"),
    "no ids": ({"prompt": []}, "prompt", "at least one token, got an empty prompt"),
    "a text among ids": ({"prompt": [1, "Hi"]}, "prompt[1]", "a token id from 0 to 4095, got 'Hi'"),
    "ids nested": ({"prompt": [[1, 2]]}, "prompt[0]", "a token id from 0 to 4095, got [1, 2]"),
    "half an id": ({"prompt": [1.0]}, "prompt[0]", "a token id from 0 to 4095, got 1.0"),
    "true for an id": ({"prompt": [True]}, "prompt[0]", "a token id from 0 to 4095, got True"),
    "id below the vocabulary": ({"prompt": [5, 5, -1]}, "prompt[2]", "a token id from 0 to 4095, got -1"),
    "id above the vocabulary": ({"prompt": [4096]}, "prompt[0]", "a token id from 0 to 4095, got 4096"),
    "ids as messages": ({"messages": [1, 2]}, "messages[0]", "an object with role and content, got 1"),
    "surrogate": ({"prompt": "ab\ud83e"}, "prompt", "half a surrogate pair at character 2"),
    "no messages": ({"messages": []}, "messages", "at least one message, got []"),
    "text messages": ({"messages": "Hi"}, "messages", "a list of at least one message, got 'Hi'"),
    "tuple": ({"messages": (USER,)}, "messages", "a list of at least one message"),
    "not an object": ({"messages": [USER, 5]}, "messages[1]", "an object with role and content, got 5"),
    "tool calls": (
        {"messages": [{**USER, "tool_calls": [{}]}]},
        "messages[0].tool_calls",
        "not supported by this engine",
    ),
    "role": ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role", "system, user, assistant, got 'tool'"),
    "no role": ({"messages": [{"content": "Hi"}]}, "messages[0].role", "got None"),
    "no content": ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "expected text, got None"),
    "parts": ({"messages": [{**USER, "content": [{}]}]}, "messages[0].content", "expected text, got [{}]"),
    "surrogate content": ({"messages": [{**USER, "content": "\udc00"}]}, "messages[0].content", "at character 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_names_what_is_wrong(tokenizer: PreTrainedTokenizerBase, case: str) -> None:
    body, field, message = REFUSED[case]
    with pytest.raises(FieldError) as caught:
        encode_prompt(body, tokenizer, 1000)
    assert caught.value.field == field, f"the error blames {caught.value.field!r}, expected {field!r}"
    assert str(caught.value).startswith(f"{field}: ") and message in str(caught.value), f"got {caught.value}"


@pytest.mark.parametrize("body", [{"prompt": "a b c d e f"}, {"prompt": [9] * 6}, {"messages": [USER]}], ids=str)
def test_a_prompt_must_leave_room_for_an_answer(tokenizer: PreTrainedTokenizerBase, body: dict[str, Any]) -> None:
    [field] = body
    count = len(encode_prompt(body, tokenizer, 1000))
    assert len(encode_prompt(body, tokenizer, count + 1)) == count, "room for one token is enough"
    for context in (count, count - 1):
        with pytest.raises(FieldError) as caught:
            encode_prompt(body, tokenizer, context)
        assert caught.value.field == field
        for word in (f"{count} tokens", f"{context} tokens", "max_model_len"):
            assert word in str(caught.value), f"expected {word!r} in {caught.value}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "chat_template is not set"),
        ("{{ raise_exception('system messages are not supported') }}", "not supported"),
    ],
)
def test_a_template_that_is_missing_or_refuses(template: str | None, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS_DIR / "tiny")
    tokenizer.chat_template = template
    with pytest.raises(FieldError, match="^messages: the model's chat template") as caught:
        encode_prompt({"messages": [USER]}, tokenizer, 1000)
    assert message in str(caught.value), f"got {caught.value}"


def test_good_messages_are_returned_unchanged() -> None:
    assert check_messages([USER]) == [USER]
