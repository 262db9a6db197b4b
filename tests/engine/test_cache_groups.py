"""Pages of cache groups: prefixes behind windows, and what windows give back."""

import pytest
from tiny_engine import core_request

from jax_engine.kv_cache.cache_records import NO_PAGE, CachedPrefix
from jax_engine.kv_cache.kv_cache_manager import KVCacheManager
from jax_engine.scheduling.page_claims import PageClaims
from jax_engine.scheduling.request import Request


@pytest.mark.parametrize(
    ("windows", "missing", "cached"),
    [
        ((0,), [], 28),
        ((9,), [], 28),
        ((9,), [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)], 28),  # the window before token 28 begins in page 5
        ((9,), [(0, 5)], 20),
        ((9,), [(0, 6), (0, 4)], 16),  # 24 needs pages 4 and 5, 20 needs 3 and 4, 16 needs 2 and 3
        ((0, 9), [(1, 5)], 20),
        ((0, 9), [(0, 5)], 20),
        ((0, 9), [(0, 5), (1, 4)], 16),
        ((0, 9), [(0, 0)], 0),
        ((0, 9), [(1, 0)], 28),
        ((0, 5, 13), [(1, 3)], 28),
        ((0, 5, 13), [(2, 4)], 16),
        ((0, 5, 13), [(2, 4), (1, 3)], 12),
    ],
)
def test_a_prefix_needs_only_what_the_window_behind_it_sees(windows, missing, cached):
    """Of seven full pages in each cache group, some are forgotten: (group, index)."""
    cache = KVCacheManager(64, 4, windows, enable_prefix_caching=True)
    first, request = (Request(core_request(name, list(range(30))), order=0) for name in "ab")
    cache.start(first, cache.cached_prefix(first))
    cache.grow(first, 30)
    cache.release(first)
    for group, index in missing:
        page = cache.pool.find(request.page_hash(index, 4) + bytes([group] if group else []))
        (partition,) = cache.pool._partitions
        partition.known = {key: other for key, other in partition.known.items() if other != page}
    found = cache.cached_prefix(request)
    assert (found.num_tokens, len(found.pages)) == (cached, cached // 4 * len(windows))
    cache.start(request, found)
    cache.grow(request, 30 - cached)
    cache.release(request)
    assert cache.pool.num_in_use == 0


def test_pages_that_a_window_has_passed_are_free_before_the_next_plan():
    """A window of 6 in pages of 4: token 12 sees 7 and later ones, token 13 needs the page of 8 and not that of 7."""
    cache = KVCacheManager(6, 4, (0, 6), enable_prefix_caching=True)
    request = Request(core_request("a", list(range(20))), order=0)
    cache.start(request, CachedPrefix())
    assert cache.room(request) == 12
    cache.grow(request, 12)
    assert cache.pool.num_in_use == 6, "the step that was planned may still read them"
    cache.settle()
    assert (cache.pool.num_in_use, request.num_outside) == (5, {6: 7})
    assert cache.num_tokens_in_pages([request]) == 12 + 5
    assert cache.room(request) == 0, "there is one page of the two that another four tokens take"
    cache.release(request)
    assert cache.pool.num_in_use == 0
    assert cache.cached_prefix(Request(core_request("b", list(range(20))), order=1)).num_tokens == 12


def test_what_a_preemption_frees_and_costs():
    """Pages that others share stay, but are of no use to a window that has passed them."""
    cache = KVCacheManager(64, 4, (0, 6), enable_prefix_caching=True)
    claims = PageClaims(cache, reserve=0)
    first, second = (Request(core_request("a", list(range(length))), order=0) for length in (28, 9))
    cache.start(first, CachedPrefix())
    cache.grow(first, 8)
    cache.settle()
    cache.start(second, cache.cached_prefix(second))
    cache.grow(second, 1)
    assert (second.num_cached_tokens, second.num_computed) == (0, 9)
    assert [cache.own_pages(request) for request in (first, second)] == [[0], [2]]
    assert [claims.cost(request) for request in (first, second)] == [0, 1]
    cache.grow(first, 20)
    cache.settle()
    assert first.num_outside == {6: 23}, "pages 5 and 6 are held, and shared with nobody"
    assert (cache.own_pages(first), claims.cost(first)) == ([5 + 2], 28)
    cache.release(second)
    assert (cache.own_pages(first), claims.cost(first)) == ([7 + 2], 28)


@pytest.mark.parametrize(("ahead", "shares"), [(1, True), (3, True), (4, False)])
def test_a_prompt_is_shared_until_a_window_has_passed_its_end(ahead, shares):
    """A prompt of 15 in pages of 4, its last token computed by each: behind a window of 6, token 14 sees from 9 on, and
    the other still holds the page of token 11 when it has got to 17.
    """
    cache = KVCacheManager(64, 4, (0, 6), enable_prefix_caching=False)
    donor, other = (Request(core_request("a", list(range(15))), order=0) for _ in range(2))
    cache.start(donor, CachedPrefix())
    cache.grow(donor, 13 + ahead)
    donor.tokens += range(ahead)
    cache.settle()
    found = cache.cached_prefix(other, donor)
    assert found.num_tokens == (14 if shares else 0)
    assert cache.can_start(found, 15, reserve=0)
    cache.start(other, found)
    assert cache.grow(other, 15 - found.num_tokens) == (6 if shares else 0), "the pages of token 14 are copied"
    assert [page == NO_PAGE for page in other.pages] == [False, shares, False, shares, False, False, False, False]
    for request in (donor, other):
        cache.release(request)
    assert cache.pool.num_in_use == 0
