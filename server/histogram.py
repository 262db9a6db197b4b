"""A Prometheus histogram that is cheap enough for every token: one bisection, no lock."""

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts of observations by upper bound. Mutable; owned by `Metrics` and touched by the event loop alone."""

    def __init__(self, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(set(bounds)), bounds
        self.bounds = tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `times` observations of `value`; a value on a bound belongs to that bound's bucket."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound as Prometheus writes it, observations up to it), ending with +Inf."""
        pairs, seen = [], 0
        for bound, count in zip((*map(float, self.bounds), float("inf")), self._counts, strict=True):
            seen += count
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
