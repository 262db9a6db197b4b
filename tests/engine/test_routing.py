"""Which replica a request goes to: none is idle while another has much to do, and beginnings stay together."""

from collections import Counter
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import core_request

from jax_engine.core.replica_devices import device_environment
from jax_engine.core.routing import ADAPTER_TOKENS, COMPUTED_TOKENS, SEQUENCE_TOKENS, Router
from jax_engine.core.stats import EngineStats, HostTime, total
from jax_engine.lora_request import LoRARequest

PAGE = 16
NAMES = count()


def router(num_replicas=2, num_pages=1000, **options):
    return Router([num_pages] * num_replicas, PAGE, **options)


def send(to, prompt, **fields):
    """Route one new request; its id and its replica."""
    request = core_request(f"{next(NAMES)}", prompt, **fields)
    return request.request_id, to.route([request])


def tokens(seed, length):
    return [seed * 1_000_003 + place for place in range(length)]


def in_flight(of):
    return [replica.own_sequences for replica in of.replicas]


@pytest.mark.parametrize("num_replicas", [2, 3, 8])
@pytest.mark.parametrize("length", [3, 200])
def test_requests_that_share_nothing_are_spread_evenly(num_replicas, length):
    to = router(num_replicas)
    for seed in range(10 * num_replicas):
        send(to, tokens(seed, length))
        assert max(in_flight(to)) - min(in_flight(to)) <= 1


@pytest.mark.parametrize("length", [3, 200])
def test_an_idle_server_uses_all_replicas(length):
    to = router(4)
    used = Counter()
    for seed in range(200):
        name, replica = send(to, tokens(seed, length))
        to.ended(name)
        used[replica] += 1
    assert min(used.values()) > 20


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_conversation_stays_where_it_began_while_loads_are_alike(data):
    to = router(data.draw(st.integers(2, 4)), num_pages=10_000)
    turns, places = {}, {}
    for _ in range(data.draw(st.integers(1, 25))):
        seed = data.draw(st.integers(0, 5))
        turns[seed] = turns.get(seed, 0) + 1
        name, replica = send(to, tokens(seed, 64 * turns[seed]))
        to.ended(name)
        assert places.setdefault(seed, replica) == replica


def test_a_hot_beginning_spills_over_once_its_replica_is_much_busier():
    to, common = router(2), tokens(1, 2048)
    places = [send(to, [*common, *tokens(seed, 40)])[1] for seed in range(40)]
    first = places.index(1 - places[0])
    # The other had to compute 2,048 tokens and hold them, against 40 and so many sequences more.
    assert 2048 * COMPUTED_TOKENS / (SEQUENCE_TOKENS + 40) < first < 2 * 2048 / SEQUENCE_TOKENS
    # From then on both have it, and are filled alike.
    assert abs(in_flight(to)[0] - in_flight(to)[1]) <= first
    rest = Counter(send(to, [*common, *tokens(seed, 40)])[1] for seed in range(100, 200))
    assert min(rest.values()) >= 35


def test_a_short_beginning_does_not_hold_requests_together():
    to, common = router(2), tokens(1, PAGE)
    for seed in range(20):
        send(to, [*common, *tokens(seed, 100)])
    assert abs(in_flight(to)[0] - in_flight(to)[1]) <= 1


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_no_replica_is_left_with_less_than_what_a_prompt_saves_elsewhere(data):
    """Whatever came and ended before, a busier replica is chosen only for what it holds of the prompt."""
    to = router(data.draw(st.integers(2, 4)), num_pages=data.draw(st.sampled_from([4, 50, 1000])))
    alive = []
    for _ in range(data.draw(st.integers(1, 40))):
        if alive and data.draw(st.booleans()):
            to.ended(alive.pop(data.draw(st.integers(0, len(alive) - 1))))
            continue
        prompt = tokens(data.draw(st.integers(0, 3)), data.draw(st.integers(1, 400)))
        before = [replica.load for replica in to.replicas]
        excess = [max(0, r.held_tokens + len(prompt) - r.num_pages * PAGE) for r in to.replicas]
        name, chosen = send(to, prompt)
        alive.append(name)
        most = (1 + COMPUTED_TOKENS) * len(prompt) + COMPUTED_TOKENS * max(excess)
        assert before[chosen] - min(before) <= most
    for name in alive:
        to.ended(name)
    assert in_flight(to) == [0] * len(to.replicas)
    assert [replica.own_tokens for replica in to.replicas] == [0] * len(to.replicas)


def test_what_others_send_counts_by_the_replicas_reports():
    to = router(2)
    to.report(0, EngineStats(num_running=20, num_pages_in_use=100, num_pages=1000))
    assert {send(to, tokens(seed, 50))[1] for seed in range(10)} == {1}
    to.report(0, EngineStats())  # those have ended
    assert {send(to, tokens(seed, 50))[1] for seed in range(10, 15)} == {0}


def test_a_report_that_was_made_before_a_request_came_does_not_hide_it():
    to = router(2)
    for seed in range(10):
        send(to, tokens(seed, 50))
        for number in range(2):
            to.report(number, EngineStats())
    assert in_flight(to) == [5, 5]


def test_a_waiting_sequence_counts_more_than_a_running_one():
    to = router(2)
    to.report(0, EngineStats(num_running=4))
    to.report(1, EngineStats(num_running=2, num_waiting=1))
    assert send(to, tokens(1, 10))[1] == 0


def test_where_the_pages_do_not_suffice_a_request_goes_elsewhere():
    to = router(2, num_pages=100)
    to.report(0, EngineStats(num_running=2, num_pages_in_use=95))
    to.report(1, EngineStats(num_running=14, num_pages_in_use=10))
    assert send(to, tokens(1, 40))[1] == 0
    assert send(to, tokens(2, 800))[1] == 1


def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten():
    to = router(1, num_pages=10)
    for seed in range(50):
        send(to, tokens(seed, 5 * PAGE))
        assert len(to.replicas[0].pages) <= 10
    assert to.cost(0, 0, []) == to.replicas[0].load + COMPUTED_TOKENS * (to.replicas[0].held_tokens - 10 * PAGE)


def test_salts_and_adapters_keep_beginnings_apart():
    prompt, lora = tokens(1, 40 * PAGE), LoRARequest("a", 1, "/a")
    for other in ({"cache_salt": "x"}, {"lora": lora}):
        to = router(2)
        _, there = send(to, prompt)
        assert send(to, prompt)[1] == there
        assert send(to, prompt, **other)[1] != there


def test_an_adapters_requests_prefer_a_replica_that_has_it():
    to, lora = router(2), LoRARequest("a", 1, "/a")
    name, there = send(to, [1], lora=lora)
    to.ended(name)
    places = [send(to, [seed], lora=lora)[1] for seed in range(10)]
    assert places[: ADAPTER_TOKENS // (SEQUENCE_TOKENS + 3)] == [there] * (ADAPTER_TOKENS // (SEQUENCE_TOKENS + 3))
    assert set(places) == {0, 1}, "until that has too much to do"


def test_a_full_replica_is_not_asked_while_another_has_room():
    to, common = router(2, max_sequences=3), tokens(1, 4096)
    places = [send(to, common)[1] for _ in range(6)]
    assert Counter(places) == {0: 3, 1: 3}


def test_front_ends_choose_alike_for_a_new_beginning():
    """They do not know of one another: by turns, each would compute it on a replica of its own."""
    one, other = router(4), router(4)
    for seed in range(7):
        one.ended(send(one, [seed])[0])
    chosen = []
    for seed in range(30):
        (name, first), (other_name, second) = (send(end, tokens(seed, 100)) for end in (one, other))
        assert first == second
        chosen.append(first)
        one.ended(name)
        other.ended(other_name)
    assert set(chosen) == set(range(4))


def test_statistics_of_several_engines_add_up():
    one = EngineStats(num_running=1, page_size=16, num_pages=10, num_pages_in_use=5, compile_eta_seconds=3.0)
    other = EngineStats(
        num_running=2,
        page_size=16,
        num_pages=30,
        num_pages_in_use=5,
        compile_eta_seconds=2.0,
        finished_requests_total={"stop": 2},
        spec_accepted_tokens_per_position_total=(3, 1),
        host_time=HostTime(steps=4, wait=2.0),
        running_adapters=("a",),
    )
    both = total([one, other])
    assert (both.num_running, both.page_size, both.compile_eta_seconds) == (3, 16, 3.0)
    assert both.kv_cache_usage == 0.25
    assert both.finished_requests_total == {"stop": 2}
    assert both.spec_accepted_tokens_per_position_total == (3, 1)
    assert both.host_time == HostTime(steps=4, wait=2.0)
    assert both.running_adapters == ("a",)
    assert total([one]) is one


@pytest.fixture
def gpus(tmp_path: Path) -> Path:
    """A /dev of four GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


def environments(count, num_devices, inherited, devices):
    return [device_environment(number, count, num_devices, inherited, devices=devices) for number in range(count)]


def test_each_replica_has_devices_of_its_own(gpus):
    seen = [one["CUDA_VISIBLE_DEVICES"] for one in environments(2, 2, {}, gpus)]
    assert seen == ["0,1", "2,3"]
    given = environments(2, 1, {"CUDA_VISIBLE_DEVICES": "3, GPU-abc"}, gpus)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["3", "GPU-abc"]
    chips = environments(2, 4, {}, gpus / "none")
    assert [one["TPU_VISIBLE_CHIPS"] for one in chips] == ["0,1,2,3", "4,5,6,7"]
    assert {one["TPU_CHIPS_PER_PROCESS_BOUNDS"] for one in chips} == {"2,2,1"}
    assert len({one["TPU_PROCESS_PORT"] for one in chips}) == 2
    assert [one["NPROC"] for one in environments(3, 1, {"NPROC": "12"}, gpus)] == ["4"] * 3


def test_too_few_gpus_are_refused_with_their_number(gpus):
    with pytest.raises(ValueError, match=r"data_parallel_size need 6 GPUs in all, and this host has 4; lower"):
        environments(3, 2, {}, gpus)
    with pytest.raises(ValueError, match=r"need 2 GPUs in all, and CUDA_VISIBLE_DEVICES=1 names 1; lower"):
        environments(2, 1, {"CUDA_VISIBLE_DEVICES": "1"}, gpus)
    for hidden in ({"CUDA_VISIBLE_DEVICES": ""}, {"JAX_PLATFORMS": "cpu"}):
        assert len(environments(8, 1, hidden, gpus)) == 8
