"""Errors at the boundary: each names the field, the value and the limit."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)
_ignored = set[str]()


class FieldError(ValueError):
    """An invalid value from outside. `field` is the name that it was given under.

    code: OpenAI's code for this kind of error, which clients may check.
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
    """Log once that an unknown field is ignored, as vLLM's server does: clients also send other servers' fields."""
    if field not in _ignored and len(_ignored) < 1_000:  # clients must not be able to fill the memory
        _ignored.add(field)
        logger.warning("ignored the unknown field %.100r", field)


def context_exceeded(field: str, num_tokens: int, max_model_len: int) -> FieldError:
    """The error for a prompt that leaves no room for an answer, in OpenAI's words, which clients recognize."""
    limit = f"This model's maximum context length is {max_model_len} tokens (max_model_len)"
    return FieldError(field, f"{limit}. The prompt has {num_tokens} tokens.", "context_length_exceeded")
