"""The log: a line for each request that has ended, and all lines as text or as JSON."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from .timeline import RequestTimeline

logger = logging.getLogger(__name__)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and the fields of `extra={"fields": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def set_up_logging(is_json: bool) -> None:
    """All lines go to stderr. To be called before the server starts."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if is_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    )
    logging.getLogger().addHandler(handler)
    logger.setLevel(logging.INFO)


def log_request(timeline: RequestTimeline) -> None:
    """An observer. The line names the client's X-Request-Id, if there was one; the answer's id contains it."""
    end = timeline.error or timeline.finish_reason
    fields = {
        "request_id": timeline.http.request_id or timeline.request_id,
        "end": end,
        "prompt_tokens": timeline.num_prompt_tokens,
        "cached_tokens": timeline.num_cached_tokens,
        "output_tokens": timeline.num_output_tokens,
        "preemptions": timeline.num_preemptions,
        "queue_ms": _ms(timeline.seconds_in("queue")),
        "prefill_ms": _ms(timeline.seconds_in("prefill")),
        "decode_ms": _ms(timeline.seconds_in("decode")),
        "ttft_ms": _ms(timeline.ttft_s),
    }
    shown = {name: value for name, value in fields.items() if value not in (None, 0)}
    shown["request_id"] = json.dumps(shown["request_id"])  # in quotes, so that it can't look like further fields
    message = ", ".join(f"{name} {value}" for name, value in shown.items())
    level = logging.INFO if timeline.error in (None, "aborted") else logging.ERROR
    logger.log(level, message, extra={"fields": fields})


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 1)
