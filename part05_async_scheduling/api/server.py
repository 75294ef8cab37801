"""OpenAI's API over the engine: the app itself is common's from here on."""

from __future__ import annotations

from fastapi import FastAPI

from common.openai_app import AppOptions
from common.openai_app import create_app as create_openai_app

from ..config import EngineConfig
from .async_engine import AsyncLLM


def create_app(engine: AsyncLLM, config: EngineConfig) -> FastAPI:
    """The engine's process ends with the app."""
    return create_openai_app(engine, AppOptions(api_key=config.api_key))
