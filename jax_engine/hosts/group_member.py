"""A following process's side of a group."""

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from jax_engine.hosts.group import (
    SILENCE_MS,
    Begin,
    Compiled,
    End,
    Facts,
    Failing,
    GroupError,
    Hello,
    Least,
    Loaded,
    Ping,
    Proposal,
    Report,
    group_endpoint,
    group_socket,
    unpack_array,
)

WATCH_MS = 500  # between looks at whether it is over
ENDING_SECONDS = 0.5  # between the leader's last message and the end of its connection, at most
LAST_WORDS_SECONDS = 3.0  # in which the leader tells who is lost


class Member:
    """Mutable; owned by the process. Its messages are taken in one thread, its reports may come from any."""

    def __init__(self, address: str, port: int, rank: int, kinds: Any) -> None:
        """`kinds`: the types of the messages, a union, beside those of `group`."""
        self._rank = rank
        self._where = f"{address}:{port}"
        self._messages, self._reports = group_socket(zmq.DEALER), group_socket(zmq.DEALER)
        self._monitor = self._messages.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._reporting = threading.Lock()
        self._has_ended = threading.Event()
        self._watching: threading.Thread | None = None
        self._encoder = msgspec.msgpack.Encoder()
        all_kinds = kinds | Begin | Ping | Least | End
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(all_kinds, dec_hook=unpack_array)
        for each in (self._messages, self._reports):
            each.connect(group_endpoint(address, port))

    def join(self, facts: Facts, seconds: float) -> None:
        """Come to the group, and wait until it is complete.

        Raises:
            ValueError: the leader refuses the group.
            GroupError: no leader answers within so many seconds, or it is lost.
        """
        self._messages.send(self._encoder.encode(Hello(self._rank, socket.gethostname(), facts)))
        if not self._messages.poll(int(1000 * seconds)):
            raise GroupError(
                f"process 0 did not answer at {self._where} within {seconds:g} seconds; start it with node_rank=0 and "
                "the same master_addr and master_port, which must be reached from here"
            )
        while self._messages.poll(2 * SILENCE_MS):  # it pings until it begins
            message = self._decoder.decode(self._messages.recv())
            if isinstance(message, Begin):
                return
            if isinstance(message, End):
                raise ValueError(message.reason)
        raise GroupError(self._lost)

    def watch(self, on_lost: Callable[[str], object]) -> None:
        """From now on call `on_lost`, in a thread, when the leader is lost."""

        def watch() -> None:
            while not self._monitor.poll(WATCH_MS):
                if self._has_ended.is_set():
                    return
            if not self._has_ended.wait(ENDING_SECONDS):
                on_lost(self._lost)

        self._watching = threading.Thread(target=watch, name="group", daemon=True)
        self._watching.start()

    def receive(self) -> Any:
        """The next message; None when the leader has ended in good order, GroupError when it has not."""
        while isinstance(message := self._decoder.decode(self._messages.recv()), Ping):
            pass
        if not isinstance(message, End):
            return message
        self._has_ended.set()
        if message.reason is not None:
            raise GroupError(message.reason)
        return None

    def last_words(self) -> str | None:
        """Why the leader ends, if it says so soon, whatever else it has sent before."""
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while (left := deadline - time.monotonic()) > 0 and self._messages.poll(int(1000 * left)):
            message = self._decoder.decode(self._messages.recv())
            if isinstance(message, End):
                self._has_ended.set()
                return message.reason
        return None

    def agree(self, number: int, *, ok: bool) -> bool:
        """Say that this process has a step program, or never will."""
        self._report(Compiled(self._rank, number, ok))
        return ok

    def least(self, value: int) -> int:
        """The least of what all processes give."""
        self._report(Proposal(self._rank, value))
        message = self.receive()
        assert isinstance(message, Least)
        return message.value

    def say_loaded(self) -> None:
        """Take orders from now on."""
        self._report(Loaded(self._rank))

    def say_failing(self, reason: str, *, user_error: bool) -> None:
        """Tell the leader why this process ends."""
        self._report(Failing(self._rank, reason, user_error))

    def close(self) -> None:
        """Let go of the sockets, once what was reported is sent."""
        self._has_ended.set()
        if self._watching is not None:
            self._watching.join()
        self._messages.disable_monitor()
        for each in (self._monitor, self._messages, self._reports):
            each.close()

    @property
    def _lost(self) -> str:
        return f"process 0 (node_rank=0, at {self._where}) is lost"

    def _report(self, report: Report) -> None:
        with self._reporting:
            self._reports.send(self._encoder.encode(report))
