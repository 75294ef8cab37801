"""OpenAI's API over the engine. From part 3 on, the app itself is common.openai_app."""

from __future__ import annotations

from fastapi import FastAPI

from common.openai_app import AppOptions
from common.openai_app import create_app as create_openai_app
from common.serve import ServerConfig

from .async_engine import AsyncLLM


def create_app(engine: AsyncLLM, config: ServerConfig) -> FastAPI:
    """The engine starts and ends with the app."""
    return create_openai_app(engine, AppOptions.from_config(config))
