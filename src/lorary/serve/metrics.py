"""What a server counts and times, for Prometheus. All names begin with `lorary_`."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorary.serve.engine import Load
from lorary.serve.receipt import Receipt

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """The counters of one server.

    Args:
        load: how busy its engine is.
        num_experts: how many experts are seated.
        num_requests: how many requests are under way.
    """

    def __init__(
        self, load: Callable[[], Load], num_experts: Callable[[], int], num_requests: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Gauges(load, num_experts, num_requests))
        self.requests = self._counter("requests", "Requests", "endpoint", "status")
        self.tokens = self._counter("tokens", "Tokens of prompts and answers", "kind")
        self.decisions = self._counter("decisions", "Decisions", "router", "fallback")
        self.experts = self._counter("expert_requests", "Requests that an expert answered", "expert")
        self.shadow = self._counter("shadow_requests", "Shadow decisions", "router", "agrees")
        self.request_time = self._histogram("request", "Time of a request", _LONG, "endpoint")
        self.first_token = self._histogram("time_to_first_token", "From a request to its first token", _LONG)
        self.between_tokens = self._histogram("time_between_tokens", "From one token of an answer to the next", _SHORT)
        self.routing_time = self._histogram("routing", "Time of a decision", _SHORT)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"lorary_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"lorary_{name}_seconds", text, labels, buckets=buckets, registry=self._registry)

    def count_decision(self, receipt: Receipt) -> None:
        """Count a decision."""
        self.decisions.labels(receipt.router, str(receipt.is_fallback).lower()).inc()
        self.routing_time.observe(receipt.ms / 1000)
        for name, _ in receipt.experts:
            self.experts.labels(name).inc()

    def text(self) -> bytes:
        """All of it in the format of Prometheus."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    """What is read when somebody asks."""

    def __init__(
        self, load: Callable[[], Load], num_experts: Callable[[], int], num_requests: Callable[[], int]
    ) -> None:
        self._load, self._num_experts, self._num_requests = load, num_experts, num_requests

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        for name, text, value in (
            ("lorary_queue_waiting", "Answers that wait", load.waiting),
            ("lorary_queue_running", "Answers that are made", load.running),
            ("lorary_queue_capacity", "Answers that may wait or be made", load.capacity),
            ("lorary_requests_under_way", "Requests that are answered or wait", self._num_requests()),
            ("lorary_experts", "Experts that are seated", self._num_experts()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
