"""Processes that run one engine find each other, refuse what does not fit, and notice who is lost.

Here they are threads of one process, which talk over real sockets; `tests/server/test_hosts.py` has real ones.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from processes import HOST, free_port

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.execution.orders import ORDERS, Forward, Step, WriteAdapter
from jax_engine.hosts.group import GroupError
from jax_engine.hosts.group_leader import Leader
from jax_engine.hosts.group_member import Member


def gathered(size: int, *, facts: Callable[[int], dict[str, object]] = lambda _: {}) -> tuple[Leader, list[Member]]:
    """A leader and its members, which have met; ValueError or GroupError when they could not."""
    leader = Leader(HOST, port := free_port(), size)
    members = [Member(HOST, port, rank, ORDERS) for rank in range(1, size)]
    with ThreadPoolExecutor(size) as pool:
        joining = [pool.submit(member.join, facts(rank), 20) for rank, member in enumerate(members, start=1)]
        try:
            leader.gather(facts(0), 20)
        finally:
            errors = [each.exception() for each in joining]
    assert errors == [None] * (size - 1)
    return leader, members


def test_orders_come_to_all_in_order_with_their_arrays() -> None:
    leader, members = gathered(3)
    rows = {"asks": np.array([True, False]), "counts": np.array(3, np.int32), "none": np.zeros((2, 0), np.uint32)}
    given = [Step(number, np.arange(2000, dtype=np.int32) * number) for number in range(500)]
    factors = {"a": np.linspace(-1, 1, 6).astype(ml_dtypes.bfloat16).reshape(2, 3)[:, ::2]}
    for order in (*given, Forward(7, given[0].buffer, rows), WriteAdapter(1, factors)):
        leader.send(order)
    leader.close()
    for member in members:
        for order in given:
            taken = member.receive()
            assert taken.number == order.number
            np.testing.assert_array_equal(taken.buffer, order.buffer)
        full, adapter = member.receive(), member.receive()
        for name, values in rows.items():
            np.testing.assert_array_equal(full.inputs[name], values, strict=True)
        np.testing.assert_array_equal(adapter.values["a"], factors["a"], strict=True)
        assert member.receive() is None, "the leader has ended in good order"
        member.close()


def test_settings_that_differ_are_refused_by_name_everywhere() -> None:
    leader, member = Leader(HOST, port := free_port(), 2), Member(HOST, port, 1, ORDERS)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(member.join, {"max_num_seqs": 8, "seed": 0}, 20)
        with pytest.raises(ValueError, match=r"process 1 \(.*\) has max_num_seqs=8, and process 0 has max_num_seqs=4"):
            leader.gather({"max_num_seqs": 4, "seed": 0}, 20)
        with pytest.raises(ValueError, match="has max_num_seqs=8"):
            joining.result()
    member.close()


def test_who_has_not_come_is_named() -> None:
    leader, member = Leader(HOST, port := free_port(), 4), Member(HOST, port, 2, ORDERS)
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(member.join, {}, 20)
        with pytest.raises(ValueError, match=r"nnodes=4 processes, those of node_rank 1, 3 did not come within 0.5 s"):
            leader.gather({}, 0.5)
        with pytest.raises(ValueError, match="node_rank 1, 3 did not come"):
            joining.result()
    member.close()


def test_a_leader_that_is_not_there_is_named() -> None:
    member = Member(HOST, port := free_port(), 1, ORDERS)
    with pytest.raises(GroupError, match=rf"process 0 did not answer at 127.0.0.1:{port} within 0.3 seconds"):
        member.join({}, 0.3)
    member.close()


def test_a_rank_that_comes_twice_is_refused_and_the_first_stays() -> None:
    leader = Leader(HOST, port := free_port(), 3)
    first, second, other = (Member(HOST, port, rank, ORDERS) for rank in (1, 1, 2))
    with ThreadPoolExecutor(4) as pool:
        gathering = pool.submit(leader.gather, {}, 20)
        twice = [pool.submit(member.join, {}, 20) for member in (first, second)]
        while not any(each.done() for each in twice):
            threading.Event().wait(0.05)
        (refused,) = (each for each in twice if each.done())
        with pytest.raises(ValueError, match="node_rank=1 has come twice"):
            refused.result()
        pool.submit(other.join, {}, 20).result()
        gathering.result()
    leader.close()
    for member in (first, second, other):
        member.close()


def test_a_lost_member_is_named_to_the_leader_and_to_the_others() -> None:
    leader, (first, second) = gathered(3)
    lost: Future[tuple[str, bool]] = Future()
    leader.watch(lambda reason, user_error: lost.set_result((reason, user_error)))
    first.close()
    reason, user_error = lost.result(timeout=10)
    assert "process 1 (node_rank=1, on " in reason
    assert reason.endswith("is lost")
    assert not user_error
    assert second.last_words() == reason
    second.close()


def test_a_member_that_fails_says_why() -> None:
    leader, (member,) = gathered(2)
    lost: Future[tuple[str, bool]] = Future()
    leader.watch(lambda reason, user_error: lost.set_result((reason, user_error)))
    member.say_failing("model folder './m' does not exist; check the path", user_error=True)
    reason, user_error = lost.result(timeout=10)
    assert reason.startswith("process 1 (")
    assert reason.endswith("model folder './m' does not exist; check the path")
    assert user_error
    member.close()


def test_a_lost_leader_is_named_to_its_members() -> None:
    leader, (member,) = gathered(2)
    lost: Future[str] = Future()
    member.watch(lost.set_result)
    leader._socket.close(linger=0)
    assert lost.result(timeout=10).startswith("process 0 (node_rank=0, at 127.0.0.1:")
    member.close()


def test_a_leader_that_ends_in_good_order_is_not_lost() -> None:
    leader, (member,) = gathered(2)
    lost: Future[str] = Future()
    member.watch(lost.set_result)
    leader.close()
    assert member.receive() is None
    with pytest.raises(TimeoutError):
        lost.result(timeout=1)
    member.close()


def test_a_program_is_used_once_all_have_it_and_never_if_one_does_not() -> None:
    leader, members = gathered(3)
    leader.watch(lambda *_: None)
    with ThreadPoolExecutor(1) as pool:
        agreeing = pool.submit(leader.agree, 5, ok=True)
        members[0].agree(5, ok=True)
        with pytest.raises(TimeoutError):
            agreeing.result(timeout=0.5)
        members[1].agree(5, ok=True)
        assert agreeing.result(timeout=10)
        members[0].agree(6, ok=True)
        members[1].agree(6, ok=False)
        assert not leader.agree(6, ok=True)
        assert not leader.agree(7, ok=False), "the leader itself does not have it"
        proposing = [pool.submit(members[1].least, 3)]
        with ThreadPoolExecutor(1) as other:
            proposing.append(other.submit(members[0].least, 9))
            assert leader.least(7) == 3
            assert [each.result(timeout=10) for each in proposing] == [3, 3]
    leader.close()
    for member in members:
        member.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nnodes": 0}, "nnodes=0 must be"),
        ({"nnodes": 2, "node_rank": 2}, r"node_rank=2 must be .*nnodes=2 are numbered from 0"),
        ({"master_addr": "10.0.0.1"}, "master_addr='10.0.0.1' must be an address, and needs nnodes above 1"),
        ({"nnodes": 2, "master_port": 65535}, "master_port=65535 must be"),
        ({"nnodes": 2, "data_parallel_size": 2}, "data_parallel_size=2 shares the devices of one host, and nnodes=2"),
        ({"nnodes": 2, "distributed_timeout_seconds": 0}, "distributed_timeout_seconds=0 must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)  # type: ignore[arg-type]


def test_an_engine_in_the_callers_process_cannot_be_of_several() -> None:
    with pytest.raises(ValueError, match="nnodes=2 needs an engine core in a process of its own"):
        InProcessCore(EngineConfig(nnodes=2, master_addr=HOST))


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(ValueError, match=r"master_addr='192.0.2.1' master_port=\d+ cannot be listened on"):
        Leader("192.0.2.1", free_port(), 2)
    with pytest.raises(ValueError, match=r"master_addr='no-such-host.invalid' cannot be resolved"):
        Leader("no-such-host.invalid", free_port(), 2)
