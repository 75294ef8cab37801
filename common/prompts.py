"""The prompt of a request body: text, or chat messages through the model's template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from common.errors import FieldError
from common.sampling_params import show

PROMPT_FIELDS = ("prompt", "messages")
ROLES = ("system", "user", "assistant")


def encode_prompt(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> list[int]:
    """Token ids of `prompt` or of `messages`. Raises FieldError on a wrong type, an empty or a too long prompt."""
    given = [field for field in PROMPT_FIELDS if body.get(field) is not None]
    if len(given) != 1:
        raise FieldError("prompt", f"expected either prompt or messages, got {' and '.join(given) or 'neither'}")
    field = given[0]
    if field == "prompt":
        token_ids = tokenizer.encode(_check_text("prompt", body["prompt"]), add_special_tokens=True)
    else:
        messages = check_messages(body["messages"])
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError) as error:  # no template, or one that refuses, say, a system message
            raise FieldError("messages", f"the model's chat template does not take them: {error}") from error
        token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes the special tokens itself
    if not token_ids:
        raise FieldError(field, "expected at least one token, got an empty prompt")
    if len(token_ids) >= max_model_len:
        raise FieldError(
            field,
            f"{len(token_ids)} tokens leave no room for an answer: max_model_len is {max_model_len} tokens",
        )
    return token_ids


def check_messages(messages: object) -> list[dict[str, str]]:
    """Chat messages, each with a role and text content. Raises FieldError naming the one that is wrong."""
    if not isinstance(messages, list) or not messages:
        raise FieldError("messages", f"expected a list of at least one message, got {show(messages)}")
    for number, message in enumerate(messages):
        field = f"messages[{number}]"
        if not isinstance(message, dict):
            raise FieldError(field, f"expected an object with role and content, got {show(message)}")
        if unknown := sorted(set(message) - {"role", "content"}):
            raise FieldError(f"{field}.{unknown[0]}", "unknown field: expected role and content")
        if message.get("role") not in ROLES:
            raise FieldError(f"{field}.role", f"expected one of {', '.join(ROLES)}, got {show(message.get('role'))}")
        _check_text(f"{field}.content", message.get("content"))
    return messages


def _check_text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise FieldError(field, f"expected text, got {show(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FieldError(field, f"not valid Unicode: half a surrogate pair at character {error.start}") from error
    return value
