"""The app and its routes. Read `OpenAIServer.answer` first: every completion request goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from common.openai_app.browsers import BrowserPolicy, add_browser_guards
from common.openai_app.errors import CLIENT_GONE, ApiError, add_error_handlers
from common.openai_app.generation import Generation, admit
from common.openai_app.guards import check_api_key, check_json, read_body
from common.openai_app.logprobs import TokenTexts
from common.openai_app.metrics import Metrics, RequestTimer
from common.openai_app.pages import add_page
from common.openai_app.protocol import ApiRequest, parse_request
from common.openai_app.responses import ResponseWriter, describe_model
from common.openai_app.responses_endpoint import ResponsesWriter, parse_responses_request
from common.openai_app.schema import SUMMARIES, DescribedApp, describe
from common.openai_app.stats_log import StatsLog
from common.openai_app.streaming import EventStream, collect, stream_events
from common.openai_app.tokens import detokenize, tokenize
from common.serve import ServerConfig, is_loopback
from common.serving import ServingEngine

ENGINE_DEAD = "the engine has died"
VERSION = "1.0"


@dataclass(frozen=True, slots=True)
class AppOptions:
    """api_key protects all but /health, /ping, /metrics and /version (None: no key needed). body_timeout_s: how long a
    request's body may take to arrive. root_path: where a proxy in front of the server has put it. log_stats: whether
    serve_app logs the lines of StatsLog. infos: what /metrics says about the engine that doesn't change, see Metrics.
    collectors: of further metrics.
    """

    api_key: str | None = None
    max_body_bytes: int = 1_000_000
    body_timeout_s: float = 30.0
    browsers: BrowserPolicy = field(default_factory=BrowserPolicy)
    root_path: str = ""
    log_stats: bool = False
    infos: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    collectors: Sequence[Collector] = ()

    @classmethod
    def from_config(cls, config: ServerConfig) -> AppOptions:
        """The options that the command line's flags ask for."""
        origins = tuple(origin.strip() for origin in (config.allowed_origins or "").split(",") if origin.strip())
        browsers = BrowserPolicy(origins, is_loopback(config.host), needs_key=config.api_key is not None)
        return cls(config.api_key, browsers=browsers, root_path=config.root_path, log_stats=config.log_stats)


class OpenAIServer:
    """The endpoints over one engine."""

    def __init__(self, engine: ServingEngine, options: AppOptions) -> None:
        self.engine, self.options = engine, options
        self.metrics = Metrics(engine.stats, options.infos, options.collectors)
        self.token_texts = TokenTexts(engine.tokenizer)
        self.started = int(time.time())
        self._ending = threading.Lock()

    async def read(self, http_request: Request) -> bytes:
        """A request's body, which must be JSON."""
        check_json(http_request)
        return await read_body(http_request, self.options.max_body_bytes, self.options.body_timeout_s)

    async def admit(self, http_request: Request, parse: Callable[..., ApiRequest]) -> tuple[ApiRequest, Generation]:
        """Read a request, check it, and queue it at the engine."""
        raw = await self.read(http_request)
        timer = RequestTimer(self.metrics)
        # In a thread: tokenizing a megabyte would block the event loop for too long.
        request_id = http_request.headers.get("X-Request-Id")
        request = await asyncio.to_thread(parse, raw, engine=self.engine, request_id=request_id)
        if not self.engine.is_alive:
            raise ApiError(503, ENGINE_DEAD, error_type="service_unavailable")
        return request, admit(self.engine, request, self.metrics, timer)

    async def answer(self, http_request: Request, is_chat: bool) -> Response:
        request, generation = await self.admit(http_request, functools.partial(parse_request, is_chat=is_chat))
        writer = ResponseWriter(request, self.token_texts)
        if request.stream is not None:
            return EventStream(generation, stream_events(generation, writer))
        return _as_json(await collect(generation, writer.response, http_request.receive))

    async def responses(self, http_request: Request) -> Response:
        request, generation = await self.admit(http_request, parse_responses_request)
        writer = ResponsesWriter(request)
        if request.stream is not None:
            return EventStream(generation, writer.events(generation))
        return _as_json(await collect(generation, writer.response, http_request.receive))

    async def completions(self, http_request: Request) -> Response:
        return await self.answer(http_request, is_chat=False)

    async def chat_completions(self, http_request: Request) -> Response:
        return await self.answer(http_request, is_chat=True)

    async def tokenize(self, http_request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(tokenize, await self.read(http_request), self.engine))

    async def detokenize(self, http_request: Request) -> Response:
        return JSONResponse(await asyncio.to_thread(detokenize, await self.read(http_request), self.engine))

    def describe_model(self) -> dict[str, Any]:
        return describe_model(self.engine.model_name, self.engine.max_model_len, self.started)

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self.describe_model()]})

    async def model(self, name: str) -> Response:
        if name != self.engine.model_name:
            message = f"model: {name[:100]!r} is not served here, expected {self.engine.model_name!r}"
            raise ApiError(404, message, "model", code="model_not_found")
        return JSONResponse(self.describe_model())

    async def health(self) -> Response:
        is_alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else ENGINE_DEAD}, 200 if is_alive else 503)

    async def version(self) -> Response:
        return JSONResponse({"version": VERSION})

    async def load(self) -> Response:
        """How many requests are unfinished, for load balancers."""
        stats = self.engine.stats()
        names = ("num_requests_running", "num_requests_waiting")
        return JSONResponse({"server_load": int(sum(stats.get(name, 0) for name in names))})

    async def show_metrics(self) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def check_key(self, http_request: Request) -> None:
        if self.options.api_key is not None:
            check_api_key(http_request, self.options.api_key)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.shut_down)  # it blocks

    def shut_down(self) -> None:
        """When the app ends, or earlier so that open requests end; never by two threads at once."""
        with self._ending:
            self.engine.shutdown()


def create_app(engine: ServingEngine, options: AppOptions | None = None) -> FastAPI:
    """OpenAI's API over one engine, which starts and ends with the app."""
    options = options or AppOptions()
    server = OpenAIServer(engine, options)
    app = DescribedApp(
        title="An LLM inference engine", version=VERSION, lifespan=server.lifespan, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.end_requests, app.root_path = server.shut_down, options.root_path
    if options.log_stats:
        app.state.log_stats = StatsLog(server.metrics).tick
    guarded = APIRouter(dependencies=[Depends(server.check_key)])
    for path, method, endpoint in routes(server):
        guarded.add_api_route(path, endpoint, methods=[method], summary=SUMMARIES[path], openapi_extra=describe(path))
    app.include_router(guarded)
    for path, open_endpoint in (("/health", server.health), ("/ping", server.health), ("/version", server.version)):
        app.add_api_route(path, open_endpoint, methods=["GET", "HEAD"], include_in_schema=False)
        app.add_api_route(  # one method a route
            path, open_endpoint, methods=["GET"], summary=SUMMARIES[path], openapi_extra=describe(path)
        )
    app.add_api_route(
        "/metrics", server.show_metrics, methods=["GET"], summary=SUMMARIES["/metrics"],
        response_class=PlainTextResponse,
    )  # fmt: skip
    for path, page in (("/", "chat.html"), ("/docs", "docs.html")):
        add_page(app, path, page)
    add_error_handlers(app)
    add_browser_guards(app, options.browsers)
    return app


def routes(server: OpenAIServer) -> list[tuple[str, str, Callable[..., Any]]]:
    """What needs the API key."""
    return [
        ("/v1/models", "GET", server.models),
        ("/v1/models/{name:path}", "GET", server.model),
        ("/v1/completions", "POST", server.completions),
        ("/v1/chat/completions", "POST", server.chat_completions),
        ("/v1/responses", "POST", server.responses),
        ("/tokenize", "POST", server.tokenize),
        ("/detokenize", "POST", server.detokenize),
        ("/load", "GET", server.load),
    ]


def _as_json(response: dict[str, Any] | None) -> Response:
    return Response(status_code=CLIENT_GONE) if response is None else JSONResponse(response)
