"""The app and its routes. Read `OpenAIServer.answer` first: every completion request goes through it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from common.errors import FieldError
from common.openai_app.errors import CLIENT_GONE, ApiError, add_error_handlers
from common.openai_app.generation import admit
from common.openai_app.guards import check_api_key, read_body
from common.openai_app.logprobs import TokenTexts
from common.openai_app.metrics import Metrics, RequestTimer
from common.openai_app.protocol import parse_request
from common.openai_app.responses import ResponseWriter, list_models
from common.openai_app.streaming import EventStream, collect
from common.serving import ServingEngine

ENGINE_DEAD = "the engine has died"


@dataclass(frozen=True, slots=True)
class AppOptions:
    """api_key protects /v1 (None: no key needed). body_timeout_s: how long a request's body may take to arrive.

    Raises FieldError for a key that no client could send.
    """

    api_key: str | None = None
    max_body_bytes: int = 1_000_000
    body_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise FieldError("api_key", "expected a key without leading or trailing spaces, or none")


class OpenAIServer:
    """The endpoints over one engine."""

    def __init__(self, engine: ServingEngine, options: AppOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine.stats)
        self.token_texts = TokenTexts(engine.tokenizer)

    async def answer(self, http_request: Request, is_chat: bool) -> Response:
        raw = await read_body(http_request, self.options.max_body_bytes, self.options.body_timeout_s)
        timer = RequestTimer(self.metrics)
        # In a thread: tokenizing a megabyte would block the event loop for too long.
        request = await asyncio.to_thread(parse_request, raw, is_chat, self.engine)
        if not self.engine.is_alive:
            raise ApiError(503, ENGINE_DEAD, error_type="service_unavailable")
        generation = admit(self.engine, request, self.metrics, timer)
        writer = ResponseWriter(request, self.token_texts)
        if request.stream:
            return EventStream(generation, writer)
        response = await collect(generation, writer, http_request.receive)
        return Response(status_code=CLIENT_GONE) if response is None else JSONResponse(response)

    async def completions(self, http_request: Request) -> Response:
        return await self.answer(http_request, is_chat=False)

    async def chat_completions(self, http_request: Request) -> Response:
        return await self.answer(http_request, is_chat=True)

    async def models(self) -> Response:
        return JSONResponse(list_models(self.engine.model_name, self.engine.max_model_len))

    async def health(self) -> Response:
        is_alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else ENGINE_DEAD}, 200 if is_alive else 503)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def check_key(self, http_request: Request) -> None:
        if self.options.api_key is not None:
            check_api_key(http_request, self.options.api_key)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.shutdown)  # it blocks


def create_app(engine: ServingEngine, options: AppOptions | None = None) -> FastAPI:
    """OpenAI's API over one engine, which starts and ends with the app."""
    server = OpenAIServer(engine, options or AppOptions())
    app = FastAPI(
        lifespan=server.lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )  # fmt: skip
    guarded = APIRouter(prefix="/v1", dependencies=[Depends(server.check_key)])
    guarded.add_api_route("/models", server.models, methods=["GET"])
    guarded.add_api_route("/completions", server.completions, methods=["POST"])
    guarded.add_api_route("/chat/completions", server.chat_completions, methods=["POST"])
    app.include_router(guarded)
    app.add_api_route("/health", server.health, methods=["GET"])
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"])
    add_error_handlers(app)
    return app
