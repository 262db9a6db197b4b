"""Messages between the processes of one engine over several hosts: one leads, the others are its members.

The leader listens at `master_addr:master_port` (ZeroMQ ROUTER). Each member has two connections to it (DEALER): by one
its messages come, in order and however many there are, by the other its reports go. A lost connection is a lost
process: the system closes those of one that has ended, and ZeroMQ's own heartbeats find one that is silent.
"""

import socket
from typing import Any, Protocol

import msgspec
import numpy as np
import zmq

BEAT_MS = 1000  # between heartbeats of a connection
SILENCE_MS = 4000  # after which it is given up

Facts = dict[str, Any]


class GroupError(RuntimeError):
    """A process of the group is lost, or has failed; the message names it."""


class Group(Protocol):
    """What the processes have to agree about, as each of them sees it."""

    def agree(self, number: int, *, ok: bool) -> bool:
        """Say that this process has a step program, or never will. The leader waits until all have it; False if one
        never will.
        """

    def least(self, value: int) -> int:
        """The least of what all processes give."""


class Hello(msgspec.Struct, array_like=True, frozen=True, tag="hello"):
    """A member's first message: who it is, and what must be the same everywhere."""

    rank: int
    host: str
    facts: Facts


class Compiled(msgspec.Struct, array_like=True, frozen=True, tag="compiled"):
    """A member has a step program; not `ok`: it never will."""

    rank: int
    number: int
    ok: bool


class Proposal(msgspec.Struct, array_like=True, frozen=True, tag="proposal"):
    """A member's part in `least`."""

    rank: int
    value: int


class Loaded(msgspec.Struct, array_like=True, frozen=True, tag="loaded"):
    """A member takes orders from now on."""

    rank: int


class Failing(msgspec.Struct, array_like=True, frozen=True, tag="failing"):
    """A member's last report; `user_error`: its settings or files are at fault."""

    rank: int
    reason: str
    user_error: bool


class Begin(msgspec.Struct, array_like=True, frozen=True, tag="begin"):
    """All processes have come, and fit together."""


class Ping(msgspec.Struct, array_like=True, frozen=True, tag="ping"):
    """Nothing."""


class Least(msgspec.Struct, array_like=True, frozen=True, tag="least"):
    """The least of all proposals."""

    value: int


class End(msgspec.Struct, array_like=True, frozen=True, tag="end"):
    """The leader's last message: why it ends, or None in good order."""

    reason: str | None = None
    user_error: bool = False


Report = Hello | Compiled | Proposal | Loaded | Failing


def group_socket(kind: int) -> "zmq.Socket[bytes]":
    """A socket that queues without a limit, and gives a silent peer up."""
    made: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    for option, value in (
        (zmq.SNDHWM, 0),
        (zmq.RCVHWM, 0),
        (zmq.LINGER, 1000),
        (zmq.HEARTBEAT_IVL, BEAT_MS),
        (zmq.HEARTBEAT_TIMEOUT, SILENCE_MS),
        (zmq.IPV6, 1),
    ):
        made.set(option, value)
    return made


def group_endpoint(address: str, port: int) -> str:
    """Where a group meets; ValueError for a name that cannot be resolved."""
    try:
        family, _, _, _, found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(
            f"master_addr={address!r} cannot be resolved ({error.strerror}); give a name or an address of the machine "
            "that has node_rank=0"
        ) from error
    return f"tcp://[{found[0]}]:{port}" if family == socket.AF_INET6 else f"tcp://{found[0]}:{port}"


def pack_array(value: object) -> tuple[str, tuple[int, ...], object]:
    """A NumPy array as msgpack carries it, dtype, shape and bytes: for an encoder's hook."""
    assert isinstance(value, np.ndarray)
    return value.dtype.name, value.shape, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def unpack_array(_: object, packed: tuple[str, tuple[int, ...], bytes]) -> np.ndarray[Any, Any]:
    """What `pack_array` made: for a decoder's hook."""
    name, shape, content = packed
    return np.frombuffer(content, np.dtype(name)).reshape(shape)
