"""The pages of the KV cache, as the host accounts for them: who uses them, and what those that nobody uses still hold.

Prefix caching by pages, after vLLM (Kwon et al., SOSP 2023) and its automatic prefix caching: a full page is known by
the hash of its tokens and of all before them, and keeps its content after its last user until it is needed for another.
So does, until then, a page that is a sequence's tail, if others are to go on from there.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jax_engine.core.engine_view import PageCounts


@dataclass(slots=True)
class _Partition:
    """The free pages of one partition, and what its pages hold. Mutable; owned by the `BlockPool`."""

    blank: list[int]  # a stack: a page freed last is the likeliest to be in a cache nearby
    known: dict[bytes, int] = field(default_factory=dict)  # hash -> the used or idle page that holds this content
    idle: OrderedDict[int, None] = field(default_factory=OrderedDict)  # least recently used first
    idle_tails: OrderedDict[int, None] = field(default_factory=OrderedDict)  # those that are not full, likewise

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.idle) + len(self.idle_tails)


class BlockPool:
    """Pages `0 .. num_pages - 1` with reference counts. Mutable; owned by the `Scheduler`.

    A page is used (its count is above zero), idle (free, but its content is still known by a hash) or blank (free).
    Every operation takes constant time a page.

    The pool may be cut into partitions of equally many pages, one after another, such as the devices that hold them:
    whoever takes a page, or looks for content, says in which.
    """

    def __init__(
        self, num_pages: int, num_partitions: int = 1, *, on_evict: Callable[[int, bytes], None] | None = None
    ) -> None:
        """`on_evict` is told of each idle page that is taken, and its hash, before anything writes it."""
        assert num_pages % num_partitions == 0, "partitions are of one size"
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._counts = [0] * num_pages
        self._hashes: list[bytes | None] = [None] * num_pages
        self._tails: set[int] = set()  # known pages that are not full
        self._size = size = num_pages // num_partitions
        self._partitions = [
            _Partition(list(range((number + 1) * size - 1, number * size - 1, -1))) for number in range(num_partitions)
        ]

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can hand out, of all partitions; idle ones count."""
        return sum(partition.num_free for partition in self._partitions)

    def num_free_in(self, partition: int) -> int:
        """Those of one partition."""
        return self._partitions[partition].num_free

    def free_in_each(self) -> list[int]:
        """Those of every partition."""
        return [partition.num_free for partition in self._partitions]

    def partition_of(self, page: int) -> int:
        return page // self._size

    @property
    def num_in_use(self) -> int:
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Free pages whose content is still known."""
        return sum(len(partition.idle) + len(partition.idle_tails) for partition in self._partitions)

    def count_states(self, pages: slice) -> PageCounts:
        """How many of these pages have one user, several, none but known content, and neither."""
        own = shared = cached = blank = 0
        for count, page_hash in zip(self._counts[pages], self._hashes[pages], strict=True):
            if count == 1:
                own += 1
            elif count:
                shared += 1
            elif page_hash is not None:
                cached += 1
            else:
                blank += 1
        return own, shared, cached, blank

    def allocate(self, count: int, partition: int = 0) -> list[int]:
        """Take `count` pages of unknown content: blank ones first, then idle ones, which forget what they held, tails
        before full ones.

        The caller has checked `num_free_in`.
        """
        own = self._partitions[partition]
        assert 0 <= count <= own.num_free, f"{count} pages asked for, {own.num_free} free"
        taken = [own.blank.pop() if own.blank else self._take_idle(own) for _ in range(count)]
        for page in taken:
            self._counts[page] = 1
        return taken

    def find(self, page_hash: bytes, partition: int = 0) -> int | None:
        """The partition's page with this content, used or idle; None when there is none."""
        return self._partitions[partition].known.get(page_hash)

    def idle(self, pages: Sequence[int]) -> list[int]:
        """Those of these pages that `num_free` counts: sharing them takes them away."""
        return [page for page in pages if self._counts[page] == 0]

    def num_unshared(self, pages: Sequence[int]) -> int:
        """How many of a sequence's pages have it for their only user.

        Takes O(log pages): whoever uses a page uses what comes before it, so that shared pages come first (nearly
        always: pages of equal content may be there twice).
        """
        return len(pages) - bisect_left(pages, True, key=lambda page: self._counts[page] == 1)

    def num_users(self, page: int) -> int:
        return self._counts[page]

    def share(self, pages: Sequence[int]) -> None:
        """Add one user to each of these pages, used or idle; who writes one has to copy it first (`is_writable`)."""
        for page in pages:
            if self._counts[page] == 0:
                del self._idle_of(page)[page]
            self._counts[page] += 1

    def is_writable(self, page: int) -> bool:
        """Whether a used page has one user and is not known by its content, so that its user may write it."""
        return self._counts[page] == 1 and self._hashes[page] is None

    def register(self, page: int, page_hash: bytes, *, is_tail: bool = False) -> None:
        """Let a used page be found by its content. Of a partition's pages with equal content, the first one stays the
        one found.

        A tail, which is not full, is of use for a short time only.
        """
        assert self._counts[page] > 0, f"page {page} is registered and nobody uses it"
        known = self._partitions[page // self._size].known
        if page_hash not in known and self._hashes[page] is None:
            known[page_hash] = page
            self._hashes[page] = page_hash
            if is_tail:
                self._tails.add(page)

    def free(self, pages: Sequence[int]) -> None:
        """Take one user from each page of a sequence; its tail is evicted before its head, which others may have."""
        for page in reversed(pages):
            assert self._counts[page] > 0, "a page was freed twice"
            self._counts[page] -= 1
            if self._counts[page] == 0:
                if self._hashes[page] is None:
                    self._partitions[page // self._size].blank.append(page)
                else:
                    self._idle_of(page)[page] = None

    def reset(self) -> bool:
        """Forget all content; False, and nothing is forgotten, while a page is in use."""
        if self.num_in_use:
            return False
        for partition in self._partitions:
            for idle in (partition.idle, partition.idle_tails):
                while idle:
                    page, _ = idle.popitem()
                    self._forget(page)
                    partition.blank.append(page)
        return True

    def _idle_of(self, page: int) -> OrderedDict[int, None]:
        partition = self._partitions[page // self._size]
        return partition.idle_tails if page in self._tails else partition.idle

    def _take_idle(self, partition: _Partition) -> int:
        is_tail = bool(partition.idle_tails)
        page, _ = (partition.idle_tails if is_tail else partition.idle).popitem(last=False)
        page_hash = self._forget(page)
        if self._on_evict is not None and not is_tail:
            self._on_evict(page, page_hash)
        return page

    def _forget(self, page: int) -> bytes:
        page_hash = self._hashes[page]
        assert page_hash is not None
        del self._partitions[page // self._size].known[page_hash]
        self._hashes[page] = None
        self._tails.discard(page)
        return page_hash
