"""A Prometheus histogram that is cheap enough for every token: one bisection, no lock."""

from bisect import bisect_left
from collections.abc import Sequence

from jax_engine.server.metrics.cells import CellMemory


class Histogram:
    """Counts of observations by upper bound. Mutable; owned by `Metrics` and touched by the event loop alone.

    It reports the observations of all front ends; see `cells.py`.
    """

    def __init__(self, bounds: Sequence[float], memory: CellMemory) -> None:
        assert list(bounds) == sorted(set(bounds)), bounds
        self.bounds = tuple(bounds)
        self._cells = memory.take(len(self.bounds) + 2)  # counts, that above all bounds, the sum of the values
        self._own = self._cells.own

    def observe(self, value: float, times: int = 1) -> None:
        """Count `times` observations of `value`; a value on a bound belongs to that bound's bucket."""
        self._own[bisect_left(self.bounds, value)] += times
        self._own[-1] += value * times

    @property
    def total(self) -> float:
        """The sum of all values."""
        return self._cells.total(-1)

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound as Prometheus writes it, observations up to it), ending with +Inf."""
        pairs, seen = [], 0
        for index, bound in enumerate((*map(float, self.bounds), float("inf"))):
            seen += int(self._cells.total(index))
            pairs.append(("+Inf" if bound == float("inf") else repr(bound), seen))
        return pairs


def one_two_five(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to and including `limit`: vLLM's bounds for token counts."""
    bounds: list[int] = []
    scale = 1
    while scale <= limit:
        bounds += [mantissa * scale for mantissa in (1, 2, 5) if mantissa * scale <= limit]
        scale *= 10
    return bounds
