"""What becomes of each field of a request's body: it is read, ignored, or refused unless it changes nothing.

`null` means that a field is absent, whichever field it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from common.errors import FieldError, ignore_unknown
from common.sampling_params import SamplingParams, show

SAMPLING = {spec.name for spec in fields(SamplingParams)}
COMMON = SAMPLING | {
    "model", "stream", "stream_options", "best_of", "add_special_tokens", "truncate_prompt_tokens", "return_token_ids",
}  # fmt: skip
TEMPLATE_FIELDS = {"add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
CHAT_FIELDS = COMMON | TEMPLATE_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION_FIELDS = COMMON | {"prompt", "echo"}
# Fields of OpenAI and vLLM that cannot change the answer. (request_id is part of the response's id.)
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_options",
    "prompt_cache_retention", "verbosity", "request_id", "parallel_tool_calls", "include_reasoning",
}  # fmt: skip
# Other fields that they have, with the values that change nothing; the first one is what an error suggests.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "audio": (), "bad_words": ([],), "chat_template": (), "documents": (), "functions": (),
    "function_call": ("none",), "guided_choice": (), "guided_grammar": (), "guided_json": (), "guided_regex": (),
    "kv_transfer_params": (), "length_penalty": (1,), "logits_processors": (), "modalities": (["text"],),
    "moderation": (), "prediction": (), "priority": (0,), "prompt_embeds": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "spaces_between_special_tokens": (True,), "structured_outputs": (),
    "suffix": ("",), "tool_choice": ("none",), "tools": (), "use_beam_search": (False,), "web_search_options": (),
}  # fmt: skip
# Fields of one endpoint only, with their neutral values at the other one.
CHAT_NEUTRAL = {**NEUTRAL, "echo": (False,), "prompt": ()}
COMPLETION_NEUTRAL = {
    **NEUTRAL, "top_logprobs": (0,), "messages": (), "max_completion_tokens": (),
    "add_generation_prompt": (True, False), "continue_final_message": (False,), "chat_template_kwargs": ({},),
}  # fmt: skip


def given_fields(body: Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """The fields that are read. Raises FieldError for a known one that asks for what this server does not do.

    Unknown fields are ignored, as in vLLM's server; the log has one line for each.
    """
    known, neutral = (CHAT_FIELDS, CHAT_NEUTRAL) if is_chat else (COMPLETION_FIELDS, COMPLETION_NEUTRAL)
    given = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in known:
            given[name] = value
        elif name not in neutral:
            ignore_unknown(name)
        elif not any(is_same(value, allowed) for allowed in neutral[name]):
            raise FieldError(name, not_supported(name, value, neutral[name]))
    return given


def not_supported(name: str, value: object, allowed: Collection[Any]) -> str:
    """The message for a value that is none of the allowed ones."""
    verb = "are" if name.endswith("s") else "is"
    expected = f": expected {next(iter(allowed))!r} or nothing, got {show(value)}" if allowed else ""
    return f"{name} {verb} not supported by this engine{expected}"


def is_same(value: object, other: object) -> bool:
    """Equal, and true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
