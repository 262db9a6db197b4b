"""Which pages each sequence holds: shared ones found, new ones given, filled ones made known, all given back.

Below the device's pages there may be host memory: a page that loses its place while its content is known moves there,
and comes back when a request begins with it. Eviction and preemption need nothing else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from jax_engine.block_pool import BlockPool
from jax_engine.host_pool import HostPool, LoadRule, PageCopies
from jax_engine.request import Request

IN_HOST = -2  # in place of a page that has to come from host memory


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """What a waiting request finds computed: its first `num_tokens` tokens, in the pages of its block table's start."""

    num_tokens: int = 0
    pages: Sequence[int] = ()  # or IN_HOST

    @property
    def on_device(self) -> list[int]:
        return [page for page in self.pages if page >= 0]


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


class KVCacheManager:
    """The pages of sequences, over one `BlockPool`. Mutable; owned by the `Scheduler`, which decides who gets them."""

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        enable_prefix_caching: bool,
        num_host_pages: int = 0,
        load_rule: LoadRule | None = None,
    ) -> None:
        """`num_host_pages` is the size of the host tier, which is found by the same hashes and needs prefix caching."""
        assert enable_prefix_caching or not num_host_pages, "host pages are found by their prefix"
        self.pool = BlockPool(num_pages, on_evict=self._save if num_host_pages else None)
        self.host = HostPool(num_host_pages)
        self.load_rule = load_rule or LoadRule(0.0, page_size=page_size, large_step=1)
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.counters = CacheCounters()
        self._planned = PlannedCopies()
        self._filling: list[Request] = []  # those for which the latest plan fills a page

    def num_tokens_in_pages(self, running: Iterable[Request]) -> int:
        """Tokens whose keys and values the pages in use hold, those of shared pages once.

        All pages but a sequence's last are full.
        """
        filled: dict[int, int] = {}  # of the last pages
        for request in running:
            if request.pages:
                in_last = request.num_computed - (len(request.pages) - 1) * self.page_size
                filled[request.pages[-1]] = max(in_last, filled.get(request.pages[-1], 0))
        return (self.pool.num_in_use - len(filled)) * self.page_size + sum(filled.values())

    def sample_waste(self, running: Iterable[Request]) -> None:
        """Add the waste of the pages in use to the counters, for its mean over time."""
        room = self.pool.num_in_use * self.page_size
        self.counters.sampled_room += room
        self.counters.sampled_waste += room - self.num_tokens_in_pages(running)

    def reset(self) -> bool:
        """Forget what free pages and host memory hold; False, and nothing is forgotten, while a request holds pages."""
        if not self.pool.reset():
            return False
        self.host.reset()
        return True

    def take_copies(self) -> PageCopies:
        """What has to be copied before the step that has just been planned; the next plan begins without."""
        planned, self._planned = self._planned, PlannedCopies()
        self.host.release_held()
        self.counters.saved_pages += len(planned.saves)
        self.counters.loaded_pages += len(planned.loads)
        self.counters.copied_pages += len(planned.copies)
        return PageCopies(planned.saves, planned.copies, planned.loads)

    def cached_prefix(self, request: Request, donor: Request | None = None) -> CachedPrefix:
        """The longest computed beginning of a waiting request; never its last token, whose logits the next one is drawn
        from. None of its tokens is on the device only: the steps it was in have been committed.

        `donor` is a running request that earlier steps have taken through the same prompt: all of it is shared, the
        page that it ends in as well, to be copied when it is written. Without one, known pages are looked for.
        """
        if donor is not None:
            num_tokens = min(request.num_prompt, len(request.tokens) - 1)
            return CachedPrefix(num_tokens, donor.pages[: self._pages_for(num_tokens)])
        if not self.enable_prefix_caching:
            return CachedPrefix()
        pages: list[int] = []
        for index in range((len(request.tokens) - 1) // self.page_size):
            page = self._find(request.page_hash(index, self.page_size))
            if page is None:
                break
            pages.append(page)
        return CachedPrefix(len(pages) * self.page_size, pages)

    def can_start(self, cached: CachedPrefix, num_tokens: int, *, reserve: int) -> bool:
        """Whether a sequence of `num_tokens`, more than are cached, leaves `reserve` pages free."""
        on_device = cached.on_device
        num_new = self._pages_for(num_tokens) - len(on_device)
        num_new += cached.num_tokens % self.page_size != 0  # the copy of a shared page that is written next
        return num_new + self.pool.num_idle(on_device) + reserve <= self.pool.num_free

    def start(self, request: Request, cached: CachedPrefix) -> None:
        """Give a request the pages it begins with; it goes on from their end."""
        assert not request.pages, "a request starts without pages"
        self.pool.share(cached.on_device)
        request.pages = list(cached.pages)
        if IN_HOST in cached.pages:
            self._load(request)
        request.num_computed, request.num_registered = cached.num_tokens, cached.num_tokens // self.page_size

    def fork(self, parent: Request, child: Request) -> None:
        """Give `child`, which has the tokens that `parent` has, its pages too; each copies the page that it is the
        first to write, while the other has it.
        """
        assert not child.pages, "a request is forked into one without pages"
        self.pool.share(parent.pages)
        child.pages = list(parent.pages)
        child.num_computed, child.num_registered = parent.num_computed, parent.num_registered

    def count_lookup(self, request: Request, cached: CachedPrefix) -> None:
        """Count what a request that has just started, for the first time, found in the cache."""
        request.num_cached_tokens = cached.num_tokens
        if self.enable_prefix_caching:
            in_host = cached.pages.count(IN_HOST) * self.page_size
            self.counters.queries += len(request.tokens)
            self.counters.hits += cached.num_tokens - in_host
            if self.host.num_pages:
                self.counters.host_queries += len(request.tokens) - (cached.num_tokens - in_host)
                self.counters.host_hits += in_host

    def num_new_pages(self, request: Request, length: int) -> int:
        """Pages that a request's next `length` tokens take beside those it has, with the copy of one that is shared."""
        num_copies = self._shared_last_page(request) is not None
        return self._pages_for(request.num_computed + length) - len(request.pages) + num_copies

    def room(self, request: Request) -> int:
        """How many more tokens a running request has pages for, its own and free ones."""
        num_pages = len(request.pages) + self.pool.num_free
        if self._shared_last_page(request) is not None:
            num_pages -= 1  # the copy takes one, and the page that it replaces is no longer its own
        return max(0, num_pages * self.page_size - request.num_computed)

    def grow(self, request: Request, length: int) -> int:
        """Give a request the pages of its next `length` tokens and count those as computed; see `room`.

        Returns the index of the first page that is new in its block table: a shared one that it is about to write is
        replaced by a copy.
        """
        first_new = len(request.pages)
        if (shared := self._shared_last_page(request)) is not None:
            first_new = shared
            (copy,) = self.pool.allocate(1)
            self._planned.copies.append((request.pages[shared], copy))
            self.pool.free([request.pages[shared]])
            request.pages[shared] = copy
        start = request.num_computed
        request.num_computed += length
        self.counters.recomputed_tokens += max(0, min(request.num_computed, request.num_once_computed) - start)
        request.num_once_computed = max(request.num_computed, request.num_once_computed)
        request.pages += self.pool.allocate(self._pages_for(request.num_computed) - len(request.pages))
        if self.enable_prefix_caching and start // self.page_size < request.num_computed // self.page_size:
            self._filling.append(request)
        return first_new

    def register_filled(self) -> None:
        """Let the pages that the plan before this one fills be found.

        That plan has been launched, and steps run in order: whatever a later step reads of them is there by then. In
        its own step a page is not shared, since rows of one step do not wait for each other.
        """
        for request in self._filling:
            self._register(request)
        self._filling.clear()

    def release(self, request: Request) -> None:
        """Take a request's pages; its full ones can still be found. Steps in flight may still write them: they run
        before any later step does.
        """
        if self.enable_prefix_caching:
            self._register(request)
        self.pool.free(request.pages)
        request.pages = []

    def num_own_pages(self, request: Request) -> int:
        """How many pages are free once a running request has given way: those that no other uses."""
        return self.pool.num_unshared(request.pages)

    def cost_of_preemption(self, request: Request) -> int:
        """Tokens to compute again when a request that gives way returns. Pages shared with others will still be there;
        its own are counted as lost, since they are what it gives way for.
        """
        return request.num_computed - (len(request.pages) - self.num_own_pages(request)) * self.page_size

    def _register(self, request: Request) -> None:
        """Register a running request's full pages, as far as the launched steps fill them and the host knows their
        tokens.
        """
        num_full = min(request.num_computed, len(request.tokens)) // self.page_size
        for index in range(request.num_registered, min(num_full, len(request.pages))):
            self.pool.register(request.pages[index], request.page_hash(index, self.page_size))
            request.num_registered = index + 1

    def _find(self, page_hash: bytes) -> int | None:
        """The page with this content, or `IN_HOST`; None when there is none, or computing it is faster."""
        page = self.pool.find(page_hash)
        if page is None and self.host.find(page_hash) is not None and self.load_rule.prefers_loading:
            return IN_HOST
        return page

    def _load(self, request: Request) -> None:
        """Plan to load the pages of a starting request that are in host memory."""
        missing = [index for index, page in enumerate(request.pages) if page == IN_HOST]
        hashes = [request.page_hash(index, self.page_size) for index in missing]
        # Held before pages are taken for them, whose content may go to host memory in turn.
        host_pages = [self.host.hold(page_hash) for page_hash in hashes]
        pages = self.pool.allocate(len(missing))
        for index, page_hash, page in zip(missing, hashes, pages, strict=True):
            request.pages[index] = page
            self.pool.register(page, page_hash)  # at once: loads run before the step
        self._planned.loads += zip(host_pages, pages, strict=True)

    def _save(self, page: int, page_hash: bytes) -> None:
        """Plan to keep in host memory what an idle page holds, unless it is there already or there is no room."""
        if self.host.find(page_hash) is not None:
            self.host.hold(page_hash)
        elif (host_page := self.host.add(page_hash)) is not None:
            self._planned.saves.append((page, host_page))

    def _shared_last_page(self, request: Request) -> int | None:
        """Index of the page that a request's next token is written to, if others use it or know it by its content."""
        index, offset = divmod(request.num_computed, self.page_size)
        if offset == 0 or self.pool.is_writable(request.pages[index]):
            return None
        return index

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
