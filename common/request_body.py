"""The JSON body of a request."""

from __future__ import annotations

import json
from typing import Any

from common.errors import FieldError

MAX_INT_DIGITS = 4_000  # longer integers become floats, because Python refuses to parse them


def parse_json(raw: bytes) -> dict[str, Any]:
    """A request's body. Raises FieldError("body", …). 12.0 is the integer 12, as in vLLM and JSON Schema."""
    try:
        body = json.loads(raw, parse_float=_parse_number, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise FieldError("body", f"not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise FieldError("body", f"expected a JSON object, got {type(body).__name__}")
    return body


def _parse_number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _parse_int(text: str) -> int | float:
    return int(text) if len(text) <= MAX_INT_DIGITS else float(text)
