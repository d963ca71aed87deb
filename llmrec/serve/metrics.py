"""Figures for Prometheus: requests, seconds, the queue, the engine. No label holds anything that a client wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric

    from llmrec.serve.service import Service

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What is counted of one service.

    Args:
        service: Whose queue and engine are looked at when somebody asks.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "llmrec_requests", "Requests by endpoint and status", ("endpoint", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "llmrec_request_seconds",
            "Seconds to the end of an answer",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_Engine(service))

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request; ``endpoint`` is the path of a route, never one that a client wrote."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self._registry)


class _Engine:
    """Looks at the queue and the engine whenever figures are asked for."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        load, engine = self._service.batcher.load, self._service.engine
        yield GaugeMetricFamily("llmrec_queue", "Questions that wait", load.waiting)
        yield GaugeMetricFamily("llmrec_engine_up", "Whether the engine answers", float(engine.ready))
        yield CounterMetricFamily("llmrec_engine_starts", "Times that an engine was started", engine.starts)
        yield CounterMetricFamily("llmrec_refused", "Questions that found the queue full", load.refused)
        yield CounterMetricFamily("llmrec_late", "Questions that were given up", load.late)
        yield CounterMetricFamily("llmrec_batches", "Batches that the engine was asked", sum(load.batches.values()))
        asked = sum(size * times for size, times in load.batches.items())
        yield CounterMetricFamily("llmrec_asked", "Questions that the engine was asked", asked)
        yield CounterMetricFamily("llmrec_engine_seconds", "Seconds that the engine worked", load.seconds)
