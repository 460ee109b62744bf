"""Counts of a replica in Prometheus' text format.

A route of our own and not only Ray's metrics port, because a client of the endpoint can reach it
and because Ray knows no tokens. What Ray Serve exports stays where it is, with the same replicas.

A scrape goes through the proxy to any one replica, so each has a label with its name and one scrape
shows all of them (`exposition`); counters of one replica never jump. Labels have few values: route,
status and replica, never a model's, a task's or a client's name.
"""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Edges of the histograms."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ServeMetrics:
    """The counts of one replica.

    Args:
        replica: its name.
        num_running: gives the prompts in the batch.
        num_open: gives the prompts in the batch and those that wait.
    """

    def __init__(
        self,
        replica: str,
        num_running: Callable[[], int],
        num_open: Callable[[], int],
    ) -> None:
        self._registry = CollectorRegistry()
        self.replica = replica
        self._requests = self._make(Counter, "requests", "HTTP requests.", "route", "status")
        self._seconds = self._make(
            Histogram, "request_seconds", "To the last byte.", "route", buckets=SECONDS
        )
        self._first = self._make(
            Histogram, "first_piece_seconds", "To the first text of a stream.", buckets=SECONDS
        )
        tokens = ("prompt_tokens", "generated_tokens", "cached_tokens")
        texts = ("Prompt tokens.", "New tokens.", "Prompt tokens that were known from before.")
        self._tokens = [self._make(Counter, *pair) for pair in zip(tokens, texts, strict=True)]
        self._episodes = self._make(Counter, "episodes", "Episodes that were played.", "stop")
        running = self._make(Gauge, "requests_running", "Prompts in the batch.")
        waiting = self._make(Gauge, "requests_waiting", "Prompts that wait for a place in it.")
        running.labels(replica).set_function(num_running)
        waiting.labels(replica).set_function(lambda: max(0, num_open() - num_running()))

    def _make(
        self, kind: Callable[..., Any], name: str, text: str, *labels: str, **more: Any
    ) -> Any:
        names = (*labels, "replica")
        return kind(f"step_ray_{name}", text, names, registry=self._registry, **more)

    def count(self, route: str, status: int, seconds: float) -> None:
        """One request that is over."""
        self._requests.labels(route, str(status), self.replica).inc()
        self._seconds.labels(route, self.replica).observe(seconds)

    def answered(self, prompt: int, generated: int, cached: int) -> None:
        """Tokens of one answer."""
        for counter, number in zip(self._tokens, (prompt, generated, cached), strict=True):
            counter.labels(self.replica).inc(number)

    def first_piece(self, seconds: float) -> None:
        """A stream has begun to speak."""
        self._first.labels(self.replica).observe(seconds)

    def episode(self, stop: str) -> None:
        """One episode that is over, with its stop reason."""
        self._episodes.labels(stop, self.replica).inc()

    def snapshot(self) -> list[Metric]:
        """All counts as they are now."""
        return list(self._registry.collect())


def exposition(snapshots: Iterable[list[Metric]]) -> bytes:
    """The counts of several replicas as one text."""
    merged: dict[str, Metric] = {}
    for metric in (metric for snapshot in snapshots for metric in snapshot):
        known = merged.setdefault(
            metric.name, Metric(metric.name, metric.documentation, metric.type)
        )
        known.samples += metric.samples
    registry = CollectorRegistry()
    registry.register(_Collected(list(merged.values())))
    return generate_latest(registry)


class _Collected:
    """Metrics that were collected elsewhere."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        """All of them."""
        return self._metrics
