"""The second tier of the KV cache: pages in host memory, for those that the device had to give up."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

STEP_TIME_WEIGHT = 0.2  # of the latest large step in the mean time a token


@dataclass(frozen=True, slots=True)
class PageCopies:
    """Whole pages to copy before a step: first all saves, then the copies one after the other, then all loads.

    So a page is saved before anything else takes its place, and copied before what is loaded does.
    """

    saves: Sequence[tuple[int, int]] = ()  # device page, host page
    copies: Sequence[tuple[int, int]] = ()  # device page, device page that is to be like it
    loads: Sequence[tuple[int, int]] = ()  # host page, device page

    def __bool__(self) -> bool:
        return bool(self.saves or self.copies or self.loads)


NO_COPIES = PageCopies()


class HostPool:
    """Host pages `0 .. num_pages - 1`, each known by the hash of its content. Mutable; owned by the `KVCacheManager`.

    The least recently used goes first. Pages that the plan in the making saves or loads stay until it is made
    (`release_held`): its saves run before its loads. Every operation takes constant time.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._pages: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._blank = list(range(num_pages - 1, -1, -1))
        self._held: set[int] = set()

    @property
    def num_in_use(self) -> int:
        return len(self._pages)

    def find(self, page_hash: bytes) -> int | None:
        """The host page with this content; None when there is none."""
        return self._pages.get(page_hash)

    def hold(self, page_hash: bytes) -> int:
        """The host page with this content, which `find` gave: now the most recently used, and held."""
        page = self._pages[page_hash]
        self._pages.move_to_end(page_hash)
        self._held.add(page)
        return page

    def add(self, page_hash: bytes) -> int | None:
        """A host page, held, for new content; None when every page is held."""
        assert page_hash not in self._pages, "the content is here already"
        if not self._blank:
            oldest = next(iter(self._pages), None)
            # Held pages are the most recently used: if the oldest is held, all are.
            if oldest is None or self._pages[oldest] in self._held:
                return None
            self._blank.append(self._pages.pop(oldest))
        page = self._pages[page_hash] = self._blank.pop()
        self._held.add(page)
        return page

    def release_held(self) -> None:
        """The plan is made: its pages may be given to others by the next one."""
        self._held.clear()

    def reset(self) -> None:
        """Forget all content."""
        self._blank += self._pages.values()
        self._pages.clear()


class LoadRule:
    """Whether pages come back from host memory or are computed again: whichever takes less time.

    A page's copy is timed once, when the engine starts; a token's computation is the running mean over large steps,
    whose time follows their tokens. Until one has run, pages are loaded. Mutable; owned by the `KVCacheManager`.
    """

    def __init__(self, seconds_per_page: float, *, page_size: int, large_step: int) -> None:
        """A copy of zero seconds is always cheaper; steps of `large_step` tokens and more tell a token's time."""
        self.seconds_per_page = seconds_per_page
        self.seconds_per_token: float | None = None
        self._page_size = page_size
        self._large_step = large_step

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take note of how long a step took."""
        if num_tokens < self._large_step:
            return
        latest = seconds / num_tokens
        if self.seconds_per_token is None:
            self.seconds_per_token = latest
        else:
            self.seconds_per_token += STEP_TIME_WEIGHT * (latest - self.seconds_per_token)

    @property
    def prefers_loading(self) -> bool:
        if self.seconds_per_token is None:
            return True
        return self.seconds_per_page <= self._page_size * self.seconds_per_token
