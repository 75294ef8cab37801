"""What a web page may do with this server: nothing, unless its origin is allowed.

A page on any site can send requests to an address of the machine that shows it. A browser adds the page's Origin; a
page that has pointed its own name at 127.0.0.1 (DNS rebinding) has the same origin as the server, but a strange Host.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import openai_error

LOCAL_HOST = r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])"
READING = ("GET", "HEAD", "OPTIONS")  # methods that change nothing; a browser shows the answer only to allowed origins


@dataclass(frozen=True, slots=True)
class BrowserPolicy:
    """origins: the allowed ones; "*" allows all. is_local: the server is on a loopback address: pages of this machine
    are allowed as well, and requests must name it by a local name. needs_key: POST requests need the API key."""

    origins: tuple[str, ...] = ()
    is_local: bool = False
    needs_key: bool = False

    def allows_origin(self, origin: str, host: str = "") -> bool:
        """host: the request's Host, by which a page of this server itself is recognized."""
        is_local = self.is_local and re.fullmatch(rf"https?://{LOCAL_HOST}(:\d+)?", origin)
        return bool(is_local) or origin in self.origins or "*" in self.origins or self._is_own_page(origin, host)

    def allows_host(self, host: str) -> bool:
        return not self.is_local or bool(re.fullmatch(rf"{LOCAL_HOST}?(:\d+)?", host.lower()))

    def _is_own_page(self, origin: str, host: str) -> bool:
        # The origin of a page that this server has sent is the Host that its requests name. So is the origin of a page
        # whose own name was pointed at this server (DNS rebinding). Two things tell them apart: an address, which no
        # DNS entry can point elsewhere, and the API key, which the other page doesn't have.
        is_same = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())  # https: at a proxy
        return is_same and (self.needs_key or _is_address(host))


def _is_address(host: str) -> bool:
    """Whether a Host is an IP address, or localhost, which browsers don't look up."""
    name = re.sub(r":\d+$", "", host).strip("[]")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() == "localhost"
    return True


def add_browser_guards(app: FastAPI, policy: BrowserPolicy) -> None:
    """Answer preflight requests of allowed origins, and refuse what other pages send."""
    pattern = rf"https?://{LOCAL_HOST}(:\d+)?" if policy.is_local else None
    app.add_middleware(
        CORSMiddleware, allow_origins=policy.origins, allow_origin_regex=pattern, allow_methods=["*"],
        allow_headers=["*"],
    )  # fmt: skip
    app.add_middleware(BrowserGuard, policy=policy)


class BrowserGuard:
    """Status 403 for a foreign Host, and for what a foreign Origin wants to do. (Plain ASGI: streams pass through.)"""

    def __init__(self, app: ASGIApp, policy: BrowserPolicy) -> None:
        self.app, self.policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (message := self._refusal(Headers(scope=scope), scope["method"])):
            await JSONResponse(openai_error(message, None, "permission_error"), 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _refusal(self, headers: Headers, method: str) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.policy.allows_host(host):
            return f"Host: expected a local name, such as localhost, got {host[:100]!r}"
        if origin is not None and method not in READING and not self.policy.allows_origin(origin, host):
            return f"Origin: pages of {origin[:100]!r} may not use this server; --allowed-origins lists those that may"
        return None
