"""Where front ends count: each in a row of numbers of its own, which all of them can read.

A front end answers `/metrics` for the whole server by adding the rows up. Nobody waits for anybody: a row has one
writer, and a reader sees each number whole (an aligned float64).
"""

import mmap
from collections.abc import Sequence

ROW_BYTES = 16384
ENGINE_BYTES = 4096  # for the histograms of each further engine


def row_bytes(engines: int) -> int:
    """The size of a front end's row before so many engines."""
    return ROW_BYTES + (engines - 1) * ENGINE_BYTES


class Cells:
    """Some numbers of every front end. Mutable: a front end writes `own`, which no other does."""

    def __init__(self, rows: "Sequence[memoryview[float]]", own: int) -> None:
        self.rows = rows
        self.own = rows[own]

    def total(self, index: int) -> float:
        """One number, all front ends together."""
        return sum(row[index] for row in self.rows)


class CellMemory:
    """Hands out `Cells`; every front end takes the same ones in the same order. Mutable; owned by its `Metrics`."""

    def __init__(self, memory: "mmap.mmap | bytearray", *, number: int, count: int, engines: int) -> None:
        numbers = memoryview(memory).cast("d")
        size = row_bytes(engines) // 8
        self._rows = [numbers[row * size : (row + 1) * size] for row in range(count)]
        self._number = number
        self._size = size
        self._taken = 0

    @classmethod
    def alone(cls, *, engines: int = 1) -> "CellMemory":
        """Of the only front end."""
        return cls(bytearray(row_bytes(engines)), number=0, count=1, engines=engines)

    @classmethod
    def shared(cls, file: int, *, number: int, count: int, engines: int = 1) -> "CellMemory":
        """Of front end `number`, in an open file of `count` rows of zero bytes."""
        return cls(mmap.mmap(file, count * row_bytes(engines)), number=number, count=count, engines=engines)

    @property
    def is_first(self) -> bool:
        """Whether it is the first front end's: what one of them does for all is its to do."""
        return self._number == 0

    def take(self, size: int) -> Cells:
        """The next `size` numbers, which are zero at first."""
        start, self._taken = self._taken, self._taken + size
        assert self._taken <= self._size, "ROW_BYTES or ENGINE_BYTES is too small"
        return Cells([row[start : self._taken] for row in self._rows], self._number)
