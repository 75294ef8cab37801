"""`workshop board`: a page with the progress of all learners in a room, for the teacher to show.

Learners' machines report to it after `workshop join`. The page itself is shown on the teacher's machine only: the room
code is on it.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from common.serve import is_loopback, listen, serve_app, show_url
from workshop import COMMAND
from workshop.course import WorkshopError
from workshop.progress import CODE_HEADER, LearnerProgress

PAGE = Path(__file__).with_name("board.html")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # without I and O, which look like digits
CODE_LETTERS = 6
MAX_LEARNERS, MAX_BODY = 200, 64 << 10  # bytes
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
_decode = msgspec.json.Decoder(LearnerProgress).decode


class Board:
    """What learners have reported, in the order in which they joined."""

    def __init__(self, code: str) -> None:
        self.code, self.learners = code, dict[str, LearnerProgress]()

    def add(self, report: LearnerProgress) -> bool:
        """Returns whether there was room for it."""
        if report.learner not in self.learners and len(self.learners) >= MAX_LEARNERS:
            return False
        self.learners[report.learner] = report
        return True

    def shown(self) -> list[dict[str, Any]]:
        """For the page, without the learners' secrets."""
        return [{"name": each.name, "parts": msgspec.to_builtins(each.parts)} for each in self.learners.values()]


def create_app(board: Board, url: str) -> FastAPI:
    """url: at which learners reach the board."""
    app = FastAPI(openapi_url=None)

    @app.post("/progress")
    async def report(request: Request) -> Response:
        if not hmac.compare_digest(request.headers.get(CODE_HEADER, "").encode(), board.code.encode()):
            return PlainTextResponse("the room code is wrong", 403)
        try:
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    return PlainTextResponse(f"expected at most {MAX_BODY} bytes", 413)
            found = _decode(body)
        except ClientDisconnect:
            return Response(status_code=400)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return PlainTextResponse(f"not a report: {error}", 400)
        if not board.add(found):
            return PlainTextResponse(f"the board has {MAX_LEARNERS} learners, which is the limit", 409)
        return Response(status_code=204)

    @app.get("/")
    async def page(request: Request) -> Response:
        return FileResponse(PAGE) if is_here(request) else refusal()

    @app.get("/learners")
    async def learners(request: Request) -> Response:
        if not is_here(request):
            return refusal()
        return JSONResponse({"join": join_command(url, board.code), "learners": board.shown()})

    return app


def is_here(request: Request) -> bool:
    """Whether the teacher's own browser asks. A page from elsewhere that has a name for this machine may not."""
    is_own = request.client is not None and is_loopback(request.client.host)
    return is_own and request.url.hostname in THIS_MACHINE


def refusal() -> Response:
    return PlainTextResponse("the board is shown on the teacher's machine only", 403)


def join_command(url: str, code: str) -> str:
    return f'{COMMAND} join {url} {code} "YOUR NAME"'


def lan_address() -> str:
    """This machine's address in its network. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def main(port: int, *, is_for_room: bool) -> None:
    """Serve until Ctrl-C. is_for_room: other machines may report, not only this one. Raises WorkshopError for a port
    that can't be, and OSError for one that is taken."""
    if not 0 <= port <= 65_535:
        raise WorkshopError(f"--port: expected 0 to 65535, got {port}")
    code = "".join(secrets.choice(LETTERS) for _ in range(CODE_LETTERS))
    listener = listen("0.0.0.0" if is_for_room else "127.0.0.1", port)
    port = listener.getsockname()[1]
    url = show_url(lan_address() if is_for_room else "127.0.0.1", port)
    message = f"the board: http://127.0.0.1:{port}\nlearners run: {join_command(url, code)}\nCtrl-C ends it."
    serve_app(create_app(Board(code), url), listener, message)
