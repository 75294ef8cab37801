"""/v1/responses: text in, text out, whole and as events, through OpenAI's own client and by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from transformers import PreTrainedTokenizerBase

from common.serving import GenerationError
from tests.common.openai_fakes import CONTEXT, FakeEngine, Server, check_error, delta, serving
from tests.common.test_openai_clients import openai_client

RESPONSES = "/v1/responses"
GOOD = {"input": "Hi", "max_output_tokens": 3}


@pytest.fixture
def engine(tiny_tokenizer: PreTrainedTokenizerBase) -> FakeEngine:
    return FakeEngine(tiny_tokenizer)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Server]:
    with serving(engine) as server:
        yield server


def events_of(text: str) -> list[dict[str, Any]]:
    """Each event's data; its name must be its type."""
    found = []
    for event in text.split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}", f"got {event!r}"
    return found


def test_the_official_client(server: Server) -> None:
    with openai_client(server) as client:
        whole = client.responses.create(model="tiny", input="Hi", max_output_tokens=3, temperature=0)
        assert whole.output_text == " k l m" and whole.status == "incomplete" and whole.usage is not None
        assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
        assert whole.usage.output_tokens == 3 and whole.usage.total_tokens == whole.usage.input_tokens + 3
        events = list(client.responses.create(model="tiny", input="Hi", max_output_tokens=3, stream=True))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == " k l m"
        with pytest.raises(openai.BadRequestError, match="nothing is stored"):
            client.responses.create(model="tiny", input="Go on", previous_response_id=whole.id)


def test_the_events_of_a_stream(server: Server) -> None:
    events = events_of(server.post(RESPONSES, GOOD, stream=True).text)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 3,
        "output_text.done", "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    whole = server.post(RESPONSES, GOOD).json()
    last = events[-1]["response"]
    for response in (whole, last):
        response["output"][0].pop("id")
        assert response.pop("id").startswith("resp_") and isinstance(response.pop("created_at"), int)
    assert last == whole, "the last event has the whole response"


def test_an_answer_that_ends_by_itself(engine: FakeEngine) -> None:
    engine.script = [delta("a", [1]), delta("b", [2], "stop")]
    with serving(engine) as server:
        whole = server.post(RESPONSES, {"input": "Hi"}).json()
        assert (whole["status"], whole["incomplete_details"], whole["error"]) == ("completed", None, None)
        assert events_of(server.post(RESPONSES, GOOD, stream=True).text)[-1]["type"] == "response.completed"
        with openai_client(server) as client, client.responses.stream(model="tiny", input="Hi") as stream:
            for _ in stream:
                pass
            assert stream.get_final_response().output_text == "ab", "the client's helper puts it together"


def test_what_the_model_reads(server: Server) -> None:
    parts = [{"type": "input_text", "text": "Hi"}]
    for body in (
        {"input": "Hi", "instructions": "Be brief."},
        {"input": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
        {
            "input": [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": parts},
            ]
        },
    ):
        assert server.post(RESPONSES, {**body, "max_output_tokens": 1}).status_code == 200, f"{body}"
    first, *others = [stream.prompt for stream in server.engine.streams]
    assert others == [first] * 2, "three forms of one conversation"
    assert server.engine.tokenizer.decode(first).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    again = [{"role": "user", "content": "Hi"}, *server.post(RESPONSES, GOOD).json()["output"], *others[:0]]
    again.append({"role": "user", "content": "And then?"})
    assert server.post(RESPONSES, {"input": again}).status_code == 200, "an output is sent back as it came"


def test_fields_that_change_nothing(server: Server) -> None:
    nulls = dict.fromkeys(("instructions", "tools", "previous_response_id", "reasoning", "text", "metadata", "store"))
    neutral: dict[str, Any] = {
        "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}}, "truncation": "disabled",
        "store": True, "metadata": {"a": "b"}, "parallel_tool_calls": True, "include": [], "background": False,
        "user": "Bo", "never_heard_of": 1, "n": 1, "logprobs": False,
    }  # fmt: skip
    inside: dict[str, Any] = {
        "reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}, "verbosity": "low"}
    }  # fmt: skip
    others = [
        {"reasoning": {"effort": "none"}, "text": {"format": None}},
        {"text": {"format": {"type": None}, "verbosity": None}},
        {"input": [{"type": None, "role": "user", "content": "Hi", "id": None, "status": None}]},
    ]
    for fields in ({}, nulls, neutral, inside, *others):
        response = server.post(RESPONSES, GOOD, **fields)
        assert response.status_code == 200, f"{fields}: {response.text}"
    first, *rest = [stream.params for stream in server.engine.streams]
    assert rest == [first] * 6


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"input": None}, "input", "expected text"),
        ({"input": []}, "input", "expected text"),
        ({"input": 5}, "input", "expected text"),
        ({"input": [{"type": "function_call_output"}]}, "input[0]", "expected a message"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]", "input_text"),
        ({"input": "a b c d e f g" * CONTEXT}, "input", "maximum context length"),
        ({"max_output_tokens": 0}, "max_output_tokens", "from 1 to 64"),
        ({"instructions": 5}, "instructions", "expected text"),
        ({"instructions": ["a"]}, "instructions", "expected text"),
        ({"conversation": "c"}, "conversation", "got 'c'"),
        ({"instructions": "Hi", "input": [{"role": "cat", "content": "Hi"}]}, "input[0].role", "got 'cat'"),
        ({"input": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "input[0].content[0].text", "got 5"),
        ({"input": "\ud800"}, "input", "surrogate"),
        ({"tools": [{"type": "web_search"}]}, "tools", "not supported"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "expected {} or nothing, got {'effort': 'low'}"),
        ({"text": {"format": {"type": "json_schema"}}}, "text", "not supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"temperature": 3}, "temperature", "from 0 to 2"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"n": 2}, "n", "not supported"),
        ({"n": True}, "n", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"max_tokens": 5}, "max_tokens", "send max_output_tokens"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "send max_output_tokens"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "messages", "send them as input"),
    ],
)
def test_wrong_values(server: Server, fields: dict[str, Any], param: str, word: str) -> None:
    response = server.post(RESPONSES, {**GOOD, **fields})
    assert response.status_code == 400, f"{fields}: {response.text}"
    error = response.json()["error"]
    assert (error["param"] or "").startswith(param) and word in error["message"], f"{fields}: got {error}"


def test_an_engine_that_fails(engine: FakeEngine) -> None:
    engine.script = [delta("a", [1]), GenerationError("the cat sat on the GPU")]
    with serving(engine) as server:
        check_error(server.post(RESPONSES, GOOD), 500, None, "the cat sat", kind="internal_error")
        last = events_of(server.post(RESPONSES, GOOD, stream=True).text)[-1]
        assert (last["type"], last["message"]) == ("error", "the cat sat on the GPU"), f"got {last}"
