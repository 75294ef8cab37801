"""The live trace at /engine/events, without a browser."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from common.openai_app.errors import add_error_handlers
from common.openai_app.viewer import Viewer
from common.serve import running_app
from common.trace import LIVE_NAME

LOOK = "Look at common/openai_app/viewer.py::Viewer"


def test_a_file_that_begins_again_while_the_client_does_not_read(tmp_path: Path) -> None:
    """And that has grown beyond what the client has read of it."""

    async def read() -> list[bytes]:
        path = tmp_path / LIVE_NAME
        path.write_bytes(b'{"restarts": 0}\nline 1\nhalf a li')
        events = Viewer(tmp_path, None).follow(path)
        first = await anext(events)
        path.write_bytes(b'{"restarts": 1}\n' + b"a longer line\n" * 10)
        return [first, await anext(events)]

    first, second = asyncio.run(read())
    assert first == b'data: {"restarts": 0}\n\ndata: line 1\n\n', first
    assert second == b'data: {"restarts": 1}\n\n' + b"data: a longer line\n\n" * 10, f"{second!r}. {LOOK}.follow"


def test_live_events_need_the_key(tmp_path: Path) -> None:
    app = FastAPI()
    add_error_handlers(app)
    Viewer(tmp_path, "secret").add_to(app)
    with running_app(app) as url:
        answers: list[Any] = [httpx.get(f"{url}/engine/events", trust_env=False)]
        answers.append(httpx.get(f"{url}/engine", trust_env=False))
        answers.append(
            httpx.get(f"{url}/engine/events?core=3", headers={"Authorization": "Bearer secret"}, trust_env=False)
        )
    assert [answer.status_code for answer in answers] == [401, 200, 400], [answer.text[:200] for answer in answers]
