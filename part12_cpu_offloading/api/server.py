"""OpenAI's API over the engine. From part 3 on, the app itself is common.openai_app."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from common.errors import openai_error
from common.openai_app import AppOptions
from common.openai_app import create_app as create_openai_app
from common.openai_app.guards import check_api_key
from common.serve import ServerConfig

from .async_engine import AsyncLLM


def create_app(engine: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The engine starts and ends with the app. Besides OpenAI's API, there is POST /reset_prefix_cache, as in vLLM."""
    app = create_openai_app(engine, AppOptions.from_config(config))

    async def reset_prefix_cache(request: Request) -> JSONResponse:
        if config.api_key is not None:
            check_api_key(request, config.api_key)
        if await engine.reset_prefix_cache():
            return JSONResponse({"status": "reset"})
        return JSONResponse(openai_error("requests are in the engine, try again when they have ended", None), 409)

    app.add_api_route("/reset_prefix_cache", reset_prefix_cache, methods=["POST"])
    return app
