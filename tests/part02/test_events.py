"""`stream_events` by itself: outputs in, the text of server-sent events out; no socket and no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from common.outputs import CompletionOutput
from common.sampling_params import SamplingParams
from part02_streaming.async_engine import GenerationError
from part02_streaming.openai_api import ApiRequest, stream_events

LOOK = 'Look at openai_api.py::stream_events; README "Server-sent events".'
ERROR = GenerationError("the cat sat on the GPU")
is_chat_or_not = pytest.mark.parametrize("is_chat", [False, True], ids=["completion", "chat"])
Outputs = Sequence[CompletionOutput | GenerationError]


def ask(is_chat: bool, include_usage: bool = False) -> ApiRequest:
    return ApiRequest("cmpl-1", 1234, "tiny", is_chat, [1, 2, 3, 4, 5], SamplingParams(), True, include_usage)


def output(text: str, reason: Any = None, stop_reason: Any = None, num_tokens: int = 1) -> CompletionOutput:
    return CompletionOutput(0, text, [7] * num_tokens, reason, stop_reason)


async def replay(outputs: Outputs, computed: list[CompletionOutput]) -> AsyncIterator[CompletionOutput]:
    for each in outputs:
        if isinstance(each, GenerationError):
            raise each
        computed.append(each)
        yield each


async def iterate(request: ApiRequest, outputs: Any) -> AsyncIterator[str]:
    events = stream_events(request, outputs)
    if asyncio.iscoroutine(events):
        await events  # raises the error of a body without a yield
        pytest.fail(f"stream_events has no yield, so it is no generator. {LOOK}")
    async for event in events:
        yield event


def events_of(request: ApiRequest, outputs: Outputs) -> list[str]:
    async def gather() -> list[str]:
        return [event async for event in iterate(request, replay(outputs, []))]

    return asyncio.run(gather())


def payloads_of(request: ApiRequest, outputs: Outputs) -> list[dict[str, Any]]:
    """The parsed events; [DONE] must be the last."""
    events = events_of(request, outputs)
    for event in events:
        is_frame = event.startswith("data: ") and event.endswith("\n\n") and event.count("\n") == 2
        assert is_frame, f"an event is `data: …` in one line and an empty line, got {event!r}. {LOOK}"
    assert events[-1] == "data: [DONE]\n\n", f"expected data: [DONE] as the last event, got {events[-1]!r}. {LOOK}"
    assert "data: [DONE]\n\n" not in events[:-1], f"expected [DONE] once, got {events}. {LOOK}"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def check_choices(got: list[dict[str, Any]], expected: list[dict[str, Any]], is_chat: bool) -> None:
    """Each chunk has one choice. expected: its fields in addition to the common ones; text means a delta in a chat."""
    full = []
    for choice in expected:
        text = choice.get("text", "")
        delta = {"role": "assistant", "content": ""} if "role" in choice else {"content": text} if text else {}
        rest = {name: value for name, value in choice.items() if name not in ("text", "role")}
        full.append({"index": 0, "logprobs": None, "finish_reason": None, **rest}
                    | ({"delta": delta} if is_chat else {"text": text}))  # fmt: skip
    choices = [payload["choices"] for payload in got]
    assert choices == [[choice] for choice in full], f"expected the choices {full}, got {choices}. {LOOK}"


@is_chat_or_not
def test_the_order_of_the_events(is_chat: bool) -> None:
    request = ask(is_chat)
    got = payloads_of(request, [output(" one"), output(" two"), output(" three", "length")])
    expected: list[dict[str, Any]] = [{"text": " one"}, {"text": " two"}, {"text": " three"}]
    expected.append({"finish_reason": "length", "stop_reason": None})
    check_choices(got, [{"role": "assistant"}] * is_chat + expected, is_chat)
    for payload in got:
        fields = {name: payload[name] for name in ("id", "object", "created", "model")}
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        same = {"id": request.id, "object": kind, "created": request.created, "model": "tiny"}
        assert fields == same, f"every chunk has {same}, got {fields}. {LOOK}"
        assert "usage" not in payload, f"usage was not requested, got {payload}. {LOOK}"


@is_chat_or_not
@pytest.mark.parametrize("stop_reason", [None, 50, "END"])
def test_outputs_without_text_produce_no_event(is_chat: bool, stop_reason: int | str | None) -> None:
    outputs = [output(""), output(" one"), output(""), output(""), output("", "stop", stop_reason)]
    got = payloads_of(ask(is_chat), outputs)
    expected = [{"text": " one"}, {"finish_reason": "stop", "stop_reason": stop_reason}]
    check_choices(got, [{"role": "assistant"}] * is_chat + expected, is_chat)


@is_chat_or_not
def test_the_usage_counts_tokens(is_chat: bool) -> None:
    request = ask(is_chat, include_usage=True)
    *chunks, last = payloads_of(request, [output(""), output(" one"), output(" two", num_tokens=3), output("", "stop")])
    expected = {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert last.get("usage") == expected, (
        f"four outputs with 1, 1, 3 and 1 tokens, two of them without text: expected {expected}, got {last}. {LOOK}"
    )
    assert last["choices"] == [], f"the chunk with the usage has no choices, got {last}. {LOOK}"
    assert all("usage" in chunk and chunk["usage"] is None for chunk in chunks), (
        f"the chunks before have usage null: {chunks}. {LOOK}"
    )
    assert len(chunks) == 3 + is_chat, f"expected two texts, the finish reason and in a chat the role: {chunks}. {LOOK}"


@is_chat_or_not
@pytest.mark.parametrize("num_before", [0, 2])
def test_an_error_becomes_an_event(is_chat: bool, num_before: int) -> None:
    request = ask(is_chat, include_usage=True)
    *before, last = payloads_of(request, [*[output(" a")] * num_before, ERROR])
    expected = {"error": {"message": str(ERROR), "type": "internal_error", "param": None, "code": None}}
    assert last == expected, f"the engine failed: expected {expected} and no usage before [DONE], got {last}. {LOOK}"
    role = [{"role": "assistant"}] * (is_chat and num_before > 0)
    check_choices(before, role + [{"text": " a"}] * num_before, is_chat)


@is_chat_or_not
def test_each_event_comes_with_its_output(is_chat: bool) -> None:
    """The role of a chat comes with the first output: clients take the first event for the first token."""
    outputs, computed = [output(" one"), output(" two"), output(" three", "length")], []

    async def check() -> None:
        events = iterate(ask(is_chat), replay(outputs, computed))
        for number in [*[1] * is_chat, 1, 2, 3]:
            event = await events.__anext__()
            assert len(computed) == number, f"event {event!r} came after {len(computed)} outputs, not {number}. {LOOK}"
        async for _ in events:
            pass

    asyncio.run(check())


@pytest.mark.parametrize("text", ["a\nb", "\r\n\r\n", "data: [DONE]\n\n", "🦊 \u2028 \u0085", '"\\', "\0"], ids=ascii)
def test_any_text_stays_in_its_event(text: str) -> None:
    got = payloads_of(ask(is_chat=True), [output(text), output("", "stop")])
    check_choices(got, [{"role": ""}, {"text": text}, {"finish_reason": "stop", "stop_reason": None}], is_chat=True)
