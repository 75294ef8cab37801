"""Errors at the boundary: each names the field, the value and the limit."""

from __future__ import annotations


class FieldError(ValueError):
    """A value from outside that cannot be accepted. `field` is the name under which it was given."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


def openai_error(
    message: str, param: str | None, error_type: str = "invalid_request_error", code: str | None = None
) -> dict:
    """The body of an error response in OpenAI's format."""
    return {"error": {"message": message, "type": error_type, "param": param, "code": code}}
