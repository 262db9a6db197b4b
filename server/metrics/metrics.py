"""Prometheus metrics: what each engine shows (`engine_metrics.py`), HTTP and the processes."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jax_engine.config import EngineConfig
from jax_engine.core.stats import EngineStats, total
from jax_engine.server.metrics.cells import CellMemory
from jax_engine.server.metrics.engine_metrics import EngineMetrics
from jax_engine.server.metrics.http_metrics import HttpMetrics
from jax_engine.server.metrics.process_figures import ProcessFigures


class Metrics(Collector):
    """Everything that `/metrics` shows. Mutable; owned by the `Service`, touched by its event loop alone.

    With several front ends it shows what all of them count in `memory`. `engines` has one entry for each replica.
    """

    def __init__(
        self, model_name: str, memory: CellMemory | None = None, *, engine_config: EngineConfig | None = None
    ) -> None:
        """`engine_config` says how many replicas there are, and whether there are adapters."""
        self._config = config = engine_config or EngineConfig()
        numbers = range(config.data_parallel_size)
        memory = memory or CellMemory.alone(engines=len(numbers))
        self.engines = [EngineMetrics(model_name, number, memory, config) for number in numbers]
        self.server_load = memory.take(1)  # requests that are being answered
        self._processes = ProcessFigures(memory)
        self.http = HttpMetrics(memory)
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._registry.register(self._processes)
        self._registry.register(self.http)

    def render(self, stats: Sequence[EngineStats]) -> bytes:
        """Prometheus' text format, with the counters of each engine as of `stats`."""
        for engine, latest in zip(self.engines, stats, strict=True):
            engine.stats = latest
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not collect at registration to find clashing names."""
        return []

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for engine in self.engines:
            for family in engine.collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()
        if self._config.enable_lora:
            yield self._adapters()

    def _adapters(self) -> Metric:
        """Of all engines together, as vLLM has it."""
        names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests, by name.", labels=names)
        stats = total([engine.stats for engine in self.engines])
        running, waiting = (",".join(some) for some in (stats.running_adapters, stats.waiting_adapters))
        family.add_metric((str(self._config.max_loras), running, waiting), 1)
        return family
