"""common/openai_app: what a response tells about its prompt, and how messages and text become one."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from common.errors import FieldError
from common.openai_app.logprobs import LogprobsWriter, TokenTexts
from common.openai_app.protocol import ApiRequest
from common.outputs import Logprob
from common.prompts import PromptOptions, encode_prompts
from common.sampling_params import SamplingParams
from tests.common.openai_fakes import CONTEXT, FakeEngine, Server, check_error, delta, serving
from tests.http_checks import CHAT, COMPLETIONS, USER

TEXT = "he said: ä🦊"


def prompt_of(server: Server) -> list[int]:
    """Of the newest request at the engine."""
    return server.engine.streams[-1].prompt


def choices_of(events: list[dict[str, Any]], index: int = 0) -> list[dict[str, Any]]:
    return [choice for event in events for choice in event["choices"] if choice["index"] == index]


def join(choices: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The logprobs of all chunks."""
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


# Echo


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_an_echo_with_logprobs_tells_how_likely_the_prompt_was(server: Server, max_tokens: int) -> None:
    """As lm-eval asks: null for the first token, which nothing predicts."""
    fields = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    answer = server.whole(COMPLETIONS, **fields)
    [choice], prompt = answer["choices"], prompt_of(server)
    texts = TokenTexts(server.engine.tokenizer)
    num_tokens, logprobs = len(prompt) + max_tokens, choice["logprobs"]
    assert {name: len(values) for name, values in logprobs.items()} == dict.fromkeys(logprobs, num_tokens), logprobs
    assert logprobs["tokens"][: len(prompt)] == [texts.text_of(token_id) for token_id in prompt]
    expected = [None, *(-float(place) for place in range(1, len(prompt))), *[-1.0] * max_tokens]
    assert logprobs["token_logprobs"] == expected
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"][1]) == 2, "the token, and the likeliest"
    assert choice["text"].startswith(TEXT) and (choice["text"] == TEXT) == (max_tokens == 0)
    starts = [len(b"".join(map(texts.bytes_of, prompt[:end])).decode(errors="ignore")) for end in range(len(prompt))]
    assert logprobs["text_offset"] == [*starts, *(len(TEXT) + 2 * number for number in range(max_tokens))]
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", max_tokens)
    chunks = choices_of(server.events(COMPLETIONS, **fields))
    assert join(chunks) == logprobs, "streamed in pieces, the same"
    assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
    assert [chunk["finish_reason"] for chunk in chunks if chunk["finish_reason"]] == ["length"]


def test_an_echo_of_no_tokens_needs_no_logprobs(server: Server) -> None:
    for fields in ({}, {"n": 2}, {"prompt": ["a b", "c"]}):
        answer = server.whole(COMPLETIONS, **{"prompt": "a b", "echo": True, "max_tokens": 0, **fields})
        assert {choice["text"] for choice in answer["choices"]} <= {"a b", "c"}
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 0
        assert server.engine.streams[-1].params.prompt_logprobs is None


def test_no_tokens_without_an_echo_are_refused(server: Server) -> None:
    for path, field in ((COMPLETIONS, "max_tokens"), (CHAT, "max_tokens"), (CHAT, "max_completion_tokens")):
        body = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
        check_error(server.post(path, {**body, field: 0}), 400, field, "an integer from 1 to", "got 0")
    check_error(server.post(COMPLETIONS, {"prompt": "a", "echo": True, "max_tokens": -1}), 400, "max_tokens", "0 to")


def test_every_choice_has_the_logprobs_of_its_own_prompt(server: Server) -> None:
    fields = {"prompt": ["a b c", "d e"], "n": 2, "echo": True, "logprobs": 0, "max_tokens": 1}
    answer, events = server.whole(COMPLETIONS, **fields), server.events(COMPLETIONS, **fields)
    for index, prompt in enumerate(("a b c", "a b c", "d e", "d e")):
        logprobs = answer["choices"][index]["logprobs"]
        assert "".join(logprobs["tokens"][:-1]) == prompt, f"choice {index}: {logprobs}"
        assert join(choices_of(events, index)) == logprobs, f"choice {index}, streamed"


def writer_of(tokenizer: Any, params: SamplingParams) -> LogprobsWriter:
    request = ApiRequest("a", 0, "tiny", False, [[]], None, params, None)
    return LogprobsWriter(request, TokenTexts(tokenizer))


def test_where_the_tokens_of_an_echo_begin(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens count where the echoed text has them: not if the tokenizer has added them."""
    bos, hello, there = 1, *tiny_tokenizer.encode("hello")[:1], *tiny_tokenizer.encode(" there")[:1]
    name, first, second = (str(tiny_tokenizer.decode([token_id])) for token_id in (bos, hello, there))
    nothing: list[dict[int, Logprob] | None] = [None, *({token_id: Logprob(-1.0, 1)} for token_id in (hello, there))]
    for text, expected in (
        (first + second, [0, 0, len(first)]),
        (name + first + second, [0, len(name), len(name + first)]),
    ):
        writer = writer_of(tiny_tokenizer, SamplingParams(logprobs=0))
        writer.add_prompt(text, [bos, hello, there], nothing)
        writer.add(delta("", [hello], logprobs=[{hello: Logprob(-1.0, 1)}]))
        taken = writer.take()
        assert taken is not None and taken["text_offset"] == [*expected, len(text)], f"{text!r}: {taken}"


# prompt_logprobs and return_token_ids


def test_prompt_logprobs_in_vllms_form(server: Server) -> None:
    whole = server.whole(COMPLETIONS, prompt="a b", prompt_logprobs=1)
    [choice], prompt, letter = whole["choices"], prompt_of(server), server.engine.letters[0]
    texts = TokenTexts(server.engine.tokenizer)
    assert choice["prompt_logprobs"] == [
        None,
        *(
            {
                str(token_id): {"logprob": -float(place), "rank": 9, "decoded_token": texts.text_of(token_id)},
                str(letter): {"logprob": -0.25, "rank": 1, "decoded_token": " a"},
            }
            for place, token_id in enumerate(prompt[1:], start=1)
        ),
    ]
    assert choice["logprobs"] is None and "prompt_logprobs" not in whole
    chat = server.whole(CHAT, prompt_logprobs=0, n=2)
    assert len(chat["prompt_logprobs"]) == len(prompt_of(server)), "a chat has them beside its choices, once"
    assert all("prompt_logprobs" not in choice for choice in chat["choices"])
    for path in (COMPLETIONS, CHAT):
        assert "prompt_logprobs" not in str(server.whole(path)), "nobody asked"


def test_prompt_logprobs_are_not_streamed(server: Server) -> None:
    for path in (COMPLETIONS, CHAT):
        body = {"prompt": "a"} if path == COMPLETIONS else {"messages": [USER]}
        response = server.post(path, {**body, "prompt_logprobs": 1, "stream": True})
        check_error(response, 400, "prompt_logprobs", "only allowed when stream is false")
        for value in (-1, 21, True, "1"):
            check_error(server.post(path, {**body, "prompt_logprobs": value}), 400, "prompt_logprobs", "0 to 20")


def test_the_token_ids_of_prompt_and_answer(server: Server) -> None:
    fields = {"return_token_ids": True, "max_tokens": 3, "n": 2}
    whole, events = server.whole(COMPLETIONS, **fields), server.events(COMPLETIONS, **fields)
    for index in range(2):
        choice = whole["choices"][index]
        assert choice["prompt_token_ids"] == prompt_of(server) and len(choice["token_ids"]) == 3
        chunks = choices_of(events, index)
        assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt_of(server), *[None] * (len(chunks) - 1)]
        assert [token_id for chunk in chunks for token_id in chunk.get("token_ids", [])] == choice["token_ids"]
    chat, events = server.whole(CHAT, **fields), server.events(CHAT, **fields)
    assert chat["prompt_token_ids"] == prompt_of(server)
    assert [event.get("prompt_token_ids") for event in events if choices_of([event], 1)][0] == prompt_of(server)
    for index in range(2):
        streamed = [token_id for chunk in choices_of(events, index) for token_id in chunk.get("token_ids", [])]
        assert streamed == chat["choices"][index]["token_ids"] and len(streamed) == 3
    assert "token_ids" not in str(server.whole(CHAT))


def test_token_ids_whose_text_is_held_back_come_with_the_next_event(engine: FakeEngine) -> None:
    engine.script = [delta("", [300]), delta("x", [301, 302]), delta("", [303]), delta("", [304], "stop")]
    with serving(engine) as server:
        chunks = choices_of(server.events(CHAT, return_token_ids=True))
    assert [chunk.get("token_ids") for chunk in chunks] == [None, [300, 301, 302], [303, 304]]


# Truncation and templates


def test_a_prompt_is_cut_at_its_beginning(server: Server) -> None:
    server.whole(COMPLETIONS, prompt="a b c d e f")
    whole = prompt_of(server)
    for limit, kept in ((1, 1), (3, 3), (len(whole), len(whole)), (CONTEXT, len(whole))):
        server.whole(COMPLETIONS, prompt="a b c d e f", truncate_prompt_tokens=limit)
        assert prompt_of(server) == whole[-kept:], f"truncate_prompt_tokens={limit}"
    server.whole(CHAT, truncate_prompt_tokens=2)
    assert len(prompt_of(server)) == 2
    for text, limit, echo in (("a b c d", 2, " c d"), ("a b", 5, "a b")):
        answer = server.whole(COMPLETIONS, prompt=text, truncate_prompt_tokens=limit, echo=True, max_tokens=0)
        assert answer["choices"][0]["text"] == echo, "what is echoed is what the model has read"


def test_minus_1_leaves_room_for_the_answer(server: Server) -> None:
    long = "a " * CONTEXT
    for fields, room in (({"max_tokens": 10}, 10), ({"max_tokens": None}, 16)):
        server.whole(COMPLETIONS, prompt=long, truncate_prompt_tokens=-1, **fields)
        assert len(prompt_of(server)) == CONTEXT - room, f"{fields}"
    server.whole(CHAT, messages=[{"role": "user", "content": long}], truncate_prompt_tokens=-1, max_tokens=5)
    assert len(prompt_of(server)) == CONTEXT - 5
    for value in (0, -2, CONTEXT + 1, True, "3", 1.5):
        response = server.post(COMPLETIONS, {"prompt": "a", "truncate_prompt_tokens": value})
        check_error(response, 400, "truncate_prompt_tokens", f"1 to {CONTEXT} (max_model_len)")


def test_whether_the_assistants_turn_begins(server: Server) -> None:
    tokenizer = server.engine.tokenizer
    messages = [USER, {"role": "assistant", "content": "The answer is"}]
    for fields, ending in (
        ({}, "<|im_start|>assistant\n"),
        ({"add_generation_prompt": True}, "<|im_start|>assistant\n"),
        ({"add_generation_prompt": False}, "The answer is<|im_end|>\n"),
        ({"continue_final_message": True}, "The answer is"),
        ({"continue_final_message": True, "add_generation_prompt": False}, "The answer is"),
    ):
        server.whole(CHAT, messages=messages, **fields)
        text = str(tokenizer.decode(prompt_of(server)))
        assert text.endswith(ending), f"{fields}: expected the prompt to end with {ending!r}, got {text!r}"
        tokens = server.post("/tokenize", {"messages": messages, **fields}).json()["tokens"]
        assert tokens == prompt_of(server), f"/tokenize with {fields}"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    check_error(server.post(CHAT, {"messages": messages, **both}), 400, "continue_final_message", "got both")
    for name in both:
        check_error(server.post(CHAT, {"messages": messages, name: 1}), 400, name, "true or false, got 1")


def test_variables_of_the_template(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", template)
    with serving(engine) as server:
        server.whole(CHAT, chat_template_kwargs={"mood": "glad: "})
        assert engine.tokenizer.decode(prompt_of(server)) == f"glad: {USER['content']}"
        for value in ([], "a", 1):
            response = server.post(CHAT, {"messages": [USER], "chat_template_kwargs": value})
            check_error(response, 400, "chat_template_kwargs", "expected an object")
        for name in ("tokenize", "chat_template", "messages", "add_generation_prompt"):
            response = server.post(CHAT, {"messages": [USER], "chat_template_kwargs": {name: "x"}})
            check_error(response, 400, "chat_template_kwargs", f"{name!r} cannot be set here")
        monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ 1 + mood }}")
        response = server.post(CHAT, {"messages": [USER], "chat_template_kwargs": {"mood": "x"}})
        check_error(response, 400, "messages", "chat template does not accept them")


class WithBos:
    """A tokenizer that puts token 0 before each text, as Llama's does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return [0] * add_special_tokens + self._tokenizer.encode(text, add_special_tokens=False)


def test_whether_the_tokenizer_adds_its_own_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer: Any = WithBos(tiny_tokenizer)
    for body, by_default in (({"prompt": "a"}, True), ({"messages": [USER]}, False)):
        for wanted in (None, True, False):
            [token_ids] = encode_prompts(body, tokenizer, 100, PromptOptions(add_special_tokens=wanted))
            has_bos = token_ids[0] == 0
            assert has_bos == (by_default if wanted is None else wanted), f"{body}, add_special_tokens={wanted}"
    with pytest.raises(FieldError, match="^add_special_tokens: expected true or false, got 1"):
        PromptOptions.from_body({"add_special_tokens": 1}, 10, 10)
