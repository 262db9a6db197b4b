"""The engine core's own process: `python -m jax_engine.core_process FOLDER`, started by `core_client.CoreProcess`.

It reads its settings from standard input, commands from one socket, and writes events to another. It ends when it is
told to, when it fails, or when its parent is gone.
"""

import json
import logging
import os
import signal
import sys
import threading
from types import TracebackType

import msgspec
import zmq

from jax_engine.config import EngineConfig
from jax_engine.core_client import COMMANDS, EVENTS, endpoint
from jax_engine.engine_core import EngineCore
from jax_engine.messages import Command, Event, Failed, Shutdown, StepOutputs

COMPILE_REPORT_MS = 500  # how often an idle core reports compile progress


class CoreServer:
    """The sockets, and the loop between them and the engine core. Mutable; owned by `main`."""

    def __init__(self, folder: str) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._commands = _connect(context, folder, COMMANDS, zmq.PULL)
        self._events = _connect(context, folder, EVENTS, zmq.PUSH)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)

    def send(self, event: Event) -> None:
        self._events.send(self._encoder.encode(event))

    def serve(self, core: EngineCore) -> None:
        """Run steps while there is work, until a shutdown is asked for."""
        self.send(core.info)
        while self._take_commands(core):
            if core.has_work:
                outputs = core.step()
                if outputs.outputs or outputs.stats is not None:
                    self.send(outputs)

    def report_failure(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An exception hook: tell the front end, then log as usual."""
        self.send(Failed(f"the engine core failed: {kind.__name__}: {error}"))
        self._events.close(linger=1000)
        sys.__excepthook__(kind, error, trace)

    def _take_commands(self, core: EngineCore) -> bool:
        """Hand all commands that have come to the core; with nothing to do, wait for one. False: shut down."""
        compiling = core.runner.compiled.num_ready < len(core.runner.compiled.programs)
        idle_ms = COMPILE_REPORT_MS if compiling else None
        if not self._commands.poll(0 if core.has_work else idle_ms) and not core.has_work:
            self.send(StepOutputs([], core.stats()))
            return True
        while self._commands.poll(0):
            command = self._decoder.decode(self._commands.recv())
            if isinstance(command, Shutdown):
                return False
            reply = core.handle(command)
            if reply is not None:
                self.send(reply)
            if not core.has_work:  # the last request was aborted: say that its pages are free
                self.send(StepOutputs([], core.stats()))
        return True


def _connect(context: "zmq.Context[zmq.Socket[bytes]]", folder: str, name: str, kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.connect(endpoint(folder, name))
    return socket


def _end_with_parent() -> None:
    """Exit once standard input ends, which is when the parent process is gone, however it went."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not through sys.stdin, whose lock would hold up the interpreter's end
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def main() -> None:
    # The front end decides when to end: a terminal's Ctrl-C reaches both processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    settings = json.loads(sys.stdin.readline())
    _end_with_parent()
    logging.basicConfig(level=settings["log_level"], format="%(asctime)s %(levelname)s [core] %(message)s")
    logging.getLogger("jax").setLevel(
        max(settings["log_level"], logging.WARNING)
    )  # it reports every platform that it does not find
    server = CoreServer(sys.argv[1])
    sys.excepthook = server.report_failure
    try:
        core = EngineCore(EngineConfig(**settings["config"]))
    except ValueError as error:
        server.send(Failed(str(error), user_error=True))
        sys.exit(2)
    server.serve(core)
    core.shutdown()


if __name__ == "__main__":
    main()
