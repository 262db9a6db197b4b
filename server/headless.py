"""`jax-engine serve --headless`: a process of an engine over several hosts that follows process 0, without HTTP."""

import json
import logging
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import epitaph
from jax_engine.log_lines import log_format
from jax_engine.server.service import BACKSTOP_SECONDS, EXIT_ENGINE_DEAD, EXIT_OK

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
CONNECT_SECONDS = 3.0


class Follower:
    """The process that follows, a child of this one. Mutable; owned by `follow`."""

    def __init__(self, config: EngineConfig, grace: float) -> None:
        """`grace`: seconds that it may go on after a signal."""
        self._config = config
        self._grace = grace
        self._deadline: float | None = None  # since a signal
        # As with the engine core: -P for a user's folder of that name; its standard input ends with this process.
        self._child = subprocess.Popen((sys.executable, "-P", "-m", "jax_engine.hosts.follower"), stdin=subprocess.PIPE)
        level = logging.getLogger("jax_engine").getEffectiveLevel()
        logs = {"name": f"process {config.node_rank}", "log_level": level, "log_format": log_format()}
        settings = {"config": asdict(config), **logs}
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(settings).encode() + b"\n")
        self._child.stdin.flush()

    def run(self) -> int:
        """Wait for its end; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take_signal)
        while True:
            try:
                status = self._child.wait(LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._child.kill()
        if status >= 0:
            return status
        if self._deadline is not None:
            return EXIT_OK
        # JAX ends a process at once whose coordinator is gone, before that one can say so.
        reason = epitaph("the follower", status)
        if not self._leader_answers():
            reason = f"process 0 (node_rank=0, at {self._config.master_addr}:{self._config.master_port}) is lost"
        print(f"jax-engine serve: error: {reason}", file=sys.stderr)
        return EXIT_ENGINE_DEAD

    def _leader_answers(self) -> bool:
        if self._config.master_addr is None:
            return True  # a TPU pod's: where it is, the child knew
        try:
            with socket.create_connection((self._config.master_addr, self._config.master_port), CONNECT_SECONDS):
                return True
        except OSError:
            return False

    def _take_signal(self, number: int, _: object) -> None:
        """The first time go on, since process 0 may have to answer requests yet; then end."""
        first = self._deadline is None
        self._deadline = time.monotonic() + (self._grace if first else 0)
        if first:
            logger.info("ending with process 0, in %g seconds at most; once more to end at once", self._grace)


def follow(config: EngineConfig, *, shutdown_timeout: float) -> int:
    """Follow process 0 until it ends, or some time after a signal; returns the exit code."""
    return Follower(config, shutdown_timeout + BACKSTOP_SECONDS).run()
