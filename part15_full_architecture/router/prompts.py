"""What the router reads of a request: enough to choose a replica, no more. The replica checks the rest."""

from __future__ import annotations

from typing import Any

import msgspec

MAX_CHARS = 65_536  # of a prompt; what two prompts have in common beyond that does not matter


def prompt_of(body: bytes) -> str:
    """The text that decides what a replica may have in its cache: the same for requests that begin alike.

    Anything that is not understood counts as an empty prompt: the replica will refuse it.
    """
    try:
        request = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if not isinstance(request, dict):
        return ""
    salt = request.get("cache_salt")
    parts = [f"[{salt}]"] if isinstance(salt, str) else []
    for name in ("prompt", "messages", "instructions", "input"):
        _collect(request.get(name), parts)
    return "\n".join(parts)[:MAX_CHARS]


def _collect(value: Any, parts: list[str]) -> None:
    """All text in a value, in the order of its tokens."""
    match value:
        case str():
            parts.append(value)
        case [int(), *_]:
            parts.append(" ".join(map(str, value[: MAX_CHARS // 2])))
        case list():
            for item in value:
                _collect(item, parts)
        case dict():
            for name in ("role", "content", "text"):
                _collect(value.get(name), parts)
