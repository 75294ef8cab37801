"""common/openai_app: the responses to good requests, complete and streamed."""

from __future__ import annotations

import dataclasses
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from common.openai_app.fields import IGNORED, NEUTRAL
from common.outputs import CompletionOutput, Logprob
from common.sampling_params import SamplingParams
from tests.common.openai_fakes import CONTEXT, GOOD, FakeEngine, Server, check_error, delta, parse_events, serving
from tests.http_checks import CHAT, COMPLETIONS, DEADLINE_S, USER, both_endpoints, streamed_or_not


def text_of(choice: dict[str, Any]) -> str:
    if "text" in choice:
        return choice["text"]
    return choice["message"]["content"] if "message" in choice else choice["delta"].get("content", "")


def joined(events: list[dict[str, Any]]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + text_of(choice)
    return texts


# One answer


@both_endpoints
def test_all_fields_of_a_whole_answer(server: Server, path: str) -> None:
    answer = server.whole(path, max_tokens=3, model="tiny")
    is_chat, num_prompt_tokens = path == CHAT, len(server.engine.streams[0].prompt)
    assert re.fullmatch(("chatcmpl" if is_chat else "cmpl") + "-[0-9a-f]{32}", answer.pop("id"))
    assert isinstance(answer.pop("created"), int)
    text = " k l m" if is_chat else " c d e"
    content = {"message": {"role": "assistant", "content": text, "refusal": None}} if is_chat else {"text": text}
    assert answer == {
        "system_fingerprint": None,
        "object": "chat.completion" if is_chat else "text_completion",
        "model": "tiny",
        "choices": [{"index": 0, **content, "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": num_prompt_tokens, "completion_tokens": 3, "total_tokens": num_prompt_tokens + 3,
        },
    }  # fmt: skip


@both_endpoints
@pytest.mark.parametrize("with_usage", [False, True])
def test_all_fields_of_a_stream(server: Server, path: str, with_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    events = server.events(path, **options)
    is_chat, num_prompt_tokens = path == CHAT, len(server.engine.streams[0].prompt)
    heads = [
        {name: event.pop(name) for name in ("id", "created", "object", "model", "system_fingerprint")}
        for event in events
    ]
    assert all(head == heads[0] for head in heads), f"all events repeat one head, got {heads}"
    assert heads[0]["object"] == ("chat.completion.chunk" if is_chat else "text_completion")
    assert re.fullmatch(("chatcmpl" if is_chat else "cmpl") + "-[0-9a-f]{32}", heads[0]["id"])
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    end = {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    if is_chat:
        choices = [{**plain, "delta": {"role": "assistant", "content": ""}}]
        choices += [{**plain, "delta": {"content": text}} for text in (" k", " l")] + [{**end, "delta": {}}]
    else:
        choices = [{**plain, "text": text} for text in (" c", " d")] + [{**end, "text": ""}]
    expected: list[dict[str, Any]] = [{"choices": [choice]} for choice in choices]
    if with_usage:
        usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": 2, "total_tokens": num_prompt_tokens + 2}
        expected = [{**chunk, "usage": None} for chunk in expected] + [{"choices": [], "usage": usage}]
    assert events == expected


def test_the_form_of_events(server: Server) -> None:
    response = server.post(COMPLETIONS, GOOD[COMPLETIONS], stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert '"text":" c"' in response.text, f"JSON without spaces and without escapes, got {response.text}"


@both_endpoints
def test_any_text_is_sent_unchanged(engine: FakeEngine, path: str) -> None:
    text = 'line\nends\r\n\r, "quotes", \\, \u2028, 日本語 🦊, data: [DONE]\n\n'
    engine.script = [delta(text, [1]), delta("", [2], "stop")]
    with serving(engine) as server:
        response = server.post(path, GOOD[path], stream=True)
        assert text_of(server.whole(path)["choices"][0]) == text
    assert joined(parse_events(response.text)) == {0: text}
    assert "日本語" in response.text, "JSON need not escape what is UTF-8 anyway"


@streamed_or_not
def test_how_an_answer_ended(engine: FakeEngine, stream: bool) -> None:
    with serving(engine) as server:
        for reason in (None, 77, "END"):
            engine.script = [delta("a", [5]), delta("b", [77], "stop", reason)]
            answer = server.events(CHAT)[-1] if stream else server.whole(CHAT)
            choice = answer["choices"][0]
            assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)


@both_endpoints
def test_outputs_without_text_produce_no_event_but_count(engine: FakeEngine, path: str) -> None:
    engine.script = [delta("", [1]), delta("ab", [2, 3]), delta("", [4]), delta("", [5]), delta("c", [6], "length")]
    with serving(engine) as server:
        events = server.events(path, stream_options={"include_usage": True})
        assert server.whole(path)["usage"] == events[-1]["usage"]
    texts = [text_of(choice) for event in events for choice in event["choices"]]
    assert texts == [""] * (path == CHAT) + ["ab", "c", ""], "an empty event only for the role and the end"
    assert events[-1]["usage"]["completion_tokens"] == 6, "tokens are counted, not events"


def test_how_many_tokens_by_default(server: Server) -> None:
    prompt = len(server.engine.tokenizer.encode("Hi"))
    for fields, expected in (({}, 16), ({"min_tokens": 20}, 20), ({"min_tokens": 3}, 16), ({"max_tokens": 1}, 1)):
        answer = server.post(COMPLETIONS, {"prompt": "Hi", **fields}).json()
        assert answer["usage"]["completion_tokens"] == expected, f"{fields}: expected {expected}, got {answer}"
    for fields in ({}, {"min_tokens": 1}, {"max_tokens": None, "max_completion_tokens": None}):
        answer = server.post(CHAT, {"messages": [USER], **fields}).json()
        assert answer["usage"]["total_tokens"] == CONTEXT, f"a chat may fill the context, got {answer['usage']}"
    assert server.engine.streams[-1].params.max_tokens == CONTEXT - len(server.engine.streams[-1].prompt)
    for fields in ({"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 5}):
        answer = server.post(CHAT, {"messages": [USER], **fields}).json()
        assert answer["usage"]["completion_tokens"] == 5, f"{fields}: got {answer}"
    assert prompt == 2, "these numbers count on it"


# What reaches the engine


@both_endpoints
def test_every_sampling_field_reaches_the_engine(server: Server, path: str) -> None:
    fields: dict[str, Any] = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_k": 7, "top_p": 0.25, "seed": 11,
        "stop": ["x", "yz"], "stop_token_ids": [5, 6], "ignore_eos": True, "presence_penalty": -1,
        "frequency_penalty": 0.5, "repetition_penalty": 1.5, "cache_salt": "x",
    }  # fmt: skip
    server.whole(path, **fields, logit_bias={"7": -100, "4099": 1.5}, user="Bo")
    expected = SamplingParams(**fields, logit_bias={7: -100.0, 4099: 1.5})  # type: ignore[arg-type]
    assert server.engine.streams[0].params == expected
    assert server.engine.streams[0].extra == {}, "only an engine with priorities gets one"


@both_endpoints
def test_fields_that_change_nothing(server: Server, path: str) -> None:
    neutral = {
        "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1,
        "logit_bias": {}, "stop": [], "stop_token_ids": [], "logprobs": False, "top_logprobs": 0, "echo": False,
        "suffix": "", "response_format": {"type": "text"}, "min_tokens": 0, "stream": False, "model": "tiny",
        "length_penalty": 1, "priority": 0, "spaces_between_special_tokens": True, "tool_choice": "none",
        "parallel_tool_calls": True, "modalities": ["text"], "top_k": -1, "use_beam_search": False,
    }  # fmt: skip
    nulls = dict.fromkeys(
        [*neutral, *IGNORED, *NEUTRAL, "stream_options", "seed", "temperature", "top_p", "ignore_eos", "never heard of"]
    )
    ignored = {name: value for name in IGNORED for value in ("x", 5, [], {"a": 1})}
    expected = server.whole(path)["choices"]
    for fields in (nulls, neutral, ignored):
        assert server.whole(path, **fields)["choices"] == expected, f"{fields} change the answer"
    first, *others = [stream.params for stream in server.engine.streams]
    assert others == [first] * 3


def test_prompts_in_all_their_forms(server: Server) -> None:
    encode = server.engine.tokenizer.encode
    for prompt, expected in (
        ("one two", [encode("one two")]),
        ([5, 6], [[5, 6]]),
        (["one", "two three"], [encode("one"), encode("two three")]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["one"], [encode("one")]),
    ):
        answer = server.whole(COMPLETIONS, prompt=prompt)
        assert [stream.prompt for stream in server.engine.streams] == expected, f"for {prompt!r}"
        assert len(answer["choices"]) == len(expected)
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
        server.engine.streams.clear()


def test_messages_in_all_their_forms(server: Server) -> None:
    parts = [{"type": "text", "text": "Be", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "brief."}]
    server.whole(CHAT, messages=[{"role": "system", "content": "Be\nbrief."}, USER])
    server.whole(CHAT, messages=[{"role": "developer", "content": parts, "name": "Bo"}, {**USER, "name": None}])
    first, second = server.engine.streams
    assert first.prompt == second.prompt, "line ends join parts, developer is system, a name changes nothing"
    text = server.engine.tokenizer.decode(first.prompt)
    assert text.startswith("<|im_start|>system\nBe\nbrief.<|im_end|>"), f"got {text!r}"


# Several answers


@both_endpoints
def test_usage_in_every_chunk(server: Server, path: str) -> None:
    """vLLM's option: each chunk has the usage of its own choice so far."""
    options = {"continuous_usage_stats": True, "include_usage": True, "include_obfuscation": False}
    *chunks, last = server.events(path, n=2, max_tokens=3, stream_options=options)
    num_prompt_tokens, counts = len(server.engine.streams[0].prompt), dict[int, list[int]]()
    for chunk in chunks:
        usage, index = chunk["usage"], chunk["choices"][0]["index"]
        counts.setdefault(index, []).append(usage["completion_tokens"])
        expected = (num_prompt_tokens, num_prompt_tokens + usage["completion_tokens"])
        assert (usage["prompt_tokens"], usage["total_tokens"]) == expected, f"got {chunk}"
    for index, got in counts.items():
        first = 0 if path == CHAT else 1  # a chat's first chunk is its role
        assert got == sorted(got) and (got[0], got[-1]) == (first, 3), f"choice {index}: tokens so far were {got}"
    assert last["usage"]["completion_tokens"] == 6, f"the last chunk has the usage of all choices, got {last}"


@streamed_or_not
def test_a_client_s_own_request_id(server: Server, stream: bool) -> None:
    def id_of(headers: dict[str, str], **fields: Any) -> str:
        response = server.client.post(
            COMPLETIONS, json={**GOOD[COMPLETIONS], **fields, "stream": stream}, headers=headers
        )
        return (parse_events(response.text)[0] if stream else response.json())["id"]

    assert id_of({"X-Request-Id": "abc-1"}, request_id="other") == "cmpl-abc-1", "the header comes first"
    assert id_of({}, request_id="other") == "cmpl-other"
    assert len(id_of({"X-Request-Id": "x" * 5_000})) < 200, "a long id is cut"
    for bad in ("", 5, ["a"], "a\nb", "ä"):
        assert re.fullmatch("cmpl-[0-9a-f]{32}", id_of({}, request_id=bad)), f"{bad!r} is no id"


def test_twelve_point_zero_is_an_integer(server: Server) -> None:
    answer = server.post(COMPLETIONS, b'{"prompt": [5.0, 6], "max_tokens": 3.0, "n": 2.0, "seed": 1e0, "top_p": 1.0}')
    assert answer.status_code == 200, answer.text
    first, second = server.engine.streams
    assert (first.prompt, first.params.max_tokens, first.params.seed, second.params.seed) == ([5, 6], 3, 1, 2)
    check_error(server.post(COMPLETIONS, GOOD[COMPLETIONS], max_tokens=1.5), 400, "max_tokens")


def test_the_limits_of_the_api(server: Server) -> None:
    for fields, param in (({"max_tokens": CONTEXT + 1}, "max_tokens"), ({"temperature": 2.01}, "temperature")):
        check_error(server.post(CHAT, GOOD[CHAT], **fields), 400, param)
    assert server.whole(CHAT, max_tokens=CONTEXT, temperature=2)["usage"]["total_tokens"] == CONTEXT


@both_endpoints
@streamed_or_not
def test_n_answers_with_seeds_of_their_own(server: Server, path: str, stream: bool) -> None:
    fields: dict[str, Any] = {"n": 3, "best_of": 3, "seed": 7}
    if stream:
        events = server.events(path, **fields, stream_options={"include_usage": True})
        texts, usage = joined(events), events[-1]["usage"]
        ends = [choice["index"] for event in events for choice in event["choices"] if choice["finish_reason"]]
        assert sorted(ends) == [0, 1, 2], f"each choice ends once, got {ends}"
        if path == CHAT:
            roles = [event["choices"][0]["index"] for event in events[:-1] if "role" in event["choices"][0]["delta"]]
            assert roles == [0, 1, 2], f"each choice begins with its role, got {roles}"
    else:
        answer = server.whole(path, **fields)
        texts, usage = {c["index"]: text_of(c) for c in answer["choices"]}, answer["usage"]
        assert list(texts) == [0, 1, 2]
    streams = server.engine.streams
    assert [s.params.seed for s in streams] == [7, 8, 9]
    assert texts == {
        index: "".join(output.text for output in server.engine.answer(s.prompt, s.params))
        for index, s in enumerate(streams)
    }
    assert len(set(texts.values())) == 3
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(streams[0].prompt), 6), "a prompt counts once"


def test_seeds_and_their_absence(server: Server) -> None:
    server.whole(COMPLETIONS, n=2)
    server.whole(COMPLETIONS, n=2, seed=2**63 - 1)
    assert [stream.params.seed for stream in server.engine.streams] == [None, None, 2**63 - 1, -(2**63)]


@streamed_or_not
def test_a_batch_of_prompts_with_n_answers_each(server: Server, stream: bool) -> None:
    fields = {"prompt": ["a", "a b c d"], "n": 2, "seed": 0, "echo": True}
    texts = (
        joined(server.events(COMPLETIONS, **fields))
        if stream
        else {c["index"]: c["text"] for c in server.whole(COMPLETIONS, **fields)["choices"]}
    )
    assert [len(s.prompt) for s in server.engine.streams] == [1, 1, 4, 4], "sample j of prompt i is choice i * n + j"
    assert texts == {0: "a b c", 1: "a c d", 2: "a b c d e f", 3: "a b c d f g"}


def test_choices_are_interleaved_as_they_arrive(engine: FakeEngine) -> None:
    engine.manual = True
    body = {**GOOD[COMPLETIONS], "n": 2, "stream": True}
    with serving(engine) as server, server.client.stream("POST", COMPLETIONS, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        first, second = server.until_streams(2)
        seen = ""
        for stream, output in (
            (second, delta("B1", [1])),
            (first, delta("A1", [1])),
            (second, delta("B2", [1], "stop")),
            (first, delta("A2", [1])),
            (first, delta("A3", [1], "length")),
        ):
            stream.put(output)
            while output.text not in (seen := next(lines)):
                assert '"finish_reason":"stop"' in seen, f"expected {output.text} next, got {seen}"
            assert f'"index":{int(stream is second)},' in seen, f"got {seen}"
    assert engine.aborts == [0, 0]


@streamed_or_not
def test_echo_puts_the_prompt_before_the_answer(server: Server, stream: bool) -> None:
    for prompt, text in (("Hi there", "Hi there"), (server.engine.letters[:2], " a b")):
        fields = {"prompt": prompt, "echo": True, "n": 2}
        if stream:
            events = server.events(COMPLETIONS, **fields)
            firsts: dict[int, str] = {}
            for choice in (choice for event in events for choice in event["choices"]):
                firsts.setdefault(choice["index"], choice["text"])
            assert firsts == {0: text, 1: text}, f"each choice begins with the prompt, got {firsts}"
            texts = joined(events)
        else:
            texts = {c["index"]: c["text"] for c in server.whole(COMPLETIONS, **fields)["choices"]}
        assert all(got.startswith(text + " ") and len(got) == len(text) + 4 for got in texts.values()), f"got {texts}"


def test_models(server: Server) -> None:
    listed = server.client.get("/v1/models").json()
    [entry] = listed["data"]
    created = entry.pop("created")
    assert abs(created - time.time()) < 1_000, f"created is when the server started, got {created}"
    assert (listed["object"], entry) == (
        "list",
        {
            "id": "tiny", "object": "model", "owned_by": "local", "root": "tiny", "parent": None,
            "max_model_len": CONTEXT,
        },
    )  # fmt: skip
    assert server.client.get("/v1/models/tiny").json() == {**entry, "created": created}
    for name in ("gpt-9", "a/b", "", "x" * 3_000):
        error = check_error(server.client.get(f"/v1/models/{name}"), 404, "model", "'tiny'")
        assert error["code"] == "model_not_found"


@streamed_or_not
def test_an_output_that_is_the_first_and_the_last(engine: FakeEngine, stream: bool) -> None:
    """An output may bring text, several tokens and the finish reason at once."""
    engine.script = [CompletionOutput(5, "ab", [1, 2], "stop", None, [{1: Logprob(0, 1)}] * 2)]
    with serving(engine) as server:
        if stream:
            choices = [choice for event in server.events(COMPLETIONS) for choice in event["choices"]]
        else:
            choices = server.whole(COMPLETIONS)["choices"]
    assert "".join(choice["text"] for choice in choices) == "ab"
    assert {choice["index"] for choice in choices} == {0}, "the index is the choice's, whatever the engine says"
    assert all(choice["logprobs"] is None for choice in choices), "logprobs were not requested"


# Cached tokens


def usage_of(server: Server, path: str, stream: bool, **fields: Any) -> dict[str, Any]:
    if stream:
        return server.events(path, **fields, stream_options={"include_usage": True})[-1]["usage"]
    return server.whole(path, **fields)["usage"]


@both_endpoints
@streamed_or_not
@pytest.mark.parametrize("num_cached", [0, 16])
def test_cached_tokens_are_reported(engine: FakeEngine, path: str, stream: bool, num_cached: int) -> None:
    """The engine reports them with its first output, whether or not that has text."""
    for first in ("a", ""):
        engine.script = [
            dataclasses.replace(delta(first, [1]), num_cached_tokens=num_cached),
            delta("b", [2]), delta("c", [3], "stop"),
        ]  # fmt: skip
        with serving(engine) as server:
            usage = usage_of(server, path, stream)
            num_prompt_tokens = len(engine.streams[-1].prompt)
        assert usage == {
            "prompt_tokens": num_prompt_tokens, "completion_tokens": 3, "total_tokens": num_prompt_tokens + 3,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }, f"got {usage}"  # fmt: skip


def test_cached_tokens_are_reported_once_in_a_stream(engine: FakeEngine) -> None:
    engine.script = [dataclasses.replace(delta("a", [1]), num_cached_tokens=16), delta("b", [2], "stop")]
    with serving(engine) as server:
        without = server.events(COMPLETIONS)
        events = server.events(COMPLETIONS, stream_options={"include_usage": True})
    assert not any("usage" in event for event in without), f"usage was not requested: {without}"
    reported = [event for event in events if "cached_tokens" in str(event)]
    assert reported == events[-1:], f"only in the usage: {events}"


@both_endpoints
@streamed_or_not
def test_an_engine_that_reports_no_cache(server: Server, path: str, stream: bool) -> None:
    usage = usage_of(server, path, stream)
    assert set(usage) == {"prompt_tokens", "completion_tokens", "total_tokens"}, f"got {usage}"


@both_endpoints
@streamed_or_not
def test_the_cached_tokens_of_a_prompt_count_once(engine: FakeEngine, path: str, stream: bool) -> None:
    """n answers: the first computes the prompt, the others hit it. Only the first counts, whatever arrives first."""
    engine.manual = True
    with serving(engine) as server, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(usage_of, server, path, stream, n=3)
        streams = server.until_streams(3)
        for number in (2, 0, 1):
            output = dataclasses.replace(delta("a", [1]), num_cached_tokens=[2, 7, 8][number])
            streams[number].put(output, delta("b", [2], "stop"))
        usage = asked.result(DEADLINE_S)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}, f"2 by the first answer, 7 and 8 by others: {usage}"
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(streams[0].prompt), 6), f"got {usage}"


@streamed_or_not
def test_the_cached_tokens_of_several_prompts_add_up(engine: FakeEngine, stream: bool) -> None:
    """Sample j of prompt i is choice i · n + j; of each prompt, the first one counts. An engine may report nothing."""
    for reported, expected in (
        ([1, 20, 2, 40, 4, 80], 7),
        ([0, 20, 0, 40, 0, 80], 0),
        ([None, 9, 2, None, None, 9], 2),
    ):
        engine.manual = True
        first = len(engine.streams)
        with serving(engine) as server, ThreadPoolExecutor(1) as pool:
            asked = pool.submit(usage_of, server, COMPLETIONS, stream, prompt=["a", "b c", "d e f"], n=2)
            for stream_, num_cached in zip(server.until_streams(first + 6)[first:], reported, strict=True):
                stream_.put(dataclasses.replace(delta("a", [1]), num_cached_tokens=num_cached), delta("b", [2], "stop"))
            usage = asked.result(DEADLINE_S)
        assert usage["prompt_tokens_details"] == {"cached_tokens": expected}, (
            f"{reported}: expected {expected}, got {usage}"
        )
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 12), f"got {usage}"
