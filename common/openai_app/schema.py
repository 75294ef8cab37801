"""The shapes of requests and answers, for /openapi.json. What is checked in the end is checked by the parsers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from fastapi import FastAPI

from common.openai_app.fields import CHAT_FIELDS, COMPLETION_FIELDS
from common.openai_app.protocol import STREAM_OPTIONS
from common.openai_app.responses_endpoint import PART_TYPES, RESPONSES_FIELDS
from common.outputs import FinishReason
from common.prompts import MAX_PROMPTS
from common.sampling_params import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    MIN_SEED,
)

Schema = dict[str, Any]


def _integer(low: int, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low, **({} if high is None else {"maximum": high})}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _array(items: Schema, low: int = 0, high: int | None = None) -> Schema:
    return {"type": "array", "items": items, "minItems": low, **({} if high is None else {"maxItems": high})}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


FLAG: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string"}
TOKEN_IDS = _array(_integer(0), 1)


def _message(*part_types: str) -> Schema:
    """A message. part_types: what the parts of its content may be called."""
    part: Schema = {
        "type": "object", "required": ["type", "text"], "properties": {"type": {"enum": [*part_types]}, "text": TEXT},
    }  # fmt: skip
    return {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant"]},
            "content": {"anyOf": [TEXT, _array(part, 1)]},
        },
    }


STOP_STRING: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
FIELDS: dict[str, Schema] = {
    "model": TEXT,
    "messages": _array(_message("text"), 1),
    "prompt": {"anyOf": [TEXT, TOKEN_IDS, _array(TEXT, 1, MAX_PROMPTS), _array(TOKEN_IDS, 1, MAX_PROMPTS)]},
    "max_tokens": _integer(0),
    "max_completion_tokens": _integer(1),
    "min_tokens": _integer(0),
    "temperature": _number(0, MAX_TEMPERATURE),
    "top_k": _integer(-1),
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(MIN_REPETITION_PENALTY, 2),
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100), "maxProperties": MAX_LOGIT_BIAS},
    "seed": {**_integer(MIN_SEED, MAX_SEED), "format": "int64"},
    "stop": {"anyOf": [STOP_STRING, _array(STOP_STRING, 0, MAX_STOP_STRINGS)]},
    "stop_token_ids": _array(_integer(0), 0, MAX_STOP_TOKEN_IDS),
    "include_stop_str_in_output": FLAG,
    "skip_special_tokens": FLAG,
    "ignore_eos": FLAG,
    "n": _integer(1, MAX_N),
    "best_of": _integer(1, MAX_N),
    "stream": FLAG,
    "stream_options": {
        "type": "object", "properties": dict.fromkeys(STREAM_OPTIONS, _or_null(FLAG)), "additionalProperties": False,
    },
    "logprobs": {"anyOf": [{"enum": [False]}, _integer(0, MAX_LOGPROBS)]},  # false: none, as in a chat
    "top_logprobs": _integer(0, MAX_LOGPROBS),
    "prompt_logprobs": _integer(0, MAX_LOGPROBS),
    "echo": FLAG,
    "return_token_ids": FLAG,
    "add_special_tokens": FLAG,
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
    "chat_template_kwargs": {"type": "object"},
    "truncate_prompt_tokens": {"anyOf": [{"enum": [-1]}, _integer(1)]},
    "cache_salt": TEXT,
}  # fmt: skip


def body_schema(fields: Iterable[str], required: str | None = None, **changes: Schema) -> Schema:
    """A body with these fields, each of which may be null. Others may be sent as well."""
    properties = {name: _or_null({**FIELDS, **changes}[name]) for name in sorted(fields)}
    schema: Schema = {"type": "object", "properties": properties}
    if required is not None:
        properties[required] = properties[required]["anyOf"][0]
        schema["required"] = [required]
    return schema


RESPONSES_INPUT: Schema = {"anyOf": [TEXT, _array(_message(*PART_TYPES), 1)]}
TOKENIZE_FIELDS = {
    "model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs",
}  # fmt: skip
BODIES: Mapping[str, Schema] = {
    "/v1/chat/completions": body_schema(CHAT_FIELDS, "messages", logprobs=FLAG, max_tokens=_integer(1)),
    "/v1/completions": body_schema(COMPLETION_FIELDS, "prompt"),
    "/v1/responses": body_schema(
        RESPONSES_FIELDS, "input", input=RESPONSES_INPUT, instructions=TEXT, max_output_tokens=_integer(1)
    ),
    "/tokenize": body_schema(TOKENIZE_FIELDS, prompt=TEXT, return_token_strs=FLAG),
    "/detokenize": body_schema({"model", "tokens"}, "tokens", tokens=_array(_integer(0))),
}

QUESTION = "What is a KV cache?"
EXAMPLES: Mapping[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 100, "temperature": 0, "stream": True,
    },
    "/v1/completions": {"prompt": "The fox went to", "max_tokens": 20, "temperature": 0},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 100, "temperature": 0},
    "/tokenize": {"prompt": QUESTION},
    "/detokenize": {"tokens": [260, 261, 262]},
}  # fmt: skip
SUMMARIES: Mapping[str, str] = {
    "/v1/models": "The one model that is served.",
    "/v1/models/{name:path}": "The same model, by its name.",
    "/v1/chat/completions": "The answer to a chat, whole or streamed.",
    "/v1/completions": "What follows a prompt, or each prompt of a batch: text or token ids.",
    "/v1/responses": "OpenAI's newer API, for text. Nothing is stored.",
    "/tokenize": "Text or messages to token ids, as in vLLM.",
    "/detokenize": "Token ids to text.",
    "/load": "How many requests are unfinished.",
    "/health": "Status 200 while the engine is alive, else 503.",
    "/ping": "The same as /health.",
    "/version": "The version of the server.",
    "/metrics": "Prometheus metrics.",
}


def _object(**fields: Schema) -> Schema:
    """An object that has all these fields, and maybe others."""
    return {"type": "object", "required": [*fields], "properties": fields}


def _nullable(kind: str) -> Schema:
    return {"type": [kind, "null"]}


def _completion(kind: str, **content: Schema) -> Schema:
    choice = _object(
        index=COUNT, finish_reason={"enum": [*get_args(FinishReason)]}, logprobs=_nullable("object"), **content
    )
    head = {"id": TEXT, "object": {"enum": [kind]}, "created": COUNT, "model": TEXT}
    return _object(**head, choices=_array(choice, 1), usage=_usage("prompt", "completion"))


def _usage(prompt: str, answer: str) -> Schema:
    return _object(**{f"{name}_tokens": COUNT for name in (prompt, answer, "total")})


COUNT = _integer(0)
MODEL = _object(id=TEXT, object={"enum": ["model"]}, created=COUNT, owned_by=TEXT, max_model_len=COUNT)
STATUS = _object(status=TEXT)
ANSWERS: Mapping[str, Schema] = {
    "/v1/models": _object(object={"enum": ["list"]}, data=_array(MODEL, 1, 1)),
    "/v1/models/{name:path}": MODEL,
    "/v1/chat/completions": _completion(
        "chat.completion", message=_object(role={"enum": ["assistant"]}, content=TEXT, refusal=_nullable("string"))
    ),
    "/v1/completions": _completion("text_completion", text=TEXT),
    "/v1/responses": _object(
        id=TEXT, object={"enum": ["response"]}, created_at=COUNT, model=TEXT,
        status={"enum": ["completed", "incomplete"]}, output=_array({"type": "object"}, 1, 1),
        usage=_usage("input", "output"),
    ),
    "/tokenize": _object(
        count=COUNT, max_model_len=COUNT, tokens=_array(COUNT), token_strs=_nullable("array")
    ),
    "/detokenize": _object(prompt=TEXT),
    "/load": _object(server_load=COUNT),
    "/health": STATUS,
    "/ping": STATUS,
    "/version": _object(version=TEXT),
}  # fmt: skip
EVENT: Schema = {"type": "object", "required": ["data"], "properties": {"event": TEXT, "data": TEXT}}  # of a stream
ERROR = _object(error=_object(message=TEXT, type=TEXT, param=_nullable("string"), code=_nullable("string")))


class DescribedApp(FastAPI):
    """FastAPI with the bodies' limits as they are here. It reads what describes a route into models whose limits are
    floats, which cannot hold a seed of 64 bits."""

    def openapi(self) -> dict[str, Any]:
        described = super().openapi()
        for path, schema in BODIES.items():
            described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"] = schema
        return described


def _as_response(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def describe(path: str) -> dict[str, Any]:
    """What /openapi.json says about an endpoint beyond its path and its method."""
    responses = {
        "200": _as_response("The answer", ANSWERS[path]),
        "4XX": _as_response("The request is at fault", ERROR),
    }
    described: dict[str, Any] = {"responses": responses}
    if ANSWERS[path] is STATUS:
        responses["503"] = _as_response("The engine has died", STATUS)
    if path in BODIES:
        body = {"schema": BODIES[path], "example": EXAMPLES[path]}
        described["requestBody"] = {"required": True, "content": {"application/json": body}}
        responses["5XX"] = _as_response("The engine is at fault", ERROR)
        if "stream" in BODIES[path]["properties"]:
            responses["200"]["content"]["text/event-stream"] = {"schema": EVENT}
    return described
