"""A line of statistics in the log every 10 seconds while there is activity, as vLLM prints."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from common.openai_app.metrics import Metrics

INTERVAL_S = 10.0
TOKENS = ("prompt_tokens", "generation_tokens")
UNFINISHED = ("num_requests_running", "num_requests_waiting")


class StatsLog:
    """Logs what happened in each interval. An interval begins with the first new token, or where the last one ended.

    An interval without activity gets a line as well, which shows that the engine is idle, and ends the sequence. A
    server that ends within INTERVAL_S of its first request logs nothing.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logger = _stderr_logger()
        self._before: dict[str, float] = {}  # the totals at the beginning of the interval
        self._begin_s: float | None = None  # None while the engine is idle

    def tick(self, now_s: float) -> None:
        """Log the line that is due, if any. now_s: seconds on any clock that never goes back. Call it often."""
        if self._begin_s is not None and now_s - self._begin_s < INTERVAL_S:
            return
        totals = self._metrics.totals()
        is_active = _is_active(self._before, totals)
        if self._begin_s is not None:
            self._logger.info(format_stats(self._before, totals, now_s - self._begin_s))
            self._before = totals
        self._begin_s = now_s if is_active else None


def format_stats(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> str:
    """The line for an interval of so many seconds, from the totals at its two ends.

    It has only the parts for which `after` has the numbers, and no share of nothing.
    """
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    parts = {
        "Running: {:.0f} reqs": after.get("num_requests_running"),
        "Waiting: {:.0f} reqs": after.get("num_requests_waiting"),
        "prompt {:.0f} tok/s": added["prompt_tokens"] / seconds,
        "generation {:.0f} tok/s": added["generation_tokens"] / seconds,
        "KV cache {:.1%}": after.get("kv_cache_usage_perc"),
        "prefix hit {:.1%}": _share(added, "prefix_cache_hits", "prefix_cache_queries"),
        "draft acceptance {:.0%}": _share(added, "spec_decode_num_accepted_tokens", "spec_decode_num_draft_tokens"),
    }
    return ", ".join(text.format(value) for text, value in parts.items() if value is not None)


def _is_active(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether there are new tokens, or requests that have not finished."""
    return any(after[name] != before.get(name, 0) for name in TOKENS) or any(after.get(name) for name in UNFINISHED)


def _share(added: Mapping[str, float], part: str, whole: str) -> float | None:
    return added[part] / added[whole] if added.get(whole) else None


def _stderr_logger() -> logging.Logger:
    """This module's logger, with a handler that shows INFO on stderr unless the program has set up handlers itself."""
    logger = logging.getLogger(__name__)
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
    return logger
