"""The scheduling process's side of a group: it gathers the members, sends them orders and finds out who is lost."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from jax_engine.hosts.group import (
    Begin,
    Compiled,
    End,
    Facts,
    Failing,
    Hello,
    Least,
    Ping,
    Proposal,
    Report,
    group_endpoint,
    group_socket,
    pack_array,
)

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1  # between looks at what has come from members
PINGS = 5  # looks between pings, which find out whether a member can be reached

OnLost = Callable[[str, bool], object]  # the reason, and whether settings or files are at fault


@dataclass
class _Peer:
    """A member, as the leader knows it. Mutable; owned by the `Leader`."""

    address: bytes
    host: str
    compiled: dict[int, bool] = field(default_factory=dict)
    proposal: int | None = None
    is_loaded: bool = False


class Leader:
    """Mutable; owned by the engine core's process.

    One thread sends. Another takes the reports, and calls `on_lost` when a member is lost or fails.
    """

    def __init__(self, address: str, port: int, size: int) -> None:
        """Listen for `size - 1` members; ValueError when the port cannot be had."""
        self._size = size
        self._peers: dict[int, _Peer] = {}
        self._using = threading.Lock()  # the socket
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._encoder = msgspec.msgpack.Encoder(enc_hook=pack_array)
        self._decoder: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
        endpoint = group_endpoint(address, port)
        self._socket = group_socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)  # who cannot be reached is an error, and not passed over
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            raise ValueError(
                f"master_addr={address!r} master_port={port} cannot be listened on: {error.strerror}; master_addr must "
                "be an address of the machine that has node_rank=0, and the port free"
            ) from error

    def gather(self, facts: Facts, seconds: float) -> None:
        """Wait until all members have come, with the same facts.

        Raises:
            ValueError: some have not come within so many seconds, or differ; the others end with the same message.
        """
        deadline = time.monotonic() + seconds
        logger.info("waiting for %d more processes of nnodes=%d", self._size - 1, self._size)
        while missing := sorted(set(range(1, self._size)) - self._peers.keys()):
            for report, address in self._take():
                if isinstance(report, Hello):
                    self._welcome(report, address, facts)
            for rank in self._unreachable():
                del self._peers[rank]  # it may come again
            if time.monotonic() > deadline:
                self._refuse(
                    f"of nnodes={self._size} processes, those of node_rank {', '.join(map(str, missing))} did not come "
                    f"within {seconds:g} seconds; start each with the same master_addr and master_port, and see its log"
                )
            time.sleep(WATCH_SECONDS)
        hosts = ", ".join(f"{rank} on {peer.host}" for rank, peer in sorted(self._peers.items()))
        logger.info("all processes have come: %s", hosts)
        self.send(Begin())

    def watch(self, on_lost: OnLost) -> None:
        """From now on call `on_lost`, in a thread, when a member is lost or fails; the others have been told then."""
        threading.Thread(target=self._watch, args=(on_lost,), name="group", daemon=True).start()

    def send(self, message: object) -> None:
        """Queue a message for every member; never waits for one. That one is lost, `on_lost` is told."""
        encoded = self._encoder.encode(message)
        with self._using:
            for peer in self._peers.values():
                self._send_to(peer.address, encoded)

    def agree(self, number: int, *, ok: bool) -> bool:
        """Wait until all members have a step program that this process has (`ok`); False if one never will."""
        if not ok:
            return False
        peers = self._peers.values()
        with self._changed:
            self._changed.wait_for(lambda: self._closing.is_set() or all(number in peer.compiled for peer in peers))
        without = [rank for rank, peer in self._peers.items() if not peer.compiled.get(number, False)]
        if without and not self._closing.is_set():
            logger.warning(
                "step program %d stays unused: process %d did not compile it; see its log", number, without[0]
            )
        return not without

    def least(self, value: int) -> int:
        """The least of what all processes give."""
        peers = self._peers.values()
        with self._changed:
            self._changed.wait_for(lambda: all(peer.proposal is not None for peer in peers))
            value = min(value, *(peer.proposal for peer in peers if peer.proposal is not None))
            for peer in peers:
                peer.proposal = None
        self.send(Least(value))
        return value

    def wait_until_loaded(self) -> None:
        """Return once all members take orders."""
        with self._changed:
            self._changed.wait_for(lambda: all(peer.is_loaded for peer in self._peers.values()))

    def close(self, reason: str | None = None, *, user_error: bool = False) -> None:
        """Tell all members to end, and why; once."""
        if not self._closing.is_set():
            self._closing.set()
            with self._changed:
                self._changed.notify_all()
            self.send(End(reason, user_error))
            with self._using:
                self._socket.close()

    def _welcome(self, hello: Hello, address: bytes, facts: Facts) -> None:
        rank = hello.rank
        if (other := self._peers.get(rank)) is not None:
            reason = f"node_rank={rank} has come twice, from {other.host} and from {hello.host}; give each its own"
            with self._using:
                self._send_to(address, self._encoder.encode(End(reason, user_error=True)))
            return
        self._peers[rank] = _Peer(address, hello.host)
        for name in sorted(facts.keys() | hello.facts.keys()):
            if (own := facts.get(name)) != (theirs := hello.facts.get(name)):
                self._refuse(
                    f"process {rank} ({hello.host}) has {name}={theirs!r}, and process 0 has {name}={own!r}; give all "
                    "processes the same settings, files and versions"
                )

    def _refuse(self, reason: str) -> None:
        self.close(reason, user_error=True)
        raise ValueError(reason)

    def _watch(self, on_lost: OnLost) -> None:
        looks = 0
        while not self._closing.wait(WATCH_SECONDS):
            for report, _ in self._take():
                self._note(report, on_lost)
            looks += 1
            for rank in self._unreachable() if looks % PINGS == 0 else ():
                self._fail(f"process {rank} (node_rank={rank}, on {self._peers[rank].host}) is lost", on_lost)

    def _note(self, report: Report, on_lost: OnLost) -> None:
        peer = self._peers.get(report.rank)
        if peer is None or isinstance(report, Hello):
            return
        if isinstance(report, Failing):
            self._fail(f"process {report.rank} ({peer.host}): {report.reason}", on_lost, user_error=report.user_error)
            return
        with self._changed:
            if isinstance(report, Compiled):
                peer.compiled[report.number] = report.ok
            elif isinstance(report, Proposal):
                peer.proposal = report.value
            else:
                peer.is_loaded = True
            self._changed.notify_all()

    def _fail(self, reason: str, on_lost: OnLost, *, user_error: bool = False) -> None:
        if not self._closing.is_set():
            self.close(reason, user_error=user_error)
            on_lost(reason, user_error)

    def _take(self) -> list[tuple[Report, bytes]]:
        """The reports that have come, and from where."""
        taken = []
        with self._using:
            while not self._socket.closed and self._socket.poll(0):
                address, message = self._socket.recv_multipart()
                taken.append((self._decoder.decode(message), address))
        return taken

    def _unreachable(self) -> list[int]:
        """The ranks of the members that are gone."""
        ping = self._encoder.encode(Ping())
        with self._using:
            return [rank for rank, peer in self._peers.items() if not self._send_to(peer.address, ping)]

    def _send_to(self, address: bytes, encoded: bytes) -> bool:
        """False when nobody is there; nothing once closed."""
        if self._socket.closed:
            return True
        try:
            self._socket.send_multipart((address, encoded))
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True
