"""OpenAI's API over the engine. From part 3 on, the app itself is common.openai_app."""

from __future__ import annotations

from dataclasses import replace

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from common.errors import openai_error
from common.openai_app import AppOptions
from common.openai_app import create_app as create_openai_app
from common.openai_app.guards import check_api_key
from common.serve import ServerConfig

from ..kv_params import HEADER, KV_TRANSFER, open_signed
from .async_engine import AsyncLLM
from .request_metrics import RequestMetrics
from .timeline import NoteTimes


class KVTransferHeader:
    """Reads what the proxy says of a request's KV. A header that the proxy has not signed is refused: it would make
    the engine connect to any address."""

    def __init__(self, app: ASGIApp, secret: str | None) -> None:
        self.app, self.secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        value = dict(scope.get("headers") or ()).get(HEADER.encode())
        KV_TRANSFER.set(None)  # a connection's later requests may inherit what an earlier one has set
        if scope["type"] == "http" and value is not None:
            params = None if self.secret is None else open_signed(value.decode("latin-1"), self.secret)
            if params is None:
                why = "this engine has no kv_connector" if self.secret is None else "not signed by this engine's proxy"
                await JSONResponse(openai_error(f"{HEADER}: {why}", HEADER), 400)(scope, receive, send)
                return
            KV_TRANSFER.set(params)
        await self.app(scope, receive, send)


def create_app(engine: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The engine starts and ends with the app. Besides OpenAI's API, there are POST /reset_prefix_cache, as in vLLM,
    GET /kv_transfer: where other engines fetch this one's KV, and GET /ready: whether a new request would be queued.
    (/health: whether the engine is alive.)"""
    backends = [
        {"operation": operation, "backend": backend, "reason": reason}
        for operation, (backend, reason) in engine.kernels.items()
    ]
    infos = {"kernel_backend": backends} if backends else {}
    request_metrics = RequestMetrics()
    engine.observers.append(request_metrics.observe)
    options = replace(AppOptions.from_config(config), infos=infos, collectors=(request_metrics,))
    app = create_openai_app(engine, options)

    async def ready() -> JSONResponse:
        why_not = engine.why_not_ready()
        return JSONResponse({"status": why_not or "ready"}, 200 if why_not is None else 503)

    async def reset_prefix_cache(request: Request) -> JSONResponse:
        if config.api_key is not None:
            check_api_key(request, config.api_key)
        if await engine.reset_prefix_cache():
            return JSONResponse({"status": "reset"})
        return JSONResponse(openai_error("requests are in the engine, try again when they have ended", None), 409)

    async def kv_transfer(request: Request) -> Response:
        if config.api_key is not None:
            check_api_key(request, config.api_key)
        return Response(msgspec.json.encode({"sources": engine.kv_sources}), media_type="application/json")

    app.add_api_route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"])
    app.add_api_route("/kv_transfer", kv_transfer, methods=["GET"])
    app.add_api_route("/ready", ready, methods=["GET", "HEAD"])
    app.add_middleware(KVTransferHeader, secret=engine.kv_transfer_secret)
    app.add_middleware(NoteTimes)
    return app
