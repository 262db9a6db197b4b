"""What the supervisor and its front ends tell each other: a JSON line a message, on a front end's standard streams."""

from typing import Any

import msgspec


class Setup(msgspec.Struct, tag="setup", frozen=True):
    """To a front end, first of all."""

    engine_config: dict[str, Any]
    settings: dict[str, Any]
    number: int  # of this front end, from 0
    count: int
    log_level: str
    listening: int  # file descriptor of its listening socket
    cells: int  # file descriptor of the memory that all front ends count in; see `cells.py`
    created: int  # when the server was started, in seconds since 1970


class Connect(msgspec.Struct, tag="connect", frozen=True):
    """To a front end: the sockets of each replica's core are in one of these folders."""

    folders: list[str]


class Serve(msgspec.Struct, tag="serve", frozen=True):
    """To a front end: all of them are connected to a core that is ready."""


class Fail(msgspec.Struct, tag="fail", frozen=True):
    """To a front end: the server cannot go on; to the supervisor: this front end cannot."""

    reason: str
    exit_code: int


class Connected(msgspec.Struct, tag="connected", frozen=True):
    """To the supervisor: this front end is connected to a core that is ready."""


ToFrontEnd = Connect | Serve | Fail
ToSupervisor = Connected | Fail


def line(message: msgspec.Struct) -> bytes:
    """A message as it is sent."""
    return msgspec.json.encode(message) + b"\n"
