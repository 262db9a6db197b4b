"""Which pages each sequence holds: shared ones found, new ones given, filled ones made known, those that a window has
passed given up, all given back.

Layers that see equally far form cache groups (`models.kv_pages.CacheLayout`), each with a block table of its own. All
groups' pages come from one pool. A request's pages are one list, in which groups take turns: page `index` of group
`group` stands at the place `index * num_groups + group`, and `NO_PAGE` where the window has passed it.

Where devices hold different pages, the pool has as many partitions, and a rule says which of them each page of a
sequence comes from (`PagePartitions`).

Below the device's pages there may be host memory: a page that loses its place while its content is known moves there,
and comes back when a request begins with it. Eviction and preemption need nothing else.
"""

from collections.abc import Iterable, Sequence
from operator import add

from jax_engine.kv_cache.block_pool import BlockPool
from jax_engine.kv_cache.cache_records import (
    IN_HOST,
    NO_PAGE,
    CacheCounters,
    CachedPrefix,
    CacheGroups,
    PlannedCopies,
    first_seen,
    held,
)
from jax_engine.kv_cache.host_pool import HostPool, LoadRule, PageCopies
from jax_engine.kv_cache.page_partitions import UNCUT, PagePartitions
from jax_engine.kv_cache.page_waste import num_tokens_in_pages
from jax_engine.kv_cache.prefix_finder import PrefixFinder
from jax_engine.kv_cache.tail_pages import keep_tail
from jax_engine.scheduling.request import Request
from jax_engine.scheduling.step_plan import Chunk


class KVCacheManager:
    """The pages of sequences, over one `BlockPool`. Mutable; owned by the `Scheduler`, which decides who gets them.

    A group with a window needs, of a sequence whose next step begins at token t, pages from the token `t - window + 1`
    on. Full pages that are given up for that can be found as others can.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        windows: Sequence[int] = (0,),
        *,
        enable_prefix_caching: bool,
        num_host_pages: int = 0,
        load_rule: LoadRule | None = None,
        partitions: PagePartitions = UNCUT,
    ) -> None:
        """`windows` are those of the cache groups, in tokens; 0: none. `num_host_pages` is the size of the host tier,
        which is found by the same hashes and needs prefix caching.
        """
        assert enable_prefix_caching or not num_host_pages, "host pages are found by their prefix"
        self.partitions = partitions
        self.pool = BlockPool(num_pages, self.partitions.count, on_evict=self._save if num_host_pages else None)
        self.host = HostPool(num_host_pages)
        self.load_rule = load_rule or LoadRule(0.0, page_size=page_size, large_step=1)
        self.page_size = page_size
        self.enable_prefix_caching = enable_prefix_caching
        self.counters = CacheCounters()
        self._planned = PlannedCopies()
        self._filling: list[Request] = []  # those for which the latest plan fills a page
        self._advanced: list[Request] = []  # with windows: those that the latest plan has tokens of
        self.groups = groups = CacheGroups.of(windows)
        self.num_groups = len(windows)
        self._suffixes, self._window_groups = groups.suffixes, groups.by_window
        # A window passes a page once the tokens computed are as many as this beyond full pages.
        self._passing = {(window - 1) % page_size for window in groups.by_window}
        self._finder = PrefixFinder(self.pool, groups, self.partitions, page_size)

    def num_tokens_in_pages(self, running: Iterable[Request]) -> int:
        """Tokens whose keys and values the pages in use hold for a step to come (`page_waste`)."""
        return num_tokens_in_pages(running, self.pool, self.groups, self.page_size)

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

    def cached_prefixes(self, request: Request, donor: Request | None = None) -> list[CachedPrefix]:
        """What a waiting request finds computed with each owner that it may have, the longest first, and of equals the
        one with most free pages.
        """
        found = [self.cached_prefix(request, donor, owner) for owner in self.partitions.owners]
        if len(found) > 1:
            found.sort(key=lambda cached: (-cached.num_tokens, -self.pool.num_free_in(cached.owner)))
        return found

    def cached_prefix(self, request: Request, donor: Request | None = None, owner: int = 0) -> CachedPrefix:
        """The longest computed beginning of a waiting request; never its last token, whose logits the next one is drawn
        from. None of its tokens is on the device only: the steps it was in have been committed.

        `donor` is a running request that earlier steps have taken through the same prompt: all of it is shared, the
        page that it ends in as well, to be copied when it is written. Without one, or if its windows have passed the
        prompt's end, known pages are looked for. `owner` is the partition that the request is to have its pages in.

        A request that is to learn the log-probabilities of its prompt computes all of it.
        """
        if request.needs_whole_prompt:
            return CachedPrefix(owner=owner)
        if donor is not None and (shared := self._finder.share_prompt(donor, request, owner)) is not None:
            return shared
        if not self.enable_prefix_caching:
            return CachedPrefix(owner=owner)
        # What is faster to compute than to load is as good as gone.
        return self._finder.find_known(request, owner, host=self.host if self.load_rule.prefers_loading else None)

    def can_start(
        self, cached: CachedPrefix, num_tokens: int, *, reserve: int, without: Sequence[Request] = ()
    ) -> bool:
        """Whether a sequence of `num_tokens`, more than are cached, leaves `reserve` pages of each partition that it
        takes any of free; once the running requests `without` have given way.
        """
        owner, rows = cached.owner, len(cached.pages) // self.num_groups
        needed = self.partitions.split(owner, rows, -(-num_tokens // self.page_size))
        needed = [self.num_groups * count for count in needed]
        if cached.num_tokens % self.page_size:  # the copies of shared pages that are written next
            needed[self.partitions.of(owner, rows - 1)] += self.num_groups
        if IN_HOST in cached.pages:
            for place, page in enumerate(cached.pages):
                needed[self.partitions.of(owner, place // self.num_groups)] += page == IN_HOST
        for page in self.pool.idle(cached.on_device):
            needed[self.pool.partition_of(page)] += 1
        free = self.pool.free_in_each()
        for other in without:
            free = list(map(add, free, self.own_pages(other)))
        return all(not count or count + reserve <= room for count, room in zip(needed, free, strict=True))

    def start(self, request: Request, cached: CachedPrefix) -> None:
        """Give a request the pages it begins with; it goes on from their end."""
        assert not request.pages, "a request starts without pages"
        self.pool.share(cached.on_device)
        request.pages, request.owner = list(cached.pages), cached.owner
        if IN_HOST in cached.pages:
            self._load(request)
        request.num_computed, request.num_registered = cached.num_tokens, cached.num_tokens // self.page_size
        request.num_outside = {window: first_seen(cached.num_tokens, window) for window in self._window_groups}

    def count_lookup(self, request: Request, cached: CachedPrefix) -> None:
        """Count what a request that has just started, for the first time, found in the cache."""
        request.num_cached_tokens = cached.num_tokens
        if self.enable_prefix_caching:
            indices = {place // self.num_groups for place, page in enumerate(cached.pages) if page == IN_HOST}
            in_host = len(indices) * self.page_size
            self.counters.queries += len(request.tokens)
            self.counters.hits += cached.num_tokens - in_host
            if self.host.num_pages:
                self.counters.host_queries += len(request.tokens) - (cached.num_tokens - in_host)
                self.counters.host_hits += in_host

    def have_room(self, requests: Iterable[Request], lengths: Iterable[int]) -> bool:
        """Whether free pages suffice for the next tokens of running requests, so many of each, all together."""
        needed = [0] * self.partitions.count
        for request, length in zip(requests, lengths, strict=True):
            first, end = len(request.pages) // self.num_groups, -(-(request.num_computed + length) // self.page_size)
            for number, count in enumerate(self.partitions.split(request.owner, first, end) if end > first else ()):
                needed[number] += self.num_groups * count
            if num_copies := len(self._shared_places(request)):
                needed[self.next_partition(request)] += num_copies
        return all(count <= self.pool.num_free_in(number) for number, count in enumerate(needed))

    def room(self, request: Request) -> int:
        """How many more tokens a running request has pages for, its own and free ones."""
        num_rows = len(request.pages) // self.num_groups
        free = self.pool.free_in_each()
        if num_copies := len(self._shared_places(request)):  # which replace those that are shared
            written = self.next_partition(request)
            free[written] -= num_copies
            if free[written] < 0:
                return 0
        num_rows += self.partitions.num_in_reach(request.owner, num_rows, free, self.num_groups)
        return num_rows * self.page_size - request.num_computed

    def next_partition(self, request: Request) -> int:
        """The partition of the page that a running request's next token is written to."""
        return self.partitions.of(request.owner, request.num_computed // self.page_size)

    def holds_in(self, request: Request, partition: int) -> bool:
        """Whether a running request has a page, its own or shared, in a partition."""
        if not self.partitions.striped:
            return request.owner == partition
        return self.partitions.count == 1 or any(
            self.pool.partition_of(page) == partition for page in held(request.pages)
        )

    def grow(self, request: Request, length: int) -> int:
        """Give a request the pages of its next `length` tokens and count those as computed; see `room`.

        Returns the place of the first page that is new in its block tables: shared ones that it is about to write are
        replaced by copies.
        """
        first_new = len(request.pages)
        if shared := self._shared_places(request):
            first_new = shared[0]
            copies = self.pool.allocate(len(shared), self.next_partition(request))
            for place, copy in zip(shared, copies, strict=True):
                self._planned.copies.append((request.pages[place], copy))
                self.pool.free([request.pages[place]])
                request.pages[place] = copy
        start = request.num_computed
        end = request.num_computed = start + length
        if request.num_once_computed > start:
            self.counters.recomputed_tokens += min(end, request.num_once_computed) - start
        request.num_once_computed = max(end, request.num_once_computed)
        if num_missing := self._pages_for(end) - len(request.pages):
            self._take(request, num_missing)
        if self.enable_prefix_caching and start // self.page_size < end // self.page_size:
            self._filling.append(request)
        if self._window_groups:
            self._advanced.append(request)
        request.num_own = len(request.pages) // self.num_groups * self.page_size
        return first_new

    def next_token(self, request: Request) -> Chunk | None:
        """The range of a running request's next drawn token, if that goes into a page that the request has grown into:
        nearly every step of every sequence, for which `room` and `grow` would find nothing to do. None otherwise.

        Such a page stays its own to write: who starts with a share of it grows in the same plan, into a copy.
        """
        start = request.num_computed
        known = len(request.tokens) + request.num_pending
        if (
            start >= request.num_own
            or known != start + 1
            or known >= request.length_limit
            or start < request.num_once_computed
            or start < request.num_prompt
            or request.waits_for_mask
        ):
            return None
        request.num_computed = request.num_once_computed = end = start + 1
        request.num_pending += 1
        if end % self.page_size == 0 and self.enable_prefix_caching:
            self._filling.append(request)
        if end % self.page_size in self._passing:
            self._advanced.append(request)
        return Chunk(request, request.slot, start, 1, 1, len(request.pages), [])

    def roll_back(self, request: Request, num_tokens: int) -> None:
        """Take what a running request has computed behind its first `num_tokens` tokens, in no step in flight, back."""
        request.num_computed = request.num_once_computed = num_tokens
        self.pool.free(request.pages[self._pages_for(num_tokens) :])
        del request.pages[self._pages_for(num_tokens) :]
        request.num_own = 0

    def settle(self) -> None:
        """Before a plan is made: let the pages that the plan before it fills be found, and give up those that it was
        the last to see.

        That plan has been launched, and steps run in order: whatever a later step reads of filled pages is there by
        then, and what it writes into pages given up comes after all who read them. In its own step a page is not
        shared, since rows of one step do not wait for each other.
        """
        for request in self._filling:
            self._register(request)
        self._filling.clear()
        for request in self._advanced:
            self._give_up(request)
        # The rest of what they passed, once the tokens on their way are known.
        self._advanced = [request for request in self._advanced if len(request.tokens) < request.num_computed]

    def release(self, request: Request) -> None:
        """Take a request's pages; its full ones can still be found. Steps in flight may still write them: they run
        before any later step does.
        """
        if self.enable_prefix_caching:
            self._register(request)
            keep_tail(self.pool, request, self.page_size, self._suffixes)
        self.pool.free(held(request.pages))
        request.pages, request.num_own = [], 0
        request.num_outside = {}

    def own_pages(self, request: Request) -> list[int]:
        """How many pages of each partition are free once a running request has given way: those that no other uses."""
        own = [0] * self.partitions.count
        for group in self.groups.full:
            table = self.table(request, group)
            first = len(table) - self.pool.num_unshared(table)
            for number, count in enumerate(self.partitions.split(request.owner, first, len(table))):
                own[number] += count
        for window, groups in self._window_groups.items():
            for group in groups:  # others may share any part of what a window sees
                for page in self.table(request, group, window):
                    own[self.pool.partition_of(page)] += self.pool.num_users(page) == 1
        return own

    def table(self, request: Request, group: int, window: int = 0) -> list[int]:
        """The pages that a running request holds in a group."""
        if self.num_groups == 1 and not window:
            return request.pages
        first = request.num_outside[window] // self.page_size if window else 0
        return request.pages[first * self.num_groups + group :: self.num_groups]

    def _give_up(self, request: Request) -> None:
        """Free the pages that no later token of a running request sees, once they can be found. Tokens that the host
        does not know are taken for not computed.
        """
        if not request.pages:
            return
        if self.enable_prefix_caching:
            self._register(request)
        computed = min(request.num_computed, len(request.tokens))
        for window, groups in self._window_groups.items():
            first = first_seen(computed, window)
            before = request.num_outside[window] // self.page_size
            request.num_outside[window] = first
            number = first // self.page_size - before
            for group in groups if number else ():
                start = before * self.num_groups + group
                passed = slice(start, start + number * self.num_groups, self.num_groups)
                self.pool.free(request.pages[passed])
                request.pages[passed] = [NO_PAGE] * number

    def _register(self, request: Request) -> None:
        """Register a running request's full pages, as far as the launched steps fill them and the host knows their
        tokens.
        """
        num_full = min(request.num_computed, len(request.tokens)) // self.page_size
        for index in range(request.num_registered, min(num_full, len(request.pages) // self.num_groups)):
            page_hash = request.page_hash(index, self.page_size)
            for group, suffix in enumerate(self._suffixes):
                self.pool.register(request.pages[index * self.num_groups + group], page_hash + suffix)
            request.num_registered = index + 1

    def _load(self, request: Request) -> None:
        """Plan to load the pages of a starting request that are in host memory."""
        missing = [place for place, page in enumerate(request.pages) if page == IN_HOST]
        hashes = [self._known_by(request, place) for place in missing]
        # Held before pages are taken for them, whose content may go to host memory in turn.
        host_pages = [self.host.hold(page_hash) for page_hash in hashes]
        pages = [self.pool.allocate(1, self._partition_at(request, place))[0] for place in missing]
        for place, page_hash, page in zip(missing, hashes, pages, strict=True):
            request.pages[place] = page
            self.pool.register(page, page_hash)  # at once: loads run before the step
        self._planned.loads += zip(host_pages, pages, strict=True)

    def _take(self, request: Request, count: int) -> None:
        """Give a request `count` more pages, of whole rows."""
        if not self.partitions.striped:
            request.pages += self.pool.allocate(count, request.owner)
            return
        for place in range(len(request.pages), len(request.pages) + count, self.num_groups):
            request.pages += self.pool.allocate(self.num_groups, self._partition_at(request, place))

    def _partition_at(self, request: Request, place: int) -> int:
        return self.partitions.of(request.owner, place // self.num_groups)

    def _save(self, page: int, page_hash: bytes) -> None:
        """Plan to keep in host memory what an idle page holds, unless it is there already or there is no room."""
        if self.host.find(page_hash) is not None:
            self.host.hold(page_hash)
        elif (host_page := self.host.add(page_hash)) is not None:
            self._planned.saves.append((page, host_page))

    def _shared_places(self, request: Request) -> Sequence[int]:
        """Places of the pages that a request's next token is written to, if others use them or know their content."""
        index, offset = divmod(request.num_computed, self.page_size)
        if offset == 0:
            return ()
        if self.num_groups == 1:
            return () if self.pool.is_writable(request.pages[index]) else (index,)
        places = range(index * self.num_groups, (index + 1) * self.num_groups)
        return [place for place in places if not self.pool.is_writable(request.pages[place])]

    def _known_by(self, request: Request, place: int) -> bytes:
        """The hash that the page at a place is found by."""
        index, group = divmod(place, self.num_groups)
        return request.page_hash(index, self.page_size) + self._suffixes[group]

    def _pages_for(self, num_tokens: int) -> int:
        """Pages of all groups."""
        return -(-num_tokens // self.page_size) * self.num_groups
