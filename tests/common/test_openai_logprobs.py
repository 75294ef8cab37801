"""common/openai_app: log probabilities in both APIs' forms, and the text of single tokens."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from common.openai_app.logprobs import TokenTexts
from common.outputs import CompletionOutput, Logprob
from tests.common.openai_fakes import GOOD, FakeEngine, Server, check_error, delta, serving
from tests.http_checks import CHAT, COMPLETIONS


def entry(letter: str, logprob: float) -> dict[str, Any]:
    return {"token": f" {letter}", "logprob": logprob, "bytes": [32, ord(letter)]}


def contents(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for event in events for c in event["choices"] if c["logprobs"] for e in c["logprobs"]["content"]]


def test_the_form_of_a_chat(server: Server) -> None:
    answer = server.whole(CHAT, logprobs=True, top_logprobs=2)
    expected = [
        {**entry("k", -1.0), "top_logprobs": [entry("l", -0.5), entry("k", -1.0)]},
        {**entry("l", -1.0), "top_logprobs": [entry("m", -0.5), entry("l", -1.0)]},
    ]
    assert answer["choices"][0]["logprobs"] == {"content": expected}
    assert contents(server.events(CHAT, logprobs=True, top_logprobs=2)) == expected


def test_a_chat_gets_as_many_as_it_asks_for(server: Server) -> None:
    for fields, num_top in (({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 1}, 1), ({"top_logprobs": 20}, 20)):
        answer = server.whole(CHAT, logprobs=True, n=2, **fields)
        assert server.engine.streams[-1].params.logprobs == num_top
        for choice in answer["choices"]:
            first, second = choice["logprobs"]["content"]
            assert [len(first["top_logprobs"]), len(second["top_logprobs"])] == [num_top] * 2, "not the sampled one too"
    for fields in ({}, {"logprobs": False}, {"logprobs": None, "top_logprobs": 0}):
        assert server.whole(CHAT, **fields)["choices"][0]["logprobs"] is None
        assert server.engine.streams[-1].params.logprobs is None


def test_two_tokens_of_one_rank_do_not_exceed_top_logprobs(engine: FakeEngine) -> None:
    """The sampled token ties with the likeliest, as in bfloat16 it may."""
    k, l = engine.letters[10], engine.letters[11]  # noqa: E741
    tie = {k: Logprob(-0.5, 1), l: Logprob(-0.5, 1)}
    engine.script = [delta(" k", [k], "length", logprobs=[tie])]
    with serving(engine) as server:
        answer = server.whole(CHAT, logprobs=True, top_logprobs=1, max_tokens=1)
    [content] = answer["choices"][0]["logprobs"]["content"]
    assert len(content["top_logprobs"]) == 1, f"top_logprobs=1: got {content}"


def test_the_form_of_a_completion(server: Server) -> None:
    expected: dict[str, Any] = {
        "tokens": [" c", " d"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{" c": -1.0, " d": -0.5}, {" d": -1.0, " e": -0.5}],
        "text_offset": [0, 2],
    }
    assert server.whole(COMPLETIONS, logprobs=1)["choices"][0]["logprobs"] == expected
    chunks = [event["choices"][0] for event in server.events(COMPLETIONS, logprobs=1)]
    for name, values in expected.items():
        got = [value for chunk in chunks if chunk["logprobs"] for value in chunk["logprobs"][name]]
        assert got == values, f"{name} of all chunks: expected {values}, got {got}"
    alone = server.whole(COMPLETIONS, logprobs=0)["choices"][0]["logprobs"]
    assert alone["top_logprobs"] == [{" c": -1.0}, {" d": -1.0}], "the sampled token is always reported"
    assert server.whole(COMPLETIONS, logprobs=5)["choices"][0]["logprobs"]["tokens"] == [" c", " d"]


def test_wrong_values(server: Server) -> None:
    for value in (1, 0, "true", []):
        check_error(server.post(CHAT, GOOD[CHAT], logprobs=value), 400, "logprobs", "expected true or false")
    for value in (-1, 21, 1.5, True, "3", []):
        response = server.post(CHAT, GOOD[CHAT], logprobs=True, top_logprobs=value)
        check_error(response, 400, "top_logprobs", "expected an integer from 0 to 20")
    check_error(server.post(CHAT, GOOD[CHAT], top_logprobs=2), 400, "top_logprobs", "when logprobs is true, got 2")
    for value in (-1, 21, 1.5, True, "3", []):
        response = server.post(COMPLETIONS, GOOD[COMPLETIONS], logprobs=value)
        check_error(response, 400, "logprobs", "expected an integer from 0 to 20")
    assert not server.engine.streams


def with_logprobs(text: str, *token_ids: int, end: bool = False) -> CompletionOutput:
    logprobs = [{token_id: Logprob(-float(token_id), 1)} for token_id in token_ids]
    return delta(text, list(token_ids), "stop" if end else None, logprobs=logprobs)


def test_tokens_whose_text_is_held_back_come_with_the_next_event(engine: FakeEngine) -> None:
    engine.script = [
        with_logprobs("", 300), with_logprobs("x", 301, 302), with_logprobs("y", 303), with_logprobs("", 304),
        with_logprobs("", 305, end=True),
    ]  # fmt: skip
    with serving(engine) as server:
        chunks = [event["choices"][0] for event in server.events(CHAT, logprobs=True)]
        whole = server.whole(CHAT, logprobs=True)["choices"][0]["logprobs"]["content"]
    got = [[-e["logprob"] for e in chunk["logprobs"]["content"]] if chunk["logprobs"] else None for chunk in chunks]
    assert got == [None, [300, 301, 302], [303], [304, 305]], "role, two texts, and the end with what is left"
    assert [-e["logprob"] for e in whole] == [300, 301, 302, 303, 304, 305]


def test_text_and_end_in_one_output_report_each_token_once(engine: FakeEngine) -> None:
    engine.script = [with_logprobs("xy", 300, 301, end=True)]
    with serving(engine) as server:
        text, end = (event["choices"][0] for event in server.events(COMPLETIONS, logprobs=0))
    assert len(text["logprobs"]["tokens"]) == 2 and end["logprobs"] is None


def test_choices_do_not_mix(engine: FakeEngine) -> None:
    with serving(engine) as server:
        events = server.events(COMPLETIONS, logprobs=0, n=2, seed=3, max_tokens=3)
    for index, letters in enumerate(("fgh", "ghi")):
        mine = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["index"] == index]
        assert [token for part in mine if part for token in part["tokens"]] == [f" {letter}" for letter in letters]
        assert [offset for part in mine if part for offset in part["text_offset"]] == [0, 2, 4]


def test_minus_infinity_is_a_number(engine: FakeEngine) -> None:
    token, other = engine.letters[:2]
    logprobs = [{token: Logprob(-math.inf, 9), other: Logprob(0.0, 1)}]
    engine.script = [delta(" a", [token], "stop", logprobs=logprobs)]
    with serving(engine) as server:
        for path, fields in ((CHAT, {"logprobs": True}), (COMPLETIONS, {"logprobs": 1})):
            text = json.dumps(server.whole(path, **fields)) + json.dumps(server.events(path, **fields))
            assert "Infinity" not in text and text.count("-9999.0") >= 2, f"JSON knows no infinity: {text}"


def test_an_engine_without_the_requested_logprobs_is_caught(engine: FakeEngine) -> None:
    engine.script = [delta("a", [5], "stop")]
    with serving(engine, raises=ValueError) as server:
        response = server.post(CHAT, GOOD[CHAT], logprobs=True)
        check_error(response, 500, None, "ValueError", kind="internal_error")


def test_half_characters_and_where_tokens_begin(engine: FakeEngine) -> None:
    fox = engine.tokenizer.encode("ä🦊ä")
    texts = TokenTexts(engine.tokenizer)
    assert b"".join(map(texts.bytes_of, fox)) == "ä🦊ä".encode() and len(fox) > 3, "some of them are half characters"
    engine.script = [with_logprobs("", *fox), with_logprobs("ä🦊ä", engine.letters[0]), with_logprobs("", 2, end=True)]
    with serving(engine) as server:
        completion = server.whole(COMPLETIONS, logprobs=0)["choices"][0]["logprobs"]
        chat = server.whole(CHAT, logprobs=True)["choices"][0]["logprobs"]["content"]
    ids = [*fox, engine.letters[0], 2]
    offsets = [len(b"".join(map(texts.bytes_of, ids[:end])).decode(errors="ignore")) for end in range(len(ids))]
    assert completion["text_offset"] == offsets and offsets[-2:] == [3, 5], "in characters, of which halves are none"
    assert bytes(byte for e in chat[:-1] for byte in e["bytes"]) == "ä🦊ä a".encode(), "the bytes make up the text"
    assert [e["token"] for e in chat] == completion["tokens"]
    assert completion["tokens"][-1] == "<|im_end|>", "a special token is shown by its name"


def test_special_tokens_are_not_in_the_text(engine: FakeEngine) -> None:
    engine.script = [with_logprobs(" a a", engine.letters[0], 2, engine.letters[0], end=True)]
    with serving(engine) as server:
        assert server.whole(COMPLETIONS, logprobs=0)["choices"][0]["logprobs"]["text_offset"] == [0, 2, 2]


# The text of a token


def test_every_token_of_the_shipped_vocabulary(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    texts = TokenTexts(tiny_tokenizer)
    num_halves = 0
    for token_id in range(len(tiny_tokenizer)):
        text, raw = texts.text_of(token_id), texts.bytes_of(token_id)
        if text.startswith("bytes:"):
            num_halves += 1
            with pytest.raises(UnicodeDecodeError):
                raw.decode()
        else:
            assert raw == text.encode() and text == tiny_tokenizer.decode([token_id]), f"token {token_id}: {text!r}"
    assert num_halves >= 100, f"a byte-level vocabulary has all bytes above 127, got {num_halves} halves"
    assert texts.text_of(tiny_tokenizer.convert_tokens_to_ids("Ã")) == r"bytes:\xc3", (
        "Ã is how such a vocabulary writes the byte"
    )
    assert (texts.bytes_of(4099), texts.text_of(4099)) == (b"", ""), (
        "beyond the tokenizer's vocabulary there is nothing"
    )


class SentencePieceLike:
    """A vocabulary in which "▁" is a space that is lost at the start of a text, and <0xE4> a byte."""

    pieces = ["</s>", "▁the", "the", "<0xE4>", "<0x20>", "▁", "�"]
    added_tokens_decoder = {0: AddedToken("</s>", special=True)}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.pieces[token_id]

    def decode(self, token_ids: list[int]) -> str:
        return {0: "</s>", 1: "the", 2: "the", 3: "�", 4: " ", 5: "", 6: "�"}[token_ids[0]]


def test_other_vocabularies() -> None:
    texts = TokenTexts(SentencePieceLike())  # type: ignore[arg-type]
    assert [texts.text_of(token_id) for token_id in range(7)] == [
        "</s>", " the", "the", r"bytes:\xe4", " ", " ", "\ufffd",
    ]  # fmt: skip
    assert texts.bytes_of(3) == b"\xe4"
