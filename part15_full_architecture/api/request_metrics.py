"""How long requests wait, prefill and decode, as histograms for /metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Histogram
from prometheus_client.metrics_core import Metric

from .timeline import RequestTimeline

BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds
STAGES = {
    "queue": "Time that a request waits in the engine before its first step, in seconds.",
    "prefill": "Time from a request's first step to its first token, in seconds.",
    "decode": "Time from a request's first token to its last one, in seconds.",
}


class RequestMetrics:
    """A collector for prometheus_client, under vLLM's names. TTFT minus queue and prefill is what the API process
    takes."""

    def __init__(self) -> None:
        self.histograms = {
            stage: Histogram(f"engine:request_{stage}_time_seconds", meaning, buckets=BUCKETS, registry=None)
            for stage, meaning in STAGES.items()
        }

    def observe(self, timeline: RequestTimeline) -> None:
        """A request has ended. One that failed counts as far as it came."""
        for stage, histogram in self.histograms.items():
            seconds = timeline.seconds_in(stage)
            if seconds is not None:
                histogram.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        for histogram in self.histograms.values():
            yield from histogram.collect()
