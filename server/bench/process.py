"""A `jax-engine serve` of this environment, started to be measured and ended afterwards."""

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jax_engine.server.bench.client import RequestError, Target, get

START_SECONDS = 600
STOP_SECONDS = 60
ENGINE = str(Path(sys.executable).with_name("jax-engine"))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server(model: str | None, arguments: Sequence[str]) -> Iterator[str]:
    """The address of a `jax-engine serve` of this environment, ready for requests; ended by SIGTERM afterwards."""
    port = free_port()
    command = [ENGINE, "serve", *([model] if model else [])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--compile-before-ready", "--no-enable-prefix-caching"]
    command += arguments
    with (
        tempfile.TemporaryFile("w+") as log,
        ended_afterwards(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        if not asyncio.run(becomes_healthy(Target(url), process)):
            log.seek(0)
            sys.exit(f"the server did not become ready; its log ends:\n{log.read()[-4000:]}")
        yield url


@contextmanager
def ended_afterwards(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """The process, ended by SIGTERM, and after `STOP_SECONDS` by SIGKILL."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def becomes_healthy(target: Target, process: "subprocess.Popen[bytes]") -> bool:
    """Whether `/health` answers before the process ends or the time for starting is over."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            await get(target, "/health")
        except (RequestError, OSError, EOFError):
            await asyncio.sleep(0.2)
        else:
            return True
    return False
