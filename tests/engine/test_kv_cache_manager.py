"""Two tiers of pages as a state machine over what the pages really hold: whoever has a page reads its own tokens."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tiny_engine import core_request

from jax_engine.kv_cache.kv_cache_manager import KVCacheManager
from jax_engine.kv_cache.page_partitions import PagePartitions
from jax_engine.scheduling.request import Request

PAGE = 3
NUM_PAGES = 8
NUM_HOST_PAGES = 3
TOKENS = st.integers(0, 1)  # few, so that sequences meet
Content = list[tuple[int, ...] | None]  # for each token of a page, the sequence up to it


def new_request(tokens: list[int]) -> Request:
    return Request(core_request("r", tokens, 100, branches=True), order=0)


class TierMachine(RuleBasedStateMachine):
    """Every rule is one step: its copies are made, in their order, and then its tokens are written."""

    partitions = PagePartitions()

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCacheManager(
            NUM_PAGES,
            PAGE,
            enable_prefix_caching=True,
            num_host_pages=NUM_HOST_PAGES,
            partitions=self.partitions,
        )
        self.device: list[Content] = [[None] * PAGE for _ in range(NUM_PAGES)]
        self.host: list[Content] = [[None] * PAGE for _ in range(NUM_HOST_PAGES)]
        self.live: list[Request] = []
        self.ended: list[list[int]] = []
        self.meaning: dict[bytes, tuple[int, ...]] = {}  # of hashes: the sequence up to a page's end

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=9))
    def start(self, tokens: list[int]) -> None:
        request = new_request(tokens)
        for cached in self.cache.cached_prefixes(request):
            assert cached.num_tokens < len(tokens)
            if self.cache.can_start(cached, len(tokens), reserve=0):
                self.cache.start(request, cached)
                self.live.append(request)
                self.step(request, len(tokens) - cached.num_tokens)
                break

    @rule(data=st.data())
    def start_behind_a_donor(self, data: st.DataObject) -> None:
        """As another completion of a prompt: from the pages of one that has computed it, in part or in full."""
        if not self.live:
            return
        donor = data.draw(st.sampled_from(self.live))
        request = new_request(donor.tokens[: donor.num_prompt])
        cached = self.cache.cached_prefix(request, donor, donor.owner)
        assert cached.num_tokens == donor.num_prompt - 1
        if self.cache.can_start(cached, donor.num_prompt, reserve=0):
            self.cache.start(request, cached)
            self.live.append(request)
            self.step(request, 1)

    @rule(data=st.data(), tokens=st.lists(TOKENS, min_size=1, max_size=3))
    def generate(self, data: st.DataObject, tokens: list[int]) -> None:
        if self.live:
            request = data.draw(st.sampled_from(self.live))
            room = self.cache.room(request)
            assert self.cache.have_room([request], [room]) and not self.cache.have_room([request], [room + 1])
            if room >= len(tokens):
                request.tokens += tokens
                self.step(request, len(tokens))

    @rule(data=st.data(), token=TOKENS)
    def go_on(self, data: st.DataObject, token: int) -> None:
        """From the end of one that has ended."""
        if self.ended:
            self.start([*data.draw(st.sampled_from(self.ended)), token])

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.live:
            request = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
            self.cache.release(request)
            self.learn(request)
            self.ended = [*self.ended[-3:], list(request.tokens)]

    @rule()
    def reset(self) -> None:
        done = self.cache.reset()
        assert done == (not self.live)
        if done:
            assert not any(part.known for part in self.cache.pool._partitions) and not self.cache.host.num_in_use

    def step(self, request: Request, length: int) -> None:
        start = request.num_computed
        if length > 1 or self.cache.next_token(request) is None:
            self.cache.grow(request, length)
        request.num_pending = 0  # the tokens are known
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
        if len(request.tokens) % PAGE:
            self.meaning[request.tail_hash(len(request.tokens), PAGE)] = tuple(request.tokens)

    @invariant()
    def everyone_reads_its_own_tokens(self) -> None:
        for request in self.live:
            for position in range(request.num_computed):
                page, offset = divmod(position, PAGE)
                assert self.device[request.pages[page]][offset] == tuple(request.tokens[: position + 1])

    @invariant()
    def a_known_page_holds_what_it_is_known_by(self) -> None:
        on_device = ((part.known, self.device) for part in self.cache.pool._partitions)
        for known, tier in (*on_device, (self.cache.host._pages, self.host)):
            for page_hash, page in known.items():
                whole = self.meaning[page_hash]
                count = (len(whole) - 1) % PAGE + 1
                assert tier[page][:count] == [whole[: len(whole) - count + 1 + offset] for offset in range(count)]
                assert count == PAGE or tier is self.device, "a page that is not full is not worth host memory"

    @invariant()
    def no_page_is_lost(self) -> None:
        users = Counter(page for request in self.live for page in request.pages)
        assert self.cache.pool._counts == [users[page] for page in range(NUM_PAGES)]
        assert self.cache.pool.num_free == NUM_PAGES - len(users)
        host = self.cache.host
        assert sorted([*host._pages.values(), *host._blank]) == list(range(NUM_HOST_PAGES))
        last = {request.pages[-1]: -request.num_computed % PAGE for request in self.live}
        held = self.cache.num_tokens_in_pages(self.live)
        assert held == len(users) * PAGE - sum(last.values())

    @invariant()
    def what_a_request_has_grown_into_is_its_own(self) -> None:
        for request in self.live:
            for position in range(request.num_computed, request.num_own):
                assert self.cache.pool.is_writable(request.pages[position // PAGE])

    @invariant()
    def pages_lie_where_the_rule_says(self) -> None:
        for request in self.live:
            for index, page in enumerate(request.pages):
                assert page // (NUM_PAGES // self.partitions.count) == self.partitions.of(request.owner, index)


class StripedMachine(TierMachine):
    partitions = PagePartitions(2, striped=True)


class OwnedMachine(TierMachine):
    partitions = PagePartitions(2)


TierMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTiers = TierMachine.TestCase
for machine in (StripedMachine, OwnedMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStriped, TestOwned = StripedMachine.TestCase, OwnedMachine.TestCase


def test_branches_go_on_from_the_page_that_a_sequence_ended_in_each_with_a_copy():
    cache = KVCacheManager(6, 4, enable_prefix_caching=True)
    parent = new_request(list(range(6)))
    cache.start(parent, cache.cached_prefix(parent))
    cache.grow(parent, 6)
    pages = list(parent.pages)
    cache.release(parent)
    branches = [new_request([*range(6), token]) for token in (6, 7)]
    for branch in branches:
        cached = cache.cached_prefix(branch)
        assert (cached.num_tokens, cached.pages) == (6, pages)
        cache.start(branch, cached)
        assert cache.grow(branch, 1) == 1, "its block table changes from the second page on"
    copies = [(pages[1], branch.pages[1]) for branch in branches]
    assert cache.take_copies().copies == copies
    assert len({pages[1], *(page for _, page in copies)}) == 3
    for tokens in ([*range(5), 9, 6], [*range(6), 6, 7], [*range(5)]):
        other = new_request(tokens)
        assert cache.cached_prefix(other).num_tokens == 4, "a tail is of its very tokens"
    for branch in branches:
        cache.release(branch)
    assert cache.pool.num_in_use == 0


def test_tails_make_room_before_full_pages_do():
    cache = KVCacheManager(4, 4, enable_prefix_caching=True)
    for first in (0, 100):
        request = new_request(list(range(first, first + 6)))
        cache.start(request, cache.cached_prefix(request))
        cache.grow(request, 6)
        cache.release(request)
    other = new_request([50] * 8)
    cache.start(other, cache.cached_prefix(other))
    cache.grow(other, 8)
    for first in (0, 100):
        again = new_request(list(range(first, first + 7)))
        assert cache.cached_prefix(again).num_tokens == 4


def test_a_copy_needs_a_free_page():
    cache = KVCacheManager(2, 4, enable_prefix_caching=False)
    parent, child = (new_request(list(range(6))) for _ in range(2))
    cache.start(parent, cache.cached_prefix(parent))
    cache.grow(parent, 6)
    assert cache.room(parent) == 2
    cache.start(child, cache.cached_prefix(child, parent))
    assert cache.room(parent) == 0
    cache.release(child)
    assert cache.room(parent) == 2
