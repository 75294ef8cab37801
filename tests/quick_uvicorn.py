"""Servers that end at once: uvicorn looks every 100 ms whether it should, and many a test waits for that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import uvicorn

TICK_S = 0.01


async def main_loop(server: uvicorn.Server) -> None:
    """As uvicorn's, with another tick. uvicorn counts ten to a second."""
    counter = 0
    while not await server.on_tick(int(counter * TICK_S * 10)):
        counter += 1
        await asyncio.sleep(TICK_S)


@pytest.fixture(scope="session", autouse=True)
def quick_uvicorn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "main_loop", main_loop)
        yield
