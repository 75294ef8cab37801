"""OpenAI's API over one engine. Read `create_app` first: each request goes through `answer`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from common.errors import FieldError, openai_error
from common.openai_app.browsers import BrowserPolicy, add_browser_guards
from common.openai_app.pages import add_page
from common.outputs import CompletionOutput
from common.request_body import parse_json
from common.sampling_params import check_vocabulary

from .async_engine import AsyncLLM, GenerationError, QueueFullError, RequestStream
from .engine import LLM, join_outputs
from .openai_api import (
    ApiRequest,
    ModelNotFoundError,
    check_model,
    describe_model,
    full_response,
    parse_request,
    stream_events,
)

MAX_BODY_BYTES = 1_000_000
CLIENT_GONE = 499  # nginx's status for a client that has disconnected and never sees it


class EventStream(StreamingResponse):
    """Server-sent events of one request. However the response ends, the request is aborted if it is still running."""

    def __init__(self, engine: AsyncLLM, request: ApiRequest, stream: RequestStream) -> None:
        super().__init__(
            stream_events(request, stream), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.engine, self.stream = engine, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)  # ends early if the client disconnects
        finally:
            self.engine.abort(self.stream)


async def collect(http_request: Request, engine: AsyncLLM, stream: RequestStream) -> list[CompletionOutput] | None:
    """All outputs of a request, or None if the client disconnects first. Nothing else checks for that."""

    # exercise: collect
    async def drain() -> list[CompletionOutput]:
        return [output async for output in stream]

    async def wait_for_disconnect() -> None:
        while (await http_request.receive())["type"] != "http.disconnect":
            pass

    answer, gone = asyncio.ensure_future(drain()), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        gone.cancel()
        engine.abort(stream)
    # exercise: end


async def read_body(request: Request) -> bytes:
    """Raises HTTPException 415 unless Content-Type is JSON (browsers let web pages send other types without a
    preflight), and 413 once more than MAX_BODY_BYTES have arrived, whatever Content-Length says."""
    content_type = request.headers.get("Content-Type", "none").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HTTPException(415, f"Content-Type: expected application/json, got {content_type[:100]}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"body: expected at most {MAX_BODY_BYTES:,} bytes, got more")
    return bytes(body)


def create_app(llm: LLM, max_queued_requests: int = 64, is_local: bool = False) -> FastAPI:
    """OpenAI's API over one engine. The engine's thread starts and ends with the app. is_local: see BrowserPolicy."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = AsyncLLM(llm, max_queued_requests)
        app.state.end_requests = app.state.engine.shutdown
        yield
        await asyncio.to_thread(app.state.engine.shutdown)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.post("/v1/completions")
    async def completions(http_request: Request) -> Response:
        return await answer(http_request, is_chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(http_request: Request) -> Response:
        return await answer(http_request, is_chat=True)

    async def answer(http_request: Request, is_chat: bool) -> Response:
        body = parse_json(await read_body(http_request))
        # In a thread: tokenizing a megabyte would block the event loop for too long.
        request = await asyncio.to_thread(parse_request, body, is_chat, llm)
        check_vocabulary(request.params, llm.model.config.vocab_size)
        engine: AsyncLLM = app.state.engine
        stream = engine.generate(request.prompt_token_ids, request.params)
        if request.stream:
            return EventStream(engine, request, stream)
        outputs = await collect(http_request, engine, stream)
        if outputs is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(full_response(request, join_outputs(outputs)))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe_model(llm.name, llm.max_model_len)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model(name, llm.name)
        return describe_model(llm.name, llm.max_model_len)

    @app.get("/health")
    async def health() -> JSONResponse:
        is_alive = app.state.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "the engine has died"}, 200 if is_alive else 503)

    add_page(app, "/", "chat.html")
    add_error_handlers(app)
    add_browser_guards(app, BrowserPolicy(is_local=is_local))
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Every error is sent in OpenAI's format."""

    @app.exception_handler(FieldError)
    async def bad_field(_: Request, error: FieldError) -> JSONResponse:
        return JSONResponse(openai_error(str(error), error.field, code=error.code), 400)

    @app.exception_handler(ModelNotFoundError)
    async def no_model(_: Request, error: ModelNotFoundError) -> JSONResponse:
        return JSONResponse(openai_error(str(error), "model", code="model_not_found"), 404)

    @app.exception_handler(QueueFullError)
    async def queue_full(_: Request, error: QueueFullError) -> JSONResponse:
        return JSONResponse(openai_error(str(error), None, "rate_limit_error"), 429, headers={"Retry-After": "1"})

    @app.exception_handler(GenerationError)
    async def failed(_: Request, error: GenerationError) -> JSONResponse:
        return JSONResponse(openai_error(str(error), None, error.kind), error.status)

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)  # it disconnected before its body was complete

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        param = {413: "body", 415: "Content-Type"}.get(error.status_code)
        return JSONResponse(openai_error(error.detail, param), error.status_code, headers=error.headers)
