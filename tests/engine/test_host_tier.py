"""Pages in host memory: what the device gives up comes back instead of being computed again, and nothing is lost."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import TINY, collect, core_request, run_requests

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Abort, Add, CoreRequest
from jax_engine.execution.page_copies import STAGED_PAGES, PageCopier
from jax_engine.kv_cache.host_pool import HostPool, LoadRule, PageCopies
from jax_engine.models.kv_pages import KVPages

PAGE = 8
PAGE_BYTES = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * TINY["head_dim"] * 4
# Four sequences want 12 pages each at their end. Steps of few sizes, since each is compiled.
TIGHT = {"kv_cache_memory_bytes": 16 * PAGE_BYTES, "max_model_len": 96, "max_num_batched_tokens": 4}
CoreFactory = Callable[..., InProcessCore]


def host_tier(num_pages: int) -> dict[str, object]:
    return {"kv_offloading_size": num_pages * PAGE_BYTES / 2**30, "kv_offloading_load": "always"}


def requests(**fields: object) -> list[CoreRequest]:
    """More than fit: they are preempted again and again."""
    return [
        core_request(f"r{i}", [(13 * i + k) % 100 for k in range(20 + 3 * i)], 50, **fields, prng_key=(i, 7))
        for i in range(6)
    ]


@pytest.fixture(scope="module")
def tight(make_shared_core: CoreFactory) -> InProcessCore:
    return make_shared_core(**TIGHT)


@pytest.fixture(scope="module")
def tiered(make_shared_core: CoreFactory) -> InProcessCore:
    return make_shared_core(**TIGHT, **host_tier(100))


def alone(core: InProcessCore, requests: list[CoreRequest]) -> dict[str, list[int]]:
    """The tokens of each request when it has all pages to itself and finds nothing in them."""
    tokens: dict[str, list[int]] = {}
    for request in requests:
        assert core.reset_prefix_cache()
        tokens |= run_requests(core, [request])
    return tokens


def assert_nothing_is_held(core: InProcessCore) -> None:
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use) == (0, 0, 0)
    assert stats.compiles_in_request_path_total == 0


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "seeded"])
def test_under_pressure_tokens_are_the_same_and_fewer_are_computed_twice(tight, tiered, fields):
    expected = alone(tight, requests(**fields))
    before = tight.stats(), tiered.stats()
    assert before[0].preemptions_total == 0 or fields, "one after the other there is room"
    assert run_requests(tight, requests(**fields)) == expected
    assert run_requests(tiered, requests(**fields)) == expected
    without, with_tier = tight.stats(), tiered.stats()
    preemptions = with_tier.preemptions_total - before[1].preemptions_total
    recomputed = with_tier.recomputed_tokens_total - before[1].recomputed_tokens_total
    assert preemptions > 0
    # Each time only the page that was not full, and what the host did not know when the pages were taken.
    assert recomputed <= preemptions * (PAGE + 1)
    assert recomputed < (without.recomputed_tokens_total - before[0].recomputed_tokens_total) / 2
    assert with_tier.loaded_pages_total > before[1].loaded_pages_total
    assert 0 < with_tier.num_host_pages_in_use <= with_tier.num_host_pages == 100
    assert (without.num_host_pages, without.saved_pages_total, without.loaded_pages_total) == (0, 0, 0)
    for pressed in (tight, tiered):
        assert_nothing_is_held(pressed)


def test_a_full_host_pool_gives_up_its_oldest_and_nothing_breaks(tight, tiered, monkeypatch):
    assert tiered.reset_prefix_cache()
    monkeypatch.setattr(tiered._core.scheduler.cache, "host", HostPool(5))
    before = tiered.stats()
    for fields in ({}, {"temperature": 1.0}):
        assert run_requests(tiered, requests(**fields)) == alone(tight, requests(**fields))
    stats = tiered.stats()
    assert stats.num_host_pages_in_use == 5
    assert stats.saved_pages_total - before.saved_pages_total > 5
    assert stats.loaded_pages_total > before.loaded_pages_total
    assert_nothing_is_held(tiered)
    assert tiered.reset_prefix_cache()


def test_a_prompt_that_left_the_device_is_found_in_host_memory(tight, tiered):
    def cached(name: str, prompt: list[int]) -> int:
        return collect(tiered, [core_request(name, prompt, 2)])[name][-1].num_cached_tokens

    assert tiered.reset_prefix_cache()
    first, others = list(range(1, 51)), [[i] * 50 for i in (60, 61, 62)]
    before = tiered.stats()
    assert cached("first", first) == 0
    assert [cached(f"other {i}", prompt) for i, prompt in enumerate(others)] == [0, 0, 0]
    again = [core_request("again", first, 6)]
    assert run_requests(tiered, again) == alone(tight, again)
    after = tiered.stats()
    assert after.host_cache_hits_total - before.host_cache_hits_total > 0
    found = after.prefix_cache_hits_total + after.host_cache_hits_total
    assert found - before.prefix_cache_hits_total - before.host_cache_hits_total == 48
    assert cached("third time", first) == 48
    assert tiered.reset_prefix_cache()
    assert tiered.stats().num_host_pages_in_use == 0
    assert cached("after a reset", first) == 0


def test_an_abort_while_pages_come_back_frees_them_and_they_are_still_right(tight, tiered):
    assert tiered.reset_prefix_cache()
    long = [core_request(f"long {i}", [70 + i] * 50, 3) for i in range(4)]
    expected = alone(tight, long)
    assert run_requests(tiered, long) == expected
    before = tiered.stats().loaded_pages_total
    tiered.send(Add([core_request("leaves", [70] * 50, 20)]))
    tiered.step()
    assert tiered.stats().loaded_pages_total > before
    tiered.send(Abort(["leaves"]))
    while tiered.has_work():
        tiered.step()
    assert_nothing_is_held(tiered)
    assert run_requests(tiered, long) == expected


def test_pages_are_computed_again_where_that_is_faster(tight, tiered, monkeypatch):
    """The rule is asked at every look-up, whatever the tier holds."""
    rule = LoadRule(1.0, page_size=PAGE, large_step=1)
    rule.observe(1, 0.01)
    monkeypatch.setattr(tiered._core.scheduler.cache, "load_rule", rule)
    before = tiered.stats()
    assert run_requests(tiered, requests()) == alone(tight, requests())
    after = tiered.stats()
    assert after.loaded_pages_total == before.loaded_pages_total
    assert after.recomputed_tokens_total > before.recomputed_tokens_total
    assert rule.seconds_per_token != 0.01, "steps are timed"


def test_the_rule_compares_a_page_s_copy_with_the_computation_of_its_tokens():
    rule = LoadRule(0.004, page_size=8, large_step=16)
    assert rule.prefers_loading, "nothing is known yet"
    rule.observe(15, 1e-6)
    assert rule.prefers_loading, "a small step says little"
    rule.observe(16, 16 * 0.0004)  # 3.2 ms a page
    assert not rule.prefers_loading
    for _ in range(20):
        rule.observe(32, 32 * 0.0006)  # 4.8 ms a page
    assert rule.prefers_loading
    assert LoadRule(0.0, page_size=8, large_step=1).prefers_loading


def test_pages_survive_the_way_to_host_memory_and_back():
    """More at once than are let on their way together; a page is saved, and copied, before its place is taken."""
    rng = np.random.default_rng(0)
    count = 2 * STAGED_PAGES + 3
    original = rng.standard_normal((2, count, 2, 2, 4, 8), dtype=np.float32)
    cache = KVPages(jnp.asarray(original))
    copier = PageCopier(cache)
    backwards = [(page, count - 1 - page) for page in range(count)]
    cache = copier.run(cache, PageCopies(saves=backwards, loads=backwards))  # host page h is loaded into page n-1-h
    np.testing.assert_array_equal(cache.data, original)
    cache = copier.run(cache, PageCopies(saves=[(0, 0)], copies=[(1, 0), (2, 1)], loads=[(0, 2)]))
    np.testing.assert_array_equal(np.asarray(cache.data)[:, :3], original[:, [1, 2, 0]])
    np.testing.assert_array_equal(np.asarray(cache.data)[:, 3:], original[:, 3:])
    seconds, cache = copier.seconds_per_load(cache)
    assert seconds > 0
    np.testing.assert_array_equal(np.asarray(cache.data)[:, :3], original[:, [1, 2, 0]])


def test_a_host_pool_gives_away_the_least_recently_used_page_that_is_not_held():
    pool = HostPool(2)
    first, second = pool.add(b"a"), pool.add(b"b")
    assert pool.add(b"c") is None, "the plan in the making needs both"
    pool.release_held()
    assert pool.hold(b"a") == first
    assert pool.add(b"c") == second
    assert (pool.find(b"a"), pool.find(b"b"), pool.find(b"c")) == (first, None, second)
    pool.reset()
    assert pool.num_in_use == 0
    assert HostPool(0).add(b"a") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_offloading_size": 1, "swap_space": 1}, "kv_offloading_size=1 and swap_space=1 are two names"),
        ({"kv_offloading_size": -1}, "kv_offloading_size=-1 must be"),
        ({"swap_space": "4"}, "swap_space='4' must be"),
        ({"swap_space": 4, "enable_prefix_caching": False}, "swap_space=4 needs enable_prefix_caching=True"),
        ({"kv_offloading_load": "never"}, "kv_offloading_load='never' must be one of auto, always"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_host_memory_for_less_than_a_page_is_refused(make_core):
    with pytest.raises(ValueError, match=r"swap_space=1e-09 is 1 bytes in all, less than one KV page \(2048 bytes\)"):
        make_core(swap_space=1e-9)


def test_swap_space_is_for_each_device_and_the_offloading_size_for_all():
    assert EngineConfig(swap_space=2, tensor_parallel_size=4).host_cache_bytes == 8 * 2**30
    assert EngineConfig(kv_offloading_size=2, tensor_parallel_size=4).host_cache_bytes == 2 * 2**30
    assert EngineConfig().host_cache_bytes == 0
