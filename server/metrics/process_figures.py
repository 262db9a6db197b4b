"""The `process_*` metrics of Prometheus' clients, over all front ends of the server."""

import os
from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from jax_engine.server.metrics.cells import CellMemory

# Added up, these would say nothing: the earliest start and the tightest limit stand for all.
SMALLEST = frozenset({"process_start_time_seconds", "process_max_fds"})


class ProcessFigures(Collector):
    """CPU time, memory and files of the front ends' processes together."""

    def __init__(self, memory: CellMemory) -> None:
        self._pids = memory.take(1)
        self._pids.own[0] = os.getpid()

    def describe(self) -> list[Metric]:
        """Nothing: see `Metrics.describe`."""
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for row in self._pids.rows:
            if row[0]:  # else it has not started yet
                for family in ProcessCollector(pid=partial(int, row[0]), registry=CollectorRegistry()).collect():
                    merged = families.setdefault(family.name, family)
                    if merged is not family:
                        merge(merged, family)
        yield from families.values()


def merge(into: Metric, other: Metric) -> None:
    """Add another process's one sample of a family."""
    (mine,), (theirs,) = into.samples, other.samples
    join = min if into.name in SMALLEST else sum
    into.samples[:] = [mine._replace(value=join((mine.value, theirs.value)))]
