"""One of several front ends: `python -m jax_engine.server.front_end`, started by the `supervisor`.

Messages come by standard input and go by standard output (`control.py`). It ends when its server does, or when its
supervisor is gone.
"""

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from io import FileIO
from typing import BinaryIO

import msgspec

from jax_engine.async_llm import AsyncLLM
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import CoreConnection, OnProgress
from jax_engine.server.control import Connect, Connected, Fail, Serve, Setup, ToFrontEnd, line
from jax_engine.server.logs import set_up_logging
from jax_engine.server.metrics.cells import CellMemory
from jax_engine.server.serve import EngineServer
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings


class FrontEnd:
    """This process's part in the server. Mutable; owned by `main`."""

    def __init__(self, setup: Setup, messages: FileIO, output: BinaryIO) -> None:
        self._setup = setup
        self._messages = messages
        self._output = output
        self._config = EngineConfig(**setup.engine_config)
        engines = self._config.data_parallel_size
        self._memory = CellMemory.shared(setup.cells, number=setup.number, count=setup.count, engines=engines)
        self.server = EngineServer(self._service)

    async def start_engine(self, *, on_progress: OnProgress) -> AsyncLLM:
        """Connect to the cores, and wait until the other front ends have done so too."""
        loop = asyncio.get_running_loop()
        self._folders: asyncio.Future[list[str]] = loop.create_future()
        self._all_connected: asyncio.Future[None] = loop.create_future()
        self._ended: asyncio.Future[str] = loop.create_future()
        threading.Thread(target=self._listen, args=(loop,), name="supervisor", daemon=True).start()
        # Channel 0 is the supervisor's own.
        cores = [CoreConnection(folder, self._setup.number + 1, self._ended) for folder in await self._folders]
        async with AsyncExitStack() as undo:
            for core in cores:
                undo.push_async_callback(core.shutdown)
            engine = await AsyncLLM.attach(
                self._config, cores, number=self._setup.number, count=self._setup.count, on_progress=on_progress
            )
            undo.pop_all()
            undo.push_async_callback(engine.shutdown)
            self.tell(Connected())
            await self._all_connected
            undo.pop_all()
        return engine

    def tell(self, message: Connected | Fail) -> None:
        """Send a message to the supervisor."""
        self._output.write(line(message))
        self._output.flush()

    def _service(self, end: Callable[[], None]) -> Service:
        def failed() -> None:
            self.tell(Fail(service.reason, service.exit_code))
            end()

        settings = msgspec.convert(self._setup.settings, ServerSettings)
        service = Service(
            self._config,
            settings,
            on_failure=failed,
            start_engine=self.start_engine,
            memory=self._memory,
            created=self._setup.created,
        )
        return service

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Pass the supervisor's messages on to the event loop; without a supervisor there is no server."""
        decoder = msgspec.json.Decoder[ToFrontEnd](ToFrontEnd)
        for message in self._messages:
            loop.call_soon_threadsafe(self._take, decoder.decode(message))
        os._exit(1)

    def _take(self, message: ToFrontEnd) -> None:
        match message:
            case Connect():
                self._folders.set_result(message.folders)
            case Serve():
                self._all_connected.set_result(None)
            case Fail():
                self.server.service.fail(message.reason, message.exit_code)
                self._ended.set_result(message.reason)


def main() -> int:
    # Not through sys.stdin, whose lock would hold up the interpreter's end.
    messages = FileIO(0, closefd=False)
    setup = msgspec.json.decode(messages.readline(), type=Setup)
    # What libraries print goes to the log: standard output is the supervisor's.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    set_up_logging(setup.log_level, setup.settings["log_format"])
    front_end = FrontEnd(setup, messages, output)
    front_end.server.run(sockets=[socket.socket(fileno=setup.listening)])
    return front_end.server.service.exit_code


if __name__ == "__main__":
    sys.exit(main())
