"""Errors at the boundary: each names the field, the value and the limit."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)
_ignored = set[str]()


class FieldError(ValueError):
    """A value from outside that cannot be accepted. `field` is the name under which it was given.

    code: OpenAI's word for the kind of error, by which clients recognize it.
    """

    def __init__(self, field: str, message: str, code: str | None = None) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.code = field, code


def openai_error(
    message: str, param: str | None, error_type: str = "invalid_request_error", code: str | None = None
) -> dict:
    """The body of an error response in OpenAI's format."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}


def ignore_unknown(field: str) -> None:
    """Say once in the log that a field is not known, as vLLM's server does: clients send what others have."""
    if field not in _ignored and len(_ignored) < 1_000:  # whatever they send, they must not fill the memory
        _ignored.add(field)
        logger.warning("ignored the unknown field %.100r", field)


def context_exceeded(field: str, num_tokens: int, max_model_len: int) -> FieldError:
    """For a prompt that leaves no room for an answer, in the words by which clients know it and shorten the prompt."""
    limit = f"This model's maximum context length is {max_model_len} tokens (max_model_len)"
    return FieldError(field, f"{limit}. The prompt has {num_tokens} tokens.", "context_length_exceeded")
