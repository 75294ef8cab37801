"""The router's Prometheus metrics: per replica, and of the queue."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from .pool import Pool

QUEUE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds


class Metrics:
    """Names begin with "router:"."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.retries = Counter("router:retries", "Requests that were sent to another replica.", registry=self.registry)
        self.refused = Counter(
            "router:requests_refused",
            "Requests that the router could not get answered, by status: 429, 503 or 500.",
            ["status"],
            registry=self.registry,
        )
        for status in (429, 503, 500):
            self.refused.labels(status)  # so that they show 0 before the first one
        self.queue_time = Histogram(
            "router:request_queue_time_seconds", "Time that a request waited in the router until its turn, in seconds.",
            buckets=QUEUE_BUCKETS, registry=self.registry,
        )  # fmt: skip

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        queue, replicas = self.pool.queue, self.pool.replicas
        yield GaugeMetricFamily("router:requests_waiting", "Requests that wait in the router.", queue.num_waiting)
        yield GaugeMetricFamily("router:requests_running", "Requests that are at replicas.", queue.num_running)
        per_replica = {
            "available": ("Whether a replica gets requests.", GaugeMetricFamily),
            "pending": ("Requests that a replica has now.", GaugeMetricFamily),
            "requests": ("Requests that were sent to a replica.", CounterMetricFamily),
            "failures": ("Requests that a replica failed.", CounterMetricFamily),
        }
        for name, (text, kind) in per_replica.items():
            family = kind(f"router:replica_{name}", text, labels=["replica"])
            for replica in replicas:
                values = {
                    "available": replica.is_available, "pending": replica.num_pending,
                    "requests": replica.num_requests, "failures": replica.num_failures,
                }  # fmt: skip
                family.add_metric([replica.url], float(values[name]))
            yield family

    def render(self) -> bytes:
        return generate_latest(self.registry)
