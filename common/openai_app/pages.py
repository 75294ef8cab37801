"""The web pages of the server. Each is one file in common/pages, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response

PAGES_DIR = Path(__file__).parents[1] / "pages"


def add_page(app: FastAPI, path: str, name: str) -> None:
    """Serve PAGES_DIR/name to GET and HEAD. It needs no API key: the endpoints that it calls check the key."""
    html = (PAGES_DIR / name).read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }

    async def show_page() -> Response:
        return HTMLResponse(html, headers=headers)

    app.add_api_route(path, show_page, methods=["GET", "HEAD"], include_in_schema=False)


def content_security_policy(html: str) -> str:
    """Allows the page its own <script> and <style>, named by their hashes, and requests to its own server. No more."""
    directives = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",  # the empty icon, without which browsers ask for /favicon.ico
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",  # no other page may show this one in a frame and steal clicks
        "require-trusted-types-for": "'script'",  # text can't become HTML by mistake
    }
    return "; ".join(f"{name} {value}" for name, value in directives.items())


def _hashes(html: str, tag: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)
