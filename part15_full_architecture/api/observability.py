"""What a server tells about its requests, besides /metrics."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from common.cli import option
from common.errors import FieldError

from .async_engine import AsyncLLM
from .otel import SpanExporter
from .request_log import log_request, set_up_logging

EXPORTER = "opentelemetry.exporter"


@dataclass(frozen=True, slots=True)
class ObservabilityConfig:
    """The flags of the log and of traces; vLLM's names but for log_format. Raises FieldError."""

    enable_log_requests: bool = option(False, "log a line for each request that has ended")
    log_format: Literal["text", "json"] = option("text", "of log lines; json: one object per line")
    otlp_traces_endpoint: str | None = option(
        None, "an OpenTelemetry collector that gets a trace of each request, http://host:4318/v1/traces"
    )

    def __post_init__(self) -> None:
        if self.otlp_traces_endpoint is None:
            return
        if not is_http_url(self.otlp_traces_endpoint):
            wanted = "expected http://host:port/v1/traces"
            raise FieldError("otlp_traces_endpoint", f"{wanted}, got {self.otlp_traces_endpoint[:100]!r}")
        if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec(EXPORTER) is None:
            raise FieldError("otlp_traces_endpoint", "needs OpenTelemetry: pip install -e '.[otel]'")


def is_http_url(url: str) -> bool:
    """Whether it is http:// or https:// with a host, and with a port that exists if it has one."""
    try:
        parts = urlsplit(url)
        has_address = bool(parts.hostname) and parts.port != 0  # port raises ValueError if it is no number below 65536
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and has_address and not any(character.isspace() for character in url)


@contextlib.contextmanager
def observed(engine: AsyncLLM, config: ObservabilityConfig) -> Iterator[None]:
    """Inside, requests that end are logged and traced."""
    exporter = None
    if config.enable_log_requests or config.log_format == "json":
        set_up_logging(config.log_format == "json")
    if config.enable_log_requests:
        engine.observers.append(log_request)
    if config.otlp_traces_endpoint is not None:
        exporter = SpanExporter(config.otlp_traces_endpoint, engine.model_name)
        engine.observers.append(exporter.observe)
    try:
        yield
    finally:
        if exporter is not None:
            exporter.close()
