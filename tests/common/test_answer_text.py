"""common/answer_text.py: an answer's text goes on where the prompt's ends, whatever the tokenizer does at a start."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.answer_text import answer_text, end_of_prompt, special_tokens


@pytest.fixture(scope="module")
def sentencepiece() -> Any:
    """A tokenizer of Llama 2's kind: "▁" is a space, which is dropped at the start of a text; bytes have tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hello", "▁world", "▁", "lo"]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, eos_token="</s>")


def ids(tokenizer: Any, *pieces: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        (["▁hello"], ["▁world"], " world"),
        (["▁hello"], ["lo"], "lo"),
        (["<s>"], ["▁world"], "world"),
        (["<s>", "▁hello", "</s>"], ["▁world", "▁world"], " world world"),
        (["▁hello"] * 20, ["▁", "▁world"], "  world"),
        (["▁hello"], [], ""),
        (["▁hello", "<0xC3>"], ["<0xA9>", "lo"], "élo"),
        (["▁hello", "<0xF0>", "<0x9F>", "<0xA6>"], ["<0x8A>"], "🦊"),
        (["▁hello", "<0xF0>", "<0x9F>"], [], ""),
        (["<0xF0>", "<0x9F>"], ["<0xA6>", "<0x8A>"], "🦊"),
    ],
)
def test_the_text_of_an_answer(sentencepiece: Any, prompt: list[str], answer: list[str], expected: str) -> None:
    got = answer_text(sentencepiece, ids(sentencepiece, *prompt), ids(sentencepiece, *answer))
    assert got == expected, f"{answer} after {prompt}: expected {expected!r}, got {got!r}"


def test_a_prompt_and_its_answer_make_up_the_whole_text(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Wherever the tokens are cut in two, also within a character."""
    token_ids = tiny_tokenizer.encode("he😀 said: 日本 🦊!")
    whole = tiny_tokenizer.decode(token_ids)
    for cut in range(1, len(token_ids)):
        prompt, answer = token_ids[:cut], token_ids[cut:]
        tail, end = end_of_prompt(tiny_tokenizer, prompt)
        before = tiny_tokenizer.decode(prompt[: cut - len(tail) + end])
        assert before + answer_text(tiny_tokenizer, prompt, answer) == whole, f"cut after {cut} tokens"


def test_special_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    found = special_tokens(tiny_tokenizer)
    assert {"<|im_start|>", "<|im_end|>"} <= set(found), f"got {found}"
    assert tiny_tokenizer.decode(list(found.values()), skip_special_tokens=True) == ""
