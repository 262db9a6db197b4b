"""How long steps of decodes take, with drafted tokens and without: what a step's drafts must pay for."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

WEIGHT = 1 / 16  # of the latest step in a running mean
NUM_FIRST = 4  # steps of a size that tell only by their minimum: the very first ones are slow
OUTLIER = 3.0  # times the mean: what a longer step counts as
# Of a mean, for each time that it kept drafts from being tried, so that they are tried again some day. A step that
# takes r times what would be worth it raises the mean by (r - 1) * WEIGHT, and 2000 * (r - 1) * WEIGHT doubts bring it
# down again: what such steps take too long is one step in 125, whatever r is.
DOUBT = 1 / 2000


@dataclass
class _Mean:
    """A running mean that a single slow step does not spoil. Mutable."""

    seconds: float
    count: int = 1

    def observe(self, seconds: float) -> None:
        if self.count < NUM_FIRST:
            self.seconds = min(self.seconds, seconds)
        else:
            self.seconds += WEIGHT * (min(seconds, OUTLIER * self.seconds) - self.seconds)
        self.count += 1


class StepTimes:
    """Running means of the time between one step's tokens and the next's, by the size the step is padded to.

    With drafts that includes what the host does meanwhile, since it waits for each of them. Mutable; owned by `Drafts`.
    """

    def __init__(self, plain_sizes: Sequence[int], drafted_sizes: Sequence[int]) -> None:
        """Sizes of step programs, in token rows, ascending."""
        self._sizes = {False: tuple(plain_sizes), True: tuple(drafted_sizes)}
        self._means: dict[tuple[bool, int, int], _Mean] = {}

    def observe(self, num_rows: int, seconds: float, *, drafted: bool, drafted_in_turn: int = 0) -> None:
        """Take note of a step of decodes. `drafted_in_turn` is how often the draft model ran for it."""
        key = self._key(num_rows, drafted, drafted_in_turn)
        if key in self._means:
            self._means[key].observe(seconds)
        else:
            self._means[key] = _Mean(seconds)

    def ratio(self, num_rows: int, num_plain_rows: int, drafted_in_turn: int = 0) -> float:
        """How much longer a step of so many rows with drafts takes than one without: infinitely until enough plain ones
        have been timed, and then 1 until those with drafts have been, which trying them does.
        """
        drafted = self._means.get(self._key(num_rows, True, drafted_in_turn))
        plain = self._means.get(self._key(num_plain_rows, False))
        if plain is None or plain.count < NUM_FIRST:
            return math.inf
        return drafted.seconds / plain.seconds if drafted is not None and drafted.count >= NUM_FIRST else 1.0

    def doubt(self, num_rows: int, drafted_in_turn: int = 0) -> None:
        """The time of such a step with drafts has kept them from being tried: it may be shorter by now."""
        mean = self._means.get(self._key(num_rows, True, drafted_in_turn))
        if mean is not None:
            mean.seconds *= 1 - DOUBT

    def _key(self, num_rows: int, drafted: bool, drafted_in_turn: int = 0) -> tuple[bool, int, int]:
        sizes = self._sizes[drafted]
        index = bisect_left(sizes, num_rows)
        return drafted, sizes[index] if index < len(sizes) else num_rows, drafted_in_turn
