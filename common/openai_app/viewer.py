"""The viewer at /engine: a page, and the trace of the running engine as server-sent events."""

from __future__ import annotations

import asyncio
import atexit
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from common.cli import option
from common.errors import FieldError
from common.openai_app.guards import check_api_key
from common.openai_app.pages import add_page
from common.openai_app.streaming import unless_disconnected
from common.trace import LIVE_NAME

POLL_S = 0.1
MAX_READ_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class ViewerConfig:
    """The viewer's flag, which needs an engine that writes traces: part 4 and later."""

    enable_viewer: bool = option(False, "show every step of the engine in the browser, at /engine")

    def traced(self, config: Any) -> Any:
        """An EngineConfig, with a trace if there is a viewer. Raises FieldError."""
        if not self.enable_viewer:
            return config
        if config.trace is not None:
            raise FieldError(
                "enable_viewer", "expected no --trace: /engine shows a running engine, and opens files too"
            )
        return replace(config, trace=str(live_directory() / LIVE_NAME))

    def add_to(self, app: FastAPI, api_key: str | None) -> None:
        """Add /engine and /engine/events. The app's engine must have the config that traced() returned."""
        if self.enable_viewer:
            Viewer(live_directory(), api_key).add_to(app)


@cache
def live_directory() -> Path:
    """Where this process's engine writes what the viewer reads. The folder is deleted when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="llm-viewer-", ignore_cleanup_errors=True)
    atexit.register(directory.cleanup)
    return Path(directory.name)


class EventsResponse(StreamingResponse):
    """Ends when the client leaves, which StreamingResponse alone notices only at the next event."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self.stream_response(send))


class Viewer:
    """directory: where each engine core writes its trace, the first one to LIVE_NAME or LIVE_NAME.0."""

    def __init__(self, directory: Path, api_key: str | None) -> None:
        self.directory, self.api_key, self.is_ending = directory, api_key, False

    def add_to(self, app: FastAPI) -> None:
        add_page(app, "/engine", "engine.html")
        app.add_api_route("/engine/events", self.events, methods=["GET"], include_in_schema=False)
        app.state.begin_drain = self.end

    def end(self) -> None:
        """The server drains: end the event streams, which would hold it up."""
        self.is_ending = True

    async def events(self, request: Request, core: int = 0) -> StreamingResponse:
        """The lines of an engine core's trace, those that are there and those to come.

        Raises ApiError 401, and FieldError for a core that does not exist.
        """
        if self.api_key is not None:
            check_api_key(request, self.api_key)
        files = sorted(self.directory.glob(f"{LIVE_NAME}*"), key=lambda file: (len(file.name), file.name))
        if not 0 <= core < len(files):
            raise FieldError("core", f"expected one of {len(files)} engine cores, counted from 0, got {core}")
        headers = {"Cache-Control": "no-cache", "X-Engine-Cores": str(len(files))}
        return EventsResponse(self.follow(files[core]), media_type="text/event-stream", headers=headers)

    async def follow(self, file: Path) -> AsyncIterator[bytes]:
        """Each line as an event. If the file begins again, so do the events, with its header."""
        header, place, rest = b"", 0, b""
        while not self.is_ending:
            first, data = await asyncio.to_thread(_read, file, place)
            if first != header:
                header, place, rest = first, 0, b""
                continue
            place += len(data)
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                yield b"".join(b"data: " + line + b"\n\n" for line in lines)
            if not data:
                await asyncio.sleep(POLL_S)


def _read(file: Path, place: int) -> tuple[bytes, bytes]:
    """The header, which no two beginnings of the file share, and what follows place."""
    with file.open("rb") as opened:
        header = opened.readline()
        opened.seek(place)
        return header, opened.read(MAX_READ_BYTES)
