"""Send answers, complete or as server-sent events, to clients that may disconnect at any time."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from common.openai_app.errors import as_api_error
from common.openai_app.generation import Generation
from common.openai_app.responses import ResponseWriter
from common.outputs import CompletionOutput
from common.serving import GenerationError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """A request's outputs as server-sent events. However the response ends, its generation is closed."""

    def __init__(self, generation: Generation, events: AsyncGenerator[str, None]) -> None:
        self.generation, self.events = generation, events
        super().__init__(self.events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self.stream_response(send))
        finally:
            self.generation.close()
            await self.events.aclose()


async def collect(
    generation: Generation, write: Callable[[list[CompletionOutput]], dict[str, Any]], receive: Receive
) -> dict[str, Any] | None:
    """The complete answer, or None if the client disconnected first, which only this function detects.

    write: makes the response of all outputs.
    """

    async def answer() -> dict[str, Any]:
        return write([output async for output in generation.outputs()])

    try:
        return await unless_disconnected(receive, answer())
    finally:
        generation.close()


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of work; None, with work canceled, if the client disconnects first."""

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    result, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((result, gone), return_when=asyncio.FIRST_COMPLETED)
        return result.result() if result.done() else None
    finally:
        result.cancel()
        gone.cancel()
        await asyncio.gather(result, gone, return_exceptions=True)  # both have released everything before we return


def format_event(payload: dict[str, Any]) -> str:
    """One server-sent event. JSON escapes line ends, so a single data line holds it."""
    return f"data: {json.dumps(payload, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def stream_events(generation: Generation, writer: ResponseWriter) -> AsyncGenerator[str, None]:
    """The answer as it is generated: text, finish reasons, the usage if requested, [DONE]."""
    try:
        async for output in generation.outputs():
            for chunk in writer.chunks(output):
                yield format_event(chunk)
        for chunk in writer.last_chunks():
            yield format_event(chunk)
    except Exception as error:  # status 200 has been sent, so the error becomes an event
        if not isinstance(error, GenerationError):
            logger.exception("a stream failed")
        yield format_event(as_api_error(error).body)
    yield "data: [DONE]\n\n"
