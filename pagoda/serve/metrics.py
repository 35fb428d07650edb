"""What /metrics tells Prometheus: requests, tokens, the queue, the cache, and how long people wait."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pagoda.engine.async_engine import AsyncEngine
from pagoda.engine.request import Output

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# name in the engine's stats: (name in Prometheus, help)
GAUGES = {
    "running": ("pagoda_requests_running", "Sequences in the current steps"),
    "waiting": ("pagoda_requests_waiting", "Sequences in the queue"),
    "kv_blocks_used": ("pagoda_kv_blocks_used", "Blocks of the key/value cache in use"),
    "kv_blocks_total": ("pagoda_kv_blocks", "Blocks of the key/value cache"),
}
COUNTERS = {
    "prompt_tokens": ("pagoda_prompt_tokens", "Tokens of prompts"),
    "new_tokens": ("pagoda_generation_tokens", "Tokens generated"),
    "prefix_query_tokens": ("pagoda_prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hit_tokens": ("pagoda_prefix_cache_hits", "Prompt tokens found there"),
    "preemptions": ("pagoda_preemptions", "Sequences that had to give their blocks back"),
}


class Metrics:
    def __init__(self, engine: AsyncEngine):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        registry = {"registry": self.registry}
        self.requests = Counter("pagoda_requests", "Requests answered", ("path", "status"), **registry)
        text = "Seconds from a request to its first token"
        self.first = Histogram("pagoda_time_to_first_token_seconds", text, buckets=FIRST_TOKEN, **registry)
        text = "Seconds between two tokens of an answer"
        self.between = Histogram("pagoda_time_between_tokens_seconds", text, buckets=BETWEEN_TOKENS, **registry)
        text = "Seconds from a request to its end"
        self.whole = Histogram("pagoda_request_seconds", text, buckets=WHOLE, **registry)

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for name, (title, help) in GAUGES.items():
            yield GaugeMetricFamily(title, help, stats[name])
        for name, (title, help) in COUNTERS.items():
            yield CounterMetricFamily(title, help, stats[name])

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Clock:
    """Times one request."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.start = metrics, time.perf_counter()

    def saw(self, piece: Output, last: float, first: bool) -> float:
        """A piece came; the one before it at `last`. Returns the time."""
        now = time.perf_counter()
        if not piece.token_ids:
            return last
        if first:
            self.metrics.first.observe(now - self.start)
        else:
            for _ in piece.token_ids:
                self.metrics.between.observe((now - last) / len(piece.token_ids))
        return now

    def finished(self) -> None:
        self.metrics.whole.observe(time.perf_counter() - self.start)
