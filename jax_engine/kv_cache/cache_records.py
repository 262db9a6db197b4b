"""What the manager of the KV cache finds, plans and counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NO_PAGE = -1  # in place of a page that a window has passed
IN_HOST = -2  # in place of a page that has to come from host memory


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What a waiting request finds computed: its first `num_tokens` tokens, in the pages of its block tables' start."""

    num_tokens: int = 0
    pages: Sequence[int] = ()  # or NO_PAGE, IN_HOST
    owner: int = 0  # the partition that it is to have its pages in, see `PagePartitions`

    @property
    def on_device(self) -> list[int]:
        return [page for page in self.pages if page >= 0]


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """Which cache groups there are, and what their layers see."""

    number: int
    suffixes: Sequence[bytes]  # what tells equal content in two groups apart
    full: Sequence[int]  # groups without a window
    by_window: Mapping[int, Sequence[int]]  # the others

    @classmethod
    def of(cls, windows: Sequence[int]) -> "CacheGroups":
        """Groups with these windows, in tokens; 0: none."""
        groups = list(enumerate(windows))
        return cls(
            len(windows),
            [group.to_bytes(group > 0) for group, _ in groups],
            [group for group, window in groups if not window],
            {window: [group for group, other in groups if other == window] for window in {*windows} - {0}},
        )


@dataclass(slots=True)
class CacheCounters:
    """Cumulative figures. Mutable; owned by the `KVCacheManager`."""

    queries: int = 0  # tokens of requests as they first ran
    hits: int = 0  # those of them in the device's pages
    host_queries: int = 0  # those that the device's pages did not hold, with a host tier
    host_hits: int = 0
    saved_pages: int = 0
    loaded_pages: int = 0
    copied_pages: int = 0
    recomputed_tokens: int = 0  # computed before, by a request that has lost its pages since
    sampled_room: int = 0  # tokens that the pages in use have room for, summed over samples
    sampled_waste: int = 0  # and of that, what holds none


@dataclass(slots=True)
class PlannedCopies:
    """The copies that the plan in the making needs, see `PageCopies`. Mutable; owned by the `KVCacheManager`."""

    saves: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)


def first_seen(position: int, window: int) -> int:
    """The first token that the one at `position` sees through a window."""
    return max(0, position - window + 1)


def held(pages: list[int]) -> list[int]:
    """Those of a request's pages that there are."""
    return [page for page in pages if page != NO_PAGE] if NO_PAGE in pages else pages
