"""Prometheus metrics under vLLM's names, with the prefix "engine:"."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from common.outputs import CompletionOutput

# Seconds; vLLM's.
TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
ITL_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
E2E_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

# The engine's own numbers, with what /metrics says about them. Those that are not named here are counters as well.
GAUGES = {
    "num_requests_running": "Requests that the engine is computing now.",
    "num_requests_waiting": "Requests that wait in the queue now.",
    "kv_cache_usage_perc": "Fraction of the KV cache blocks that requests use now, from 0 to 1.",
    "weight_bytes": "Bytes of the model's weights in memory, and the draft model's, on all ranks together.",
    "kv_block_bytes": "Bytes of a KV block, on all ranks together.",
    "expert_balance_perc": "Mean of the ranks' loads from experts, divided by the largest, before experts last moved.",
    "kv_offload_usage_perc": "Fraction of the blocks in host memory that are in use now, from 0 to 1.",
    "kv_offload_host_tokens_per_s": "How fast KV blocks were last loaded from host memory, in tokens per second.",
    "kv_offload_tier_tokens_per_s": "How fast KV blocks were last loaded from disk or Redis, in tokens per second.",
    "prompt_tokens_per_s": "How fast prompts were last computed, in tokens per second.",
}
COUNTERS = {
    "num_preemptions": "Preemptions: how often a running request had to give up its KV cache blocks.",
    "prefix_cache_queries": "Tokens that were looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens that were found in the prefix cache.",
    "spec_decode_num_drafts": "Drafts that were verified, each with one or more draft tokens of one request.",
    "spec_decode_num_draft_tokens": "Draft tokens that were verified.",
    "spec_decode_num_accepted_tokens": "Draft tokens that were accepted.",
    "kv_offload_saved_tokens": "Tokens whose KV blocks were copied to host memory.",
    "kv_offload_host_tokens": "Tokens whose KV blocks were loaded from host memory.",
    "kv_offload_tier_tokens": "Tokens whose KV blocks were loaded from disk or Redis.",
    "kv_offload_recomputed_tokens": "Tokens that could have been loaded, but computing them was expected to be faster.",
    "kv_transfer_offered": "Prompts that were computed for another engine to fetch.",
    "kv_transfer_expired": "Prompts that no other engine has fetched in time.",
    "kv_transfer_fetched_tokens": "Tokens whose KV was fetched from another engine.",
    "kv_transfer_fetched_bytes": "Bytes of KV that were fetched from another engine.",
    "kv_transfer_fetch_seconds": "Seconds from the start of each fetch to its end, all fetches together.",
    "kv_transfer_failed": "Transfers from another engine that failed, in whole or in part.",
}


INFOS = {
    "kernel_backend": "Which backend computes an operation, and why; always 1.",
}


class Metrics:
    """One app's metrics. "Request" in their names means an engine request: each choice is one.

    stats returns the engine's own numbers; it is called at each scrape. infos: facts that don't change, by their names
    in INFOS, each as a list of label sets. collectors: of further metrics.
    """

    def __init__(
        self, stats: Callable[[], Mapping[str, float]], infos: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
        collectors: Sequence[Collector] = (),
    ) -> None:  # fmt: skip
        self._stats, self._infos = stats, infos or {}
        self._registry = CollectorRegistry()
        for collector in (self, *collectors):
            self._registry.register(collector)
        ProcessCollector(registry=self._registry)  # the server's process: when it started, memory, CPU time, files
        self.success = self._counter("request_success", "Finished requests, by finish reason.", "finished_reason")
        for reason in ("stop", "length"):
            self.success.labels(reason)  # so that they show 0 before the first request
        self.aborted = self._counter(
            "request_aborted", "Requests aborted because the client disconnected, or because another choice failed."
        )
        self.errors = self._counter("request_errors", "Requests that failed in the engine.")
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of accepted requests. With n > 1 a prompt counts once."
        )
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token", "TTFT: time from a request's arrival to its first token, in seconds.", TTFT_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency", "ITL: time between two outputs of a request, in seconds.", ITL_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency", "Time from a request's arrival to its last token, in seconds.", E2E_BUCKETS
        )

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's gauges, counters and facts; prometheus_client calls this at each scrape."""
        for name, label_sets in self._infos.items():
            family = GaugeMetricFamily(f"engine:{name}_info", INFOS[name], labels=list(label_sets[0]))
            for labels in label_sets:
                family.add_metric(list(labels.values()), 1)
            yield family
        for name, value in self._stats().items():
            if name in GAUGES:
                yield GaugeMetricFamily(f"engine:{name}", GAUGES[name], value)
            else:
                meaning = COUNTERS.get(name, f"{name}, counted since the engine started.")
                yield CounterMetricFamily(f"engine:{name}", meaning, value)

    def render(self) -> bytes:
        return generate_latest(self._registry)

    def totals(self) -> dict[str, float]:
        """The engine's own numbers, and under prompt_tokens and generation_tokens all tokens so far."""
        counters = {"prompt_tokens": self.prompt_tokens, "generation_tokens": self.generation_tokens}
        return {**self._stats(), **{name: _total(counter) for name, counter in counters.items()}}

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"engine:{name}", meaning, labels, registry=self._registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"engine:{name}_seconds", meaning, buckets=buckets, registry=self._registry)


def _total(counter: Counter) -> float:
    (metric,) = counter.collect()
    return next(sample.value for sample in metric.samples if sample.name.endswith("_total"))


class RequestTimer:
    """Records the outputs of one API request, which arrives now."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival_s = time.perf_counter()
        self._last_output_s: dict[int, float] = {}  # by choice

    def record(self, output: CompletionOutput) -> None:
        now_s = time.perf_counter()
        if output.token_ids:
            self._metrics.generation_tokens.inc(len(output.token_ids))
            last_s = self._last_output_s.get(output.index)
            if last_s is None:
                self._metrics.time_to_first_token.observe(now_s - self._arrival_s)
            else:
                self._metrics.inter_token_latency.observe(now_s - last_s)
            self._last_output_s[output.index] = now_s
        if output.finish_reason:
            self._metrics.success.labels(output.finish_reason).inc()
            self._metrics.e2e_latency.observe(now_s - self._arrival_s)
