"""Which pages each sequence holds: shared prefixes found, new pages given, filled pages made known, all given back."""

from collections.abc import Iterable

from jax_engine.block_pool import BlockPool
from jax_engine.request import Request


class KVCacheManager:
    """The pages of sequences, over one `BlockPool`. Mutable; owned by the `Scheduler`, which decides who gets them."""

    def __init__(self, num_pages: int, page_size: int, *, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_pages)
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_prefix_cache_queries = 0  # tokens
        self.num_prefix_cache_hits = 0
        self._filling: list[Request] = []  # those for which the latest plan fills a page

    def num_tokens_in_pages(self, running: Iterable[Request]) -> int:
        """Tokens whose keys and values the pages in use hold, those of shared pages once."""
        references = num_computed = 0
        for request in running:
            references += len(request.pages)
            num_computed += request.num_computed
        num_shared = (references - self.pool.num_in_use) * self.page_size  # shared pages are full
        return num_computed - num_shared

    def reset(self) -> bool:
        """Forget what free pages hold; False, and nothing is forgotten, while a request holds pages."""
        return self.pool.reset()

    def cached_prefix(self, request: Request) -> list[int]:
        """The longest run of known pages that a waiting request begins with; never its last token, whose logits the
        next one is drawn from. None of its tokens is on the device only: the steps it was in have been committed.
        """
        cached: list[int] = []
        if not self.enable_prefix_caching:
            return cached
        for index in range((len(request.tokens) - 1) // self.page_size):
            page = self.pool.find(request.page_hash(index, self.page_size))
            if page is None:
                break
            cached.append(page)
        return cached

    def can_start(self, cached: list[int], num_tokens: int, *, reserve: int) -> bool:
        """Whether a sequence of `num_tokens` that begins with these cached pages leaves `reserve` pages free."""
        return self._pages_for(num_tokens) - len(cached) + self.pool.num_idle(cached) + reserve <= self.pool.num_free

    def start(self, request: Request, cached: list[int]) -> None:
        """Give a request the cached pages it begins with; it goes on from their end."""
        assert not request.pages, "a request starts without pages"
        self.pool.share(cached)
        request.pages = list(cached)
        request.num_computed, request.num_registered = len(cached) * self.page_size, len(cached)

    def count_lookup(self, request: Request) -> None:
        """Count what a request that has just started, for the first time, found in the cache."""
        request.num_cached_tokens = request.num_computed
        if self.enable_prefix_caching:
            self.num_prefix_cache_queries += len(request.tokens)
            self.num_prefix_cache_hits += request.num_computed

    def room(self, request: Request) -> int:
        """How many more tokens a running request has pages for, its own and free ones."""
        return (len(request.pages) + self.pool.num_free) * self.page_size - request.num_computed

    def grow(self, request: Request, length: int) -> None:
        """Give a request the pages of its next `length` tokens and count those as computed; see `room`."""
        start = request.num_computed
        request.num_computed += length
        request.pages += self.pool.allocate(self._pages_for(request.num_computed) - len(request.pages))
        if self.enable_prefix_caching and start // self.page_size < request.num_computed // self.page_size:
            self._filling.append(request)

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

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
