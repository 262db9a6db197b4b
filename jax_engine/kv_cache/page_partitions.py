"""Which partition of the pool each page of a sequence comes from, where devices hold different pages.

Striped: page k of every sequence lies in partition k modulo their number, so that one sequence may fill all of them and
every device attends over its share of it. Owned: all pages of a sequence lie in one partition, its owner's, chosen when
it takes its first pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PAGE_RULES = ("striped", "owned")


@dataclass(frozen=True, slots=True)
class PagePartitions:
    """A pool in `count` partitions, and the rule by which sequences take pages from them.

    A page's index is its place in a block table, the same in all cache groups; `owner` is the partition of a sequence
    that has one, and of no matter where pages are striped.
    """

    count: int = 1
    striped: bool = False

    @property
    def owners(self) -> range:
        """Partitions that a sequence may choose between: all, or one that stands for all where pages are striped."""
        return range(1 if self.striped else self.count)

    def of(self, owner: int, index: int) -> int:
        """The partition of page `index`."""
        return index % self.count if self.striped else owner

    def split(self, owner: int, first: int, end: int) -> list[int]:
        """How many of the pages `first .. end - 1` lie in each partition."""
        if self.striped:
            return [max(0, end - self._next(first, number) + self.count - 1) // self.count for number in self._all]
        counts = [0] * self.count
        counts[owner] = end - first
        return counts

    def num_in_reach(self, owner: int, first: int, free: Sequence[int], each: int) -> int:
        """How many indices from `first` on there are pages for in a row, `each` for one, with so many free in each
        partition.
        """
        if self.striped:
            return min(self._next(first, number) - first + free[number] // each * self.count for number in self._all)
        return free[owner] // each

    @property
    def _all(self) -> range:
        return range(self.count)

    def _next(self, first: int, number: int) -> int:
        """The first index from `first` on that is a partition's."""
        return first + (number - first) % self.count


UNCUT = PagePartitions()
