"""OpenAI's wire format: parse request bodies, write JSON and server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from common.errors import FieldError, ignore_unknown, openai_error
from common.outputs import CompletionOutput, RequestOutput
from common.prompts import encode_prompt, stop_at_special_tokens
from common.sampling_params import SamplingParams, show

from .async_engine import GenerationError, RequestStream
from .engine import LLM, SAMPLING_FIELDS

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default; a chat answer may fill the context
COMMON_FIELDS = {"model", "stream", "stream_options", *SAMPLING_FIELDS}
CHAT_FIELDS = COMMON_FIELDS | {"messages", "max_completion_tokens"}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt"}
# Fields of OpenAI's API that this part does not support: they are accepted only with a value that changes nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "logit_bias": ({},), "tools": ([],),
    "response_format": ({"type": "text"},),
}  # fmt: skip
# All fields that are known, supported here or not. Any other field is ignored.
OTHER_FIELDS = CHAT_FIELDS | COMPLETION_FIELDS | NEUTRAL.keys() | {spec.name for spec in fields(SamplingParams)}


class ModelNotFoundError(Exception):
    """The request names a model that is not served here."""


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A checked request, with the fields that its responses repeat."""

    id: str
    created: int
    model: str
    is_chat: bool
    prompt_token_ids: list[int]
    params: SamplingParams
    stream: bool
    include_usage: bool


def check_model(name: object, served: str) -> None:
    """Raises ModelNotFoundError unless name is the served model's. None means the served model."""
    if name not in (None, served):
        raise ModelNotFoundError(f"model: {show(name)} is not served here, expected {served!r}")


def parse_request(body: dict[str, Any], is_chat: bool, llm: LLM) -> ApiRequest:
    """Raises FieldError naming the first invalid or unsupported field, ModelNotFoundError for another model."""
    check_model(body.get("model"), llm.name)
    known = CHAT_FIELDS if is_chat else COMPLETION_FIELDS
    for name, value in body.items():
        if value is None or name in known:
            continue
        neutral = NEUTRAL.get(name, ())
        if name not in OTHER_FIELDS:
            ignore_unknown(name)  # clients also send the fields of other servers
        elif not any(value == allowed and type(value) is type(allowed) for allowed in neutral):
            expected = f": expected {neutral[0]!r} or nothing" if neutral else ""
            raise FieldError(name, f"not supported here{expected}, got {show(value)}")
    stream, include_usage = _parse_stream(body)
    prompt_token_ids = encode_prompt(body, llm.tokenizer, llm.max_model_len)
    default_max_tokens = llm.max_model_len - len(prompt_token_ids) if is_chat else DEFAULT_COMPLETION_TOKENS
    params = _parse_params(body, default_max_tokens, llm.default_sampling)
    return ApiRequest(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=llm.name,
        is_chat=is_chat,
        prompt_token_ids=prompt_token_ids,
        params=stop_at_special_tokens(params, llm.tokenizer),
        stream=stream,
        include_usage=include_usage,
    )


def _parse_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    stream, options = _parse_flag("stream", body.get("stream")), body.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise FieldError("stream_options", "only allowed when stream is true")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise FieldError("stream_options", f"expected an object with include_usage, got {show(options)}")
    return stream, _parse_flag("stream_options.include_usage", options.get("include_usage"))


def _parse_flag(field: str, value: object) -> bool:
    if not isinstance(value, bool | None):
        raise FieldError(field, f"expected true or false, got {show(value)}")
    return bool(value)


def _parse_params(body: dict[str, Any], default_max_tokens: int, defaults: Mapping[str, Any]) -> SamplingParams:
    limits = {name: body[name] for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None}
    if len(limits) == 2 and body["max_tokens"] != body["max_completion_tokens"]:
        raise FieldError(
            "max_completion_tokens",
            f"{show(body['max_completion_tokens'])} contradicts max_tokens, {show(body['max_tokens'])}",
        )
    min_tokens = body.get("min_tokens")
    default = max(default_max_tokens, min_tokens) if isinstance(min_tokens, int) else default_max_tokens
    name, max_tokens = next(iter(limits.items()), ("max_tokens", default))
    try:
        return SamplingParams.from_body({**body, "max_tokens": max_tokens}, defaults)
    except FieldError as error:
        if error.field != "max_tokens":
            raise
        raise FieldError(name, str(error).removeprefix("max_tokens: ")) from error  # the name that the client sent


def describe_model(model: str, max_model_len: int) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {"id": model, "object": "model", "created": 0, "owned_by": "local", "max_model_len": max_model_len}


def full_response(request: ApiRequest, output: CompletionOutput) -> dict[str, Any]:
    """The complete answer."""
    answer = {"message": {"role": "assistant", "content": output.text}} if request.is_chat else {"text": output.text}
    return {
        "id": request.id,
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": request.created,
        "model": request.model,
        "choices": [
            {"index": 0, **answer, "logprobs": None}
            | {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        ],
        "usage": RequestOutput(request.id, request.prompt_token_ids, [output], finished=True).usage,
    }


def format_event(payload: dict[str, Any]) -> str:
    """One server-sent event. JSON escapes line ends, so a single data line holds it."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def stream_events(request: ApiRequest, outputs: RequestStream) -> AsyncIterator[str]:
    """The answer as it is generated: the role (chat), text, the finish reason, the usage if requested, [DONE].

    Outputs without text (half a character, the beginning of a stop string) produce no event.
    """
    # exercise: stream_events
    num_tokens = 0
    try:
        async for output in outputs:
            if request.is_chat and num_tokens == 0:  # not earlier: clients take the first event for the first token
                yield format_event(_chunk(request, {"delta": {"role": "assistant", "content": ""}}))
            num_tokens += len(output.token_ids)
            if output.text:
                content = {"delta": {"content": output.text}} if request.is_chat else {"text": output.text}
                yield format_event(_chunk(request, content))
            if output.finish_reason:
                end: dict[str, Any] = {"delta": {}} if request.is_chat else {"text": ""}
                reasons = {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
                yield format_event(_chunk(request, {**end, **reasons}))
    except GenerationError as error:  # status 200 has been sent, so the error becomes an event
        yield format_event(openai_error(str(error), None, error.kind))
    else:
        if request.include_usage:
            yield format_event({**_chunk(request, None), "usage": _usage(request, num_tokens)})
    yield "data: [DONE]\n\n"
    # exercise: end


def _chunk(request: ApiRequest, choice: dict[str, Any] | None) -> dict[str, Any]:
    """A chunk with one choice, or with none (the chunk with the usage)."""
    chunk: dict[str, Any] = {
        "id": request.id,
        "object": "chat.completion.chunk" if request.is_chat else "text_completion",
        "created": request.created,
        "model": request.model,
        "choices": [] if choice is None else [{"index": 0, "logprobs": None, "finish_reason": None, **choice}],
    }
    return {**chunk, "usage": None} if request.include_usage else chunk


def _usage(request: ApiRequest, num_tokens: int) -> dict[str, int]:
    num_prompt_tokens = len(request.prompt_token_ids)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }
