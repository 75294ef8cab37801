"""/v1/responses: OpenAI's newer API, for text. It is a chat in other words, and nothing is stored."""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from common.errors import FieldError
from common.openai_app.errors import as_api_error
from common.openai_app.fields import CHAT_FIELDS, is_same, not_supported
from common.openai_app.generation import Generation
from common.openai_app.protocol import ApiRequest, StreamOptions, build_request
from common.outputs import CompletionOutput, join_outputs
from common.request_body import parse_json
from common.sampling_params import show
from common.serving import GenerationError, ServingEngine

logger = logging.getLogger(__name__)

CHAT_NAMES = {"max_output_tokens": "max_completion_tokens"}  # what chats call it; the other fields have the same name
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,), "best_of": (1,), "conversation": (), "include": ([],), "logprobs": (False,),
    "max_completion_tokens": (), "max_tokens": (), "max_tool_calls": (), "messages": (), "n": (1,),
    "previous_response_id": (), "prompt": (), "prompt_logprobs": (), "reasoning": ({}, {"effort": "none"}),
    "return_token_ids": (False,),
    "text": ({"format": {"type": "text"}}, {}), "tools": ([],),
    "tool_choice": ("none", "auto"), "top_logprobs": (0,), "truncation": ("disabled",),
}  # fmt: skip
INSTEAD = {
    "max_completion_tokens": ": send max_output_tokens", "max_tokens": ": send max_output_tokens",
    "messages": ": send them as input",
    "previous_response_id": ": nothing is stored; send the whole conversation as input",
}  # fmt: skip
RESPONSES_FIELDS = CHAT_FIELDS - NEUTRAL.keys() | {"input", "instructions", *CHAT_NAMES}  # those that are read
PART_TYPES = ("input_text", "output_text", "text")


def parse_responses_request(raw: bytes, engine: ServingEngine, request_id: str | None = None) -> ApiRequest:
    """Raises FieldError naming the first invalid or unsupported field, ApiError 404 for another model."""
    body = {name: value for name, value in parse_json(raw).items() if value is not None}
    for name in [name for name in body if name in NEUTRAL]:  # in the client's order
        _check_neutral(name, body.pop(name))
    given = body.pop("input", None)
    messages = _messages(given)
    if has_instructions := (instructions := body.pop("instructions", None)) is not None:
        if not isinstance(instructions, str):
            raise FieldError("instructions", f"expected text, got {show(instructions)}")
        messages = [{"role": "system", "content": instructions}, *messages]
    chat = {CHAT_NAMES.get(name, name): value for name, value in body.items()}
    try:
        request = build_request({**chat, "messages": messages}, True, engine, request_id)
    except FieldError as error:
        field = _own_name(error.field, has_instructions, isinstance(given, str))
        raise FieldError(field, str(error).removeprefix(f"{error.field}: "), error.code) from None
    stream = None if request.stream is None else StreamOptions()
    return replace(request, id=request.id.replace("chatcmpl-", "resp_"), stream=stream)


def _check_neutral(name: str, value: object) -> None:
    """Raises FieldError for a value that asks for what this server does not do."""
    given = _without_nulls(value)
    if name == "text" and isinstance(given, dict):
        given.pop("verbosity", None)  # ignored, as in chats
    if not any(is_same(given, allowed) for allowed in NEUTRAL[name]):
        message = not_supported(name, value, NEUTRAL[name])
        raise FieldError(name, message + (INSTEAD.get(name) or f", got {show(value)}" * (not NEUTRAL[name])))


def _without_nulls(value: object) -> Any:
    """null means absent inside an object too, and an object of nulls is empty."""
    if not isinstance(value, dict):
        return value
    found = {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return {key: item for key, item in found.items() if item != {}}


def _own_name(field: str, has_instructions: bool, is_text: bool) -> str:
    """What this API calls a chat's field."""
    if (message := re.fullmatch(r"messages\[(\d+)\](.*)", field)) is None:
        return {"messages": "input", "max_completion_tokens": "max_output_tokens"}.get(field, field)
    number = int(message[1]) - has_instructions
    if number < 0:
        return "instructions"
    return "input" if is_text else f"input[{number}]{message[2]}"


def _messages(given: object) -> list[dict[str, Any]]:
    """The input as chat messages: text, or a list of messages whose parts have the names of this API."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise FieldError("input", f"expected text or a list of messages, got {show(given)}")
    messages = []
    for number, item in enumerate(given):
        if not isinstance(item, dict) or item.get("type") not in (None, "message"):
            raise FieldError(f"input[{number}]", f"expected a message, got {show(item)}")
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(f"input[{number}].content[{place}]", part) for place, part in enumerate(content)]
        messages.append({"role": item.get("role"), "content": content})
    return messages


def _part(field: str, part: object) -> dict[str, Any]:
    if not isinstance(part, dict) or part.get("type") not in PART_TYPES:
        raise FieldError(field, f"expected one of the types {', '.join(PART_TYPES)}, got {show(part)}")
    return {"type": "text", "text": part.get("text")}


class ResponsesWriter:
    """Builds the response to one request, or the events of its stream."""

    def __init__(self, request: ApiRequest) -> None:
        self.request, self.item_id = request, f"msg_{uuid.uuid4().hex}"
        self._num_events = 0

    def response(self, outputs: list[CompletionOutput]) -> dict[str, Any]:
        """The complete response, or how it begins if there are no outputs."""
        request, answer = self.request, join_outputs(outputs) if outputs else None
        is_cut = answer is not None and answer.finish_reason == "length"
        status = "in_progress" if answer is None else "incomplete" if is_cut else "completed"
        return {
            "id": request.id, "object": "response", "created_at": request.created, "model": request.model,
            "status": status, "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [] if answer is None else [self._item(answer.text, status)],
            "usage": None if answer is None else self._usage(answer),
            "instructions": None, "metadata": {}, "max_output_tokens": request.params.max_tokens,
            "parallel_tool_calls": False, "previous_response_id": None, "store": False,
            "temperature": request.params.temperature, "text": {"format": {"type": "text"}}, "tool_choice": "none",
            "tools": [], "top_p": request.params.top_p, "truncation": "disabled",
        }  # fmt: skip

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [self._text_part(text)]
        return {"type": "message", "id": self.item_id, "role": "assistant", "status": status, "content": content}

    def _text_part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _usage(self, answer: CompletionOutput) -> dict[str, Any]:
        num_prompt_tokens, num_tokens = len(self.request.prompts[0]), len(answer.token_ids)
        return {
            "input_tokens": num_prompt_tokens, "input_tokens_details": {"cached_tokens": answer.num_cached_tokens or 0},
            "output_tokens": num_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": num_prompt_tokens + num_tokens,
        }  # fmt: skip

    async def events(self, generation: Generation) -> AsyncGenerator[str, None]:
        """The answer as it is generated, as server-sent events with names."""
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}
        outputs: list[CompletionOutput] = []
        try:
            for kind in ("created", "in_progress"):
                yield self._event(f"response.{kind}", response=self.response([]))
            async for output in generation.outputs():
                if not outputs:
                    item = self._item(None, "in_progress")
                    yield self._event("response.output_item.added", output_index=0, item=item)
                    yield self._event("response.content_part.added", **place, part=self._text_part(""))
                outputs.append(output)
                if output.text:
                    yield self._event("response.output_text.delta", **place, delta=output.text, logprobs=[])
            response = self.response(outputs)
            [item] = response["output"]
            text = item["content"][0]["text"]
            yield self._event("response.output_text.done", **place, text=text, logprobs=[])
            yield self._event("response.content_part.done", **place, part=item["content"][0])
            yield self._event("response.output_item.done", output_index=0, item=item)
            yield self._event(f"response.{response['status']}", response=response)
        except Exception as error:  # status 200 has been sent, so the error becomes an event
            if not isinstance(error, GenerationError):
                logger.exception("a stream failed")
            details = as_api_error(error).body["error"]
            yield self._event("error", message=details["message"], code=details["type"], param=None)

    def _event(self, kind: str, **fields: Any) -> str:
        payload = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {kind}\ndata: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"
