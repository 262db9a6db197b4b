"""Processes of one engine: a server, and those that follow it."""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
SIZES = ("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--max-model-len", "256", "--compile-threads", "1")
START_SECONDS = 240.0  # of each process, one after another at worst
END_SECONDS = 20.0  # in which all ends when one process is lost; the machine may be busy


def free_port() -> int:
    """A port that nobody has at the moment, and the next one neither, in all likelihood."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass
class Follower:
    """A process that answers no HTTP."""

    process: subprocess.Popen[bytes]
    log_file: Path

    def log(self) -> str:
        return self.log_file.read_text()

    def child(self) -> int:
        """The process that has the devices."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text())


@dataclass
class Group:
    leader: Any  # a RunningServer
    followers: list[Follower]

    @property
    def all(self) -> list[subprocess.Popen[bytes]]:
        return [self.leader.process, *(follower.process for follower in self.followers)]

    def wait_for_the_end(self) -> list[int]:
        """Exit codes; fails when a process goes on."""
        deadline = time.monotonic() + END_SECONDS
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.all]


@contextmanager
def running_group(launch: Callable[..., Any], folder: Path, size: int, *options: str) -> Iterator[Group]:
    """A server of `size` processes, which `launch` starts, once it is ready; whatever runs at the end is killed."""
    port = str(free_port())
    shared = ["--nnodes", str(size), "--master-addr", HOST, "--master-port", port, *SIZES, *options]
    shared += ["--tensor-parallel-size", str(size)]
    followers = []
    for rank in range(1, size):
        log_file = Path(tempfile.mkstemp(dir=folder, suffix=f"-{rank}.log")[1])
        command = [sys.executable, "-m", "jax_engine.server.cli", "serve", "--node-rank", str(rank), "--headless"]
        with log_file.open("wb") as log:
            process = subprocess.Popen([*command, *shared], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        followers.append(Follower(process, log_file))
    leader = launch(folder, *shared)
    group = Group(leader, followers)
    try:
        leader.wait_for(leader.is_ready, what="ready", seconds=START_SECONDS * size)
        yield group
    finally:
        leader.client.close()
        for process in group.all:
            process.kill()
            process.wait()
