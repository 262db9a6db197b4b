"""A real server for the tests: the command itself in a process of its own, serving the built-in model."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import openai
import pytest

START_SECONDS = 240.0  # a first start compiles; the machine may be busy
LISTENING = re.compile(r'listening on ([^\s"]+)')


@dataclass
class RunningServer:
    """A server process and how to reach it."""

    process: subprocess.Popen[bytes]
    url: str
    log_file: Path

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=120)

    def log(self) -> str:
        return self.log_file.read_text()

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample on /metrics."""
        for line in httpx.get(f"{self.url}/metrics").raise_for_status().text.splitlines():
            if re.match(rf"{name}[{{ ]", line) and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no sample {name} {labels}")

    def wait_for(self, condition: Callable[[], bool], *, what: str, seconds: float = 120) -> None:
        """Poll until `condition` holds; fail with the log when it does not."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen; the server's log:\n{self.log()}"
            time.sleep(0.05)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"the server has ended:\n{self.log()}"
        return httpx.get(f"{self.url}/health").status_code == 200

    def all_pages_are_free(self) -> bool:
        names = ("jax_engine:kv_pages_in_use", "vllm:num_requests_running", "vllm:num_requests_waiting")
        return all(self.metric(name) == 0 for name in names)

    def core_pid(self) -> int:
        """The process id of the engine core, the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        (pid,) = children.split()
        return int(pid)

    def stop(self) -> int:
        """End it as an operator would, and return the exit code."""
        self.client.close()
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


def launch(folder: Path, *options: str) -> RunningServer:
    """Start a server on a free port and return once it listens, which is before its engine is ready."""
    log_file = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
    address = ("--host", "127.0.0.1", "--port", "0")
    command = [sys.executable, "-m", "jax_engine.server.cli", "serve", *address, *options]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    server = RunningServer(process, "", log_file)
    server.wait_for(lambda: process.poll() is not None or bool(LISTENING.search(server.log())), what="listening")
    found = LISTENING.search(server.log())
    assert found, f"the server ended with {process.returncode}:\n{server.log()}"
    server.url = found[1]
    return server


@pytest.fixture(scope="session")
def launch_server() -> Callable[..., RunningServer]:
    """What starts a server that the caller ends, in a folder."""
    return launch


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., RunningServer]]:
    """Start servers for one test; those that still run at its end are stopped."""
    started: list[RunningServer] = []

    def start(*options: str, ready: bool = True) -> RunningServer:
        started.append(launch(tmp_path, *options))
        if ready:
            started[-1].wait_for(started[-1].is_ready, what="ready", seconds=START_SECONDS)
        return started[-1]

    yield start
    for server in started:
        server.client.close()
        if server.process.poll() is None:
            server.stop()


@pytest.fixture(scope="module")
def start_shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningServer]]:
    """Start servers for a module's tests; they must end well."""
    started: list[RunningServer] = []

    def start(*options: str) -> RunningServer:
        started.append(launch(tmp_path_factory.mktemp("server"), *options))
        started[-1].wait_for(started[-1].is_ready, what="ready", seconds=START_SECONDS)
        return started[-1]

    yield start
    for running in started:
        assert running.stop() == 0, running.log()
        assert "Traceback" not in running.log()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that most tests share, with few enough KV pages that they matter; it must end well."""
    folder = tmp_path_factory.mktemp("server")
    running = launch(
        folder,
        *("--kv-cache-memory-bytes", "64M", "--max-num-seqs", "64", "--max-request-body-bytes", "1M"),
        *("--served-model-name", "demo", "demo-alias", "--enable-admin-routes", "--profile-dir", str(folder)),
    )
    running.wait_for(running.is_ready, what="ready", seconds=START_SECONDS)
    yield running
    assert running.stop() == 0, running.log()
    assert "Traceback" not in running.log()
