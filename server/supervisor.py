"""`jax-engine serve --api-server-count N`: the engine core, or one of each replica, and N front ends, which live and
end together.

Every front end is a process with the same port, its own tokenizer and detokenizers, and its own channel to each core.
"""

import asyncio
import dataclasses
import logging
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence

import msgspec

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import CoreProcess, EngineDeadError, epitaph
from jax_engine.core.replicas import end_cores, spawn_cores, wait_until_ready
from jax_engine.frontend.progress import CompileBar
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.server.control import Connect, Connected, Fail, Serve, Setup, ToSupervisor, line
from jax_engine.server.listening import log_address
from jax_engine.server.metrics.cells import row_bytes
from jax_engine.server.service import BACKSTOP_SECONDS, EXIT_ENGINE_DEAD, EXIT_OK, EXIT_USER_ERROR
from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)


def supervise(
    engine_config: EngineConfig, settings: ServerSettings, listening: Sequence[socket.socket], *, log_level: str
) -> int:
    """Serve with a front end on each of `listening` until a signal, or until one of the processes ends; returns the
    exit code.
    """
    log_address(settings, listening[0])
    return asyncio.run(Supervisor(engine_config, settings).run(listening, log_level))


class Supervisor:
    """The processes of one server. Mutable; owned by `supervise`, in one event loop."""

    def __init__(self, engine_config: EngineConfig, settings: ServerSettings) -> None:
        self._config = engine_config
        self._settings = settings
        self.created = int(time.time())
        self._front_ends: list[Process] = []
        self._num_connected = 0
        self._all_connected = asyncio.Event()
        self._end = asyncio.Event()
        self._signals = 0
        self._failure: Fail | None = None

    async def run(self, listening: Sequence[socket.socket], log_level: str) -> int:
        """Start everything, wait for the end, end everything; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        await self._start_front_ends(listening, log_level)
        watching = [asyncio.create_task(self._watch(number, one)) for number, one in enumerate(self._front_ends)]
        cores = asyncio.create_task(self._run_cores(), name="engine cores")
        await self._end.wait()
        if self._failure is None:
            for front_end in self._front_ends:
                _terminate(front_end)
        else:
            self._tell_all(self._failure)
        # They end by themselves, after what they grant the requests in flight.
        _, late = await asyncio.wait(watching, timeout=self._settings.shutdown_timeout + 2 * BACKSTOP_SECONDS)
        if late:
            logger.error("%d front ends did not end in time and are killed", len(late))
            self._kill()
            await asyncio.wait(late)
        cores.cancel()
        await asyncio.wait({cores})
        if self._failure is None:
            return EXIT_OK
        print(f"jax-engine serve: error: {self._failure.reason}", file=sys.stderr)
        return self._failure.exit_code

    async def _start_front_ends(self, listening: Sequence[socket.socket], log_level: str) -> None:
        with tempfile.TemporaryFile() as cells:
            cells.truncate(len(listening) * row_bytes(self._config.data_parallel_size))
            for number, own in enumerate(listening):
                setup = Setup(
                    engine_config=dataclasses.asdict(self._config),
                    settings=dataclasses.asdict(self._settings),
                    number=number,
                    count=len(listening),
                    log_level=log_level,
                    listening=own.fileno(),
                    cells=cells.fileno(),
                    created=self.created,
                )
                # In a session of its own: a terminal's Ctrl-C is the supervisor's to act on.
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", "jax_engine.server.front_end"),
                    stdin=PIPE,
                    stdout=PIPE,
                    pass_fds=(own.fileno(), cells.fileno()),
                    start_new_session=True,
                )
                self._front_ends.append(process)
                _tell(process, setup)
                own.close()

    async def _watch(self, number: int, front_end: Process) -> None:
        """Take a front end's messages until it has ended."""
        decoder = msgspec.json.Decoder[ToSupervisor](ToSupervisor)
        assert front_end.stdout is not None
        async for message in front_end.stdout:
            told = decoder.decode(message)
            if isinstance(told, Fail):
                self._fail(told.reason, told.exit_code)
            elif isinstance(told, Connected):
                self._num_connected += 1
                if self._num_connected == len(self._front_ends):
                    self._all_connected.set()
        status = await front_end.wait()
        if not self._end.is_set():
            self._fail(epitaph(f"front end {number}", status), EXIT_ENGINE_DEAD)

    async def _run_cores(self) -> None:
        """The engine cores from their start to their end, however that comes."""
        try:
            # First of all, so that a model of the hub is fetched once and not by every process.
            await asyncio.to_thread(resolve_model_path, self._config.model, revision=self._config.revision)
            cores = await spawn_cores(self._config, num_channels=1 + len(self._front_ends))
        except ValueError as error:
            self._fail(str(error), EXIT_USER_ERROR)
            return
        try:
            self._tell_all(Connect([core.folder for core in cores]))
            with CompileBar() as bar:
                await wait_until_ready(
                    cores,
                    lambda done: bar.update(done.programs_compiled, done.programs_planned, done.compile_eta_seconds),
                )
            await self._all_connected.wait()
            self._tell_all(Serve())
            await asyncio.gather(*map(_drain, cores))
        except ValueError as error:
            self._fail(str(error), EXIT_USER_ERROR)
        except EngineDeadError as error:
            self._fail(f"the engine has died: {error}", EXIT_ENGINE_DEAD)
        finally:
            await end_cores(cores)

    def _fail(self, reason: str, exit_code: int) -> None:
        """End the server for a reason; only the first one counts."""
        if not self._end.is_set():
            self._failure = Fail(reason, exit_code)
            self._end.set()

    def _stop(self, number: int) -> None:
        """Take a signal: end in good order, or at once when Ctrl-C is pressed again."""
        self._signals += 1
        self._end.set()
        if number == signal.SIGINT and self._signals > 1:
            self._kill()

    def _kill(self) -> None:
        for front_end in self._front_ends:
            if front_end.returncode is None:
                front_end.kill()

    def _tell_all(self, message: Connect | Serve | Fail) -> None:
        for front_end in self._front_ends:
            _tell(front_end, message)


async def _drain(core: CoreProcess) -> None:
    """Take a core's statistics, which only front ends need, until it dies."""
    while True:
        await core.receive()


def _tell(front_end: Process, message: msgspec.Struct) -> None:
    assert front_end.stdin is not None
    if front_end.returncode is None:
        front_end.stdin.write(line(message))


def _terminate(front_end: Process) -> None:
    if front_end.returncode is None:
        front_end.terminate()
