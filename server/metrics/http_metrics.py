"""The HTTP metrics that vLLM's instrumentation has: requests by route, method and class of status, and their times."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.routing import BaseRoute, Route
from starlette.types import Scope

from jax_engine.server.metrics.cells import CellMemory
from jax_engine.server.metrics.histogram import Histogram

# Asked all the time, by machines: they would hide everything else.
UNCOUNTED = frozenset({"/metrics", "/health", "/live", "/load", "/ping", "/version"})
COARSE_BOUNDS = (0.1, 0.5, 1.0)
FINE_BOUNDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 7.5, 10.0, 30.0),
    60.0,
)
STATUSES = ("2xx", "3xx", "4xx", "5xx")
# What no route takes counts together: clients could make up any number of paths and methods.
NO_ROUTE = ("none", "ANY")


class HttpMetrics(Collector):
    """Counts answers. Mutable; owned by the `Metrics`, touched by its event loop alone; see `cells.py`."""

    def __init__(self, memory: CellMemory) -> None:
        self._memory = memory
        self._fine = Histogram(FINE_BOUNDS, memory)
        self._coarse: dict[tuple[str, str], Histogram] = {}
        self._statuses = {NO_ROUTE: memory.take(len(STATUSES))}

    def count_routes(self, routes: Iterable[BaseRoute]) -> None:
        """Count requests to these routes by themselves."""
        known = {(route.path, method) for route in routes if isinstance(route, Route) for method in route.methods or ()}
        for name in sorted(name for name in known if name[0] not in UNCOUNTED):
            self._statuses[name] = self._memory.take(len(STATUSES))
            self._coarse[name] = Histogram(COARSE_BOUNDS, self._memory)

    def observe(self, scope: Scope, status: int | None, seconds: float) -> None:
        """An answer has been sent, or its client has left; `status` is None when it had not begun."""
        route = scope.get("route")
        name = (route.path, scope["method"]) if isinstance(route, Route) else NO_ROUTE
        if status is None or name[0] in UNCOUNTED:
            return
        if name not in self._statuses:
            name = NO_ROUTE
        self._statuses[name].own[min(max(status // 100, 2), 5) - 2] += 1
        self._fine.observe(seconds)
        if name in self._coarse:
            self._coarse[name].observe(seconds)

    def describe(self) -> list[Metric]:
        """Nothing: see `Metrics.describe`."""
        return []

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "http_requests", "Answers by route, method and class of status.", labels=("handler", "method", "status")
        )
        for (handler, method), cells in self._statuses.items():
            for index, status in enumerate(STATUSES):
                if count := cells.total(index):
                    requests.add_metric((handler, method, status), count)
        yield requests
        coarse = HistogramMetricFamily(
            "http_request_duration_seconds",
            "Time until an answer had been sent, streams to their end.",
            labels=("handler", "method"),
        )
        for names, histogram in self._coarse.items():
            pairs = histogram.cumulative()
            if pairs[-1][1]:
                coarse.add_metric(names, pairs, histogram.total)
        yield coarse
        yield HistogramMetricFamily(
            "http_request_duration_highr_seconds",
            "The same of all routes together, in more buckets.",
            buckets=self._fine.cumulative(),
            sum_value=self._fine.total,
        )
