"""Parse request bodies: from JSON to a checked ApiRequest."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from common.errors import FieldError
from common.openai_app.errors import ApiError
from common.prompts import encode_prompts, split_prompts
from common.sampling_params import (
    MAX_LOGPROBS,
    MAX_SEED,
    SamplingParams,
    check_int,
    check_known_fields,
    check_vocabulary,
    show,
)
from common.serving import ServingEngine

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's; a chat may fill the context
MAX_COMPLETION_LOGPROBS = 5  # OpenAI's
MAX_PRIORITY = 2**31 - 1
COMMON_FIELDS = {f.name for f in fields(SamplingParams)} | {
    "model", "stream", "stream_options", "user", "priority", "response_format", "tools", "top_logprobs", "best_of",
    "echo", "suffix",
}  # fmt: skip
CHAT_FIELDS = COMMON_FIELDS | {"messages", "max_completion_tokens"}
COMPLETION_FIELDS = COMMON_FIELDS | {"prompt"}
# Fields that this server or endpoint does not support may be sent with the value that changes nothing.
NEUTRAL: dict[str, Any] = {"response_format": {"type": "text"}, "tools": [], "suffix": ""}
CHAT_NEUTRAL = {**NEUTRAL, "echo": False}
COMPLETION_NEUTRAL = {**NEUTRAL, "top_logprobs": 0}


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """A checked request, with the fields that its responses repeat.

    prompts: one, or a batch; each gets params.n answers. echo: the text to put before each prompt's answers, or None.
    priority is None unless the engine supports priorities.
    """

    id: str
    created: int
    model: str
    is_chat: bool
    prompts: list[list[int]]
    echo: list[str] | None
    params: SamplingParams
    priority: int | None
    stream: bool
    include_usage: bool

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n

    def engine_requests(self) -> Iterator[tuple[list[int], SamplingParams]]:
        """The engine requests, one per choice: sample j of prompt i is choice i * n + j and has its own seed."""
        for prompt_token_ids in self.prompts:
            for sample in range(self.params.n):
                seed = self.params.seed
                seed = None if seed is None else (seed + sample) % (MAX_SEED + 1)
                yield prompt_token_ids, replace(self.params, n=1, seed=seed)


def parse_request(raw: bytes, is_chat: bool, engine: ServingEngine) -> ApiRequest:
    """Raises FieldError naming the first invalid or unsupported field, ApiError 404 for another model."""
    body = _parse_json(raw)
    model = engine.model_name
    if body.get("model") not in (None, model):
        message = f"model: {show(body['model'])} is not served here, expected {model!r}"
        raise ApiError(404, message, "model", code="model_not_found")
    check_known_fields(body, CHAT_FIELDS if is_chat else COMPLETION_FIELDS)
    _check_neutral(body, CHAT_NEUTRAL if is_chat else COMPLETION_NEUTRAL)
    stream, include_usage = _parse_stream(body)
    priority = _parse_priority(body, engine)
    logprobs = _parse_chat_logprobs(body) if is_chat else _parse_completion_logprobs(body)
    echo = _parse_flag(body, "echo")
    if echo and logprobs is not None:
        raise FieldError("echo", "not supported together with logprobs: there are none for the prompt")
    prompts = encode_prompts(body, engine.tokenizer, engine.max_model_len)
    default_max_tokens = DEFAULT_COMPLETION_TOKENS
    if is_chat:
        default_max_tokens = max(1, engine.max_request_len - len(prompts[0]))
    params = _parse_params(body, default_max_tokens, logprobs)
    check_vocabulary(params, engine.vocab_size)
    return ApiRequest(
        id=f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        is_chat=is_chat,
        prompts=prompts,
        echo=_prompt_texts(body["prompt"], prompts, engine.tokenizer) if echo else None,
        params=params,
        priority=priority,
        stream=stream,
        include_usage=include_usage,
    )


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FieldError("body", f"not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise FieldError("body", f"expected a JSON object, got {type(body).__name__}")
    return body


def _check_neutral(body: dict[str, Any], neutral: dict[str, Any]) -> None:
    for name, value in neutral.items():
        given = body.get(name)
        if given is not None and (type(given) is not type(value) or given != value):
            raise FieldError(name, f"not supported here: expected {value!r} or nothing, got {show(given)}")
    if not isinstance(body.get("user"), str | None):
        raise FieldError("user", f"expected text, got {show(body['user'])}")


def _parse_flag(body: dict[str, Any], name: str, field: str | None = None) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise FieldError(field or name, f"expected true or false, got {show(value)}")
    return bool(value)


def _parse_stream(body: dict[str, Any]) -> tuple[bool, bool]:
    stream, options = _parse_flag(body, "stream"), body.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise FieldError("stream_options", "only allowed when stream is true")
    if not isinstance(options, dict) or set(options) - {"include_usage"}:
        raise FieldError("stream_options", f"expected an object with include_usage, got {show(options)}")
    return stream, _parse_flag(options, "include_usage", "stream_options.include_usage")


def _parse_priority(body: dict[str, Any], engine: ServingEngine) -> int | None:
    if not getattr(engine, "supports_priority", False):
        if body.get("priority") is not None:
            raise FieldError("priority", f"this engine has no priorities, got {show(body['priority'])}")
        return None
    if body.get("priority") is None:
        return 0
    check_int("priority", body["priority"], low=-MAX_PRIORITY, high=MAX_PRIORITY)
    return body["priority"]


def _parse_chat_logprobs(body: dict[str, Any]) -> int | None:
    wanted, num_top = _parse_flag(body, "logprobs"), body.get("top_logprobs")
    if num_top is not None:
        check_int("top_logprobs", num_top, low=0, high=MAX_LOGPROBS)
        if num_top and not wanted:
            raise FieldError("top_logprobs", f"only allowed when logprobs is true, got {num_top}")
    return (num_top or 0) if wanted else None


def _parse_completion_logprobs(body: dict[str, Any]) -> int | None:
    num_top = body.get("logprobs")
    if num_top is None or num_top is False:
        return None
    check_int("logprobs", num_top, low=0, high=MAX_COMPLETION_LOGPROBS)
    return num_top


def _parse_params(body: dict[str, Any], default_max_tokens: int, logprobs: int | None) -> SamplingParams:
    names = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) is not None]
    for name in names:
        check_int(name, body[name], low=1)
        if body[name] != body[names[0]]:
            raise FieldError(name, f"{show(body[name])} contradicts {names[0]}, {show(body[names[0]])}")
    min_tokens = body.get("min_tokens")
    if not names and isinstance(min_tokens, int):  # a min_tokens above the default raises it
        default_max_tokens = max(default_max_tokens, min_tokens)
    max_tokens = body[names[0]] if names else default_max_tokens
    params = SamplingParams.from_body({**body, "max_tokens": max_tokens, "logprobs": logprobs})
    best_of = body.get("best_of")
    if best_of is not None and (isinstance(best_of, bool) or best_of != params.n):
        raise FieldError("best_of", f"not supported: expected n, {params.n}, or nothing, got {show(best_of)}")
    return params


def _prompt_texts(prompt: object, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each prompt as text: as it was sent, or decoded from its token ids."""
    given = [one for _, one in split_prompts(prompt)]
    return [
        one if isinstance(one, str) else str(tokenizer.decode(token_ids))
        for one, token_ids in zip(given, prompts, strict=True)
    ]
