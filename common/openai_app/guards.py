"""The checks before a request is parsed: the API key, the body's type, and its size and time limits."""

from __future__ import annotations

import secrets

import anyio
from fastapi import Request

from common.openai_app.errors import ApiError


def check_api_key(request: Request, api_key: str) -> None:
    """Raises ApiError 401 unless the request carries the key as a bearer token. Takes constant time."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # Starlette decodes headers as Latin-1, so this restores the bytes that were sent.
    if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("latin-1"), api_key.encode()):
        raise ApiError(
            401,
            "expected the server's API key in the header Authorization: Bearer <key>",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def check_json(request: Request) -> None:
    """Raises ApiError 415 unless the body is announced as JSON: a web page can send other types without being asked."""
    content_type = request.headers.get("Content-Type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        message = f"Content-Type: expected application/json, got {content_type[:100] or 'none'}"
        raise ApiError(415, message, "Content-Type")


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """Raises ApiError 413 for more than max_bytes, with or without Content-Length, and 408 after timeout_s."""
    body = bytearray()
    announced = request.headers.get("Content-Length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes, f"{int(announced):,}")
    try:
        with anyio.fail_after(timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise _too_large(max_bytes, "more")
    except TimeoutError as error:
        message = f"body: expected all of it within {timeout_s:g} s, got {len(body):,} bytes"
        # Without "close" the connection would wait for the rest of the body.
        raise ApiError(408, message, "body", headers={"Connection": "close"}) from error
    return bytes(body)


def _too_large(max_bytes: int, got: str) -> ApiError:
    return ApiError(413, f"body: expected at most {max_bytes:,} bytes, got {got}", "body")
