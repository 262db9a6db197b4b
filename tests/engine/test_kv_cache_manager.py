"""Two tiers of pages as a state machine over what the pages really hold: whoever has a page reads its own tokens."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny_engine import core_request

from jax_engine.kv_cache_manager import KVCacheManager
from jax_engine.request import Request

PAGE = 2
NUM_PAGES = 8
NUM_HOST_PAGES = 3
TOKENS = st.integers(0, 1)  # few, so that sequences meet
Content = list[tuple[int, ...] | None]  # for each token of a page, the sequence up to it


def new_request(tokens: list[int]) -> Request:
    return Request(core_request("r", tokens, 100), order=0)


class TierMachine(RuleBasedStateMachine):
    """Every rule is one step: its copies are made, in their order, and then its tokens are written."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCacheManager(NUM_PAGES, PAGE, enable_prefix_caching=True, num_host_pages=NUM_HOST_PAGES)
        self.device: list[Content] = [[None] * PAGE for _ in range(NUM_PAGES)]
        self.host: list[Content] = [[None] * PAGE for _ in range(NUM_HOST_PAGES)]
        self.live: list[Request] = []
        self.meaning: dict[bytes, tuple[int, ...]] = {}  # of hashes: the sequence up to a page's end

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=9))
    def start(self, tokens: list[int]) -> None:
        request = new_request(tokens)
        cached = self.cache.cached_prefix(request)
        assert cached.num_tokens < len(tokens)
        if self.cache.can_start(cached, len(tokens), reserve=0):
            self.cache.start(request, cached)
            self.live.append(request)
            self.step(request, len(tokens) - cached.num_tokens)

    @rule(data=st.data())
    def start_behind_a_donor(self, data: st.DataObject) -> None:
        """As another completion of a prompt: from the pages of one that has computed it, in part or in full."""
        if not self.live:
            return
        donor = data.draw(st.sampled_from(self.live))
        request = new_request(donor.tokens[: donor.num_prompt])
        cached = self.cache.cached_prefix(request, donor)
        assert cached.num_tokens == donor.num_prompt - 1
        if self.cache.can_start(cached, donor.num_prompt, reserve=0):
            self.cache.start(request, cached)
            self.live.append(request)
            self.step(request, 1)

    @rule(data=st.data(), tokens=st.lists(TOKENS, min_size=1, max_size=3))
    def generate(self, data: st.DataObject, tokens: list[int]) -> None:
        if self.live:
            request = data.draw(st.sampled_from(self.live))
            if self.cache.room(request) >= len(tokens):
                request.tokens += tokens
                self.step(request, len(tokens))

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        if self.live:
            parent = data.draw(st.sampled_from(self.live))
            child = new_request(list(parent.tokens))
            free = self.cache.pool.num_free
            self.cache.fork(parent, child)
            assert self.cache.pool.num_free == free, "nothing is copied before it is written"
            self.live.append(child)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.live:
            request = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
            self.cache.release(request)
            self.learn(request)

    @rule()
    def reset(self) -> None:
        done = self.cache.reset()
        assert done == (not self.live)
        if done:
            assert (self.cache.pool._pages, self.cache.host.num_in_use) == ({}, 0)

    def step(self, request: Request, length: int) -> None:
        start = request.num_computed
        self.cache.grow(request, length)
        copies = self.cache.take_copies()
        for page, host_page in copies.saves:
            self.host[host_page] = list(self.device[page])
        for source, target in copies.copies:
            self.device[target] = list(self.device[source])
        for host_page, page in copies.loads:
            self.device[page] = list(self.host[host_page])
        for position in range(start, start + length):
            page, offset = divmod(position, PAGE)
            self.device[request.pages[page]][offset] = tuple(request.tokens[: position + 1])
        self.cache.settle()
        self.learn(request)

    def learn(self, request: Request) -> None:
        for index in range(len(request.tokens) // PAGE):
            self.meaning[request.page_hash(index, PAGE)] = tuple(request.tokens[: (index + 1) * PAGE])

    @invariant()
    def everyone_reads_its_own_tokens(self) -> None:
        for request in self.live:
            for position in range(request.num_computed):
                page, offset = divmod(position, PAGE)
                assert self.device[request.pages[page]][offset] == tuple(request.tokens[: position + 1])

    @invariant()
    def a_known_page_holds_what_it_is_known_by(self) -> None:
        for known, tier in ((self.cache.pool._pages, self.device), (self.cache.host._pages, self.host)):
            for page_hash, page in known.items():
                whole = self.meaning[page_hash]
                assert tier[page] == [whole[: len(whole) - PAGE + 1 + offset] for offset in range(PAGE)]

    @invariant()
    def no_page_is_lost(self) -> None:
        users = Counter(page for request in self.live for page in request.pages)
        assert self.cache.pool._counts == [users[page] for page in range(NUM_PAGES)]
        assert len(self.cache.pool._idle) + len(self.cache.pool._blank) == NUM_PAGES - len(users)
        host = self.cache.host
        assert sorted([*host._pages.values(), *host._blank]) == list(range(NUM_HOST_PAGES))
        # Forks that have not written yet share the page that is not full, which counts once.
        last = {request.pages[-1]: -request.num_computed % PAGE for request in self.live}
        held = self.cache.num_tokens_in_pages(self.live)
        assert held == len(users) * PAGE - sum(last.values())


TierMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTiers = TierMachine.TestCase


def test_the_first_to_write_a_forked_page_copies_it_and_the_last_has_it_alone():
    cache = KVCacheManager(6, 4, enable_prefix_caching=False)
    parent, child = (new_request(list(range(6))) for _ in range(2))
    cache.start(parent, cache.cached_prefix(parent))
    assert cache.grow(parent, 6) == 0
    cache.fork(parent, child)
    assert parent.pages == child.pages
    assert cache.grow(child, 1) == 1, "its block table changes from the second page on"
    assert cache.grow(parent, 1) == 2
    assert child.pages[0] == parent.pages[0]
    assert cache.take_copies().copies == [(parent.pages[1], child.pages[1])]
    assert cache.pool.num_in_use == 3
    for request in (parent, child):
        cache.release(request)
    assert cache.pool.num_in_use == 0


def test_a_copy_needs_a_free_page():
    cache = KVCacheManager(2, 4, enable_prefix_caching=False)
    parent, child = (new_request(list(range(6))) for _ in range(2))
    cache.start(parent, cache.cached_prefix(parent))
    cache.grow(parent, 6)
    assert cache.room(parent) == 2
    cache.fork(parent, child)
    assert cache.room(parent) == 0
    cache.release(child)
    assert cache.room(parent) == 2
