"""The engine core's own process: `python -m jax_engine.core.core_process FOLDER`, started by `core_client.CoreProcess`.

It reads its settings from standard input, commands from one socket of each front end, and writes events to another. It
ends when it is told to, when it fails, or when its parent is gone.
"""

import gc
import logging
import os
import sys
import time
from collections import deque
from types import TracebackType

import msgspec
import zmq

from jax_engine.config import EngineConfig
from jax_engine.core.child_process import begin_as_child
from jax_engine.core.core_client import COMMANDS, EVENTS, endpoint
from jax_engine.core.engine_core import EngineCore
from jax_engine.core.engine_view import EngineView
from jax_engine.core.messages import (
    Abort,
    AbortNamed,
    Add,
    Command,
    CoreOutput,
    Event,
    Failed,
    LoadAdapter,
    ServedAdapters,
    Shutdown,
    Starting,
    StepOutputs,
    UnloadAdapter,
)
from jax_engine.frontend.progress import reports_of_start
from jax_engine.hosts.group_leader import Leader
from jax_engine.hosts.hosts import lead

COMPILE_REPORT_MS = 500  # how often an idle core reports compile progress
READ_MS = 10  # how often an idle core looks whether an adapter has been read
LOSS_SECONDS = 2.0  # in which a lost process of the group is found
SENDING_SECONDS = 0.3  # that a last message takes at most

logger = logging.getLogger(__name__)


class CoreServer:
    """The sockets, and the loop between them and the engine core. Mutable; owned by `main`.

    A channel is one front end's pair of sockets. What a request produces goes to the channel that it came by.
    """

    def __init__(self, folder: str, num_channels: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        channels = range(num_channels)
        commands = [_connect(self._context, endpoint(folder, COMMANDS, channel), zmq.PULL) for channel in channels]
        self._event_addresses = [endpoint(folder, EVENTS, channel) for channel in channels]
        self._events = [_connect(self._context, address, zmq.PUSH) for address in self._event_addresses]
        self.group: Leader | None = None  # of several processes
        self._poller = zmq.Poller()
        for socket in commands:
            self._poller.register(socket, zmq.POLLIN)
        self._channel_of = {socket: channel for channel, socket in enumerate(commands)}
        self._owners: dict[str, int] = {}  # running request -> channel; not kept for a single channel
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._adapters: deque[tuple[LoadAdapter | UnloadAdapter, int]] = deque()  # not answered yet, and the channel
        self._compiling = True  # until a report says otherwise

    def send_to_all(self, event: Event) -> None:
        message = self._encoder.encode(event)
        for socket in self._events:
            socket.send(message)

    def serve(self, core: EngineCore) -> None:
        """Run steps while there is work, until a shutdown is asked for."""
        self.send_to_all(core.info)
        while self._take_commands(core):
            self._answer_adapters(core)
            if core.has_work:
                step = core.step()
                if len(self._events) > 1:
                    self._distribute(step)
                elif step.outputs or step.stats is not None:
                    self.send_to_all(step)

    def report_start(self, num_compiled: int, num_planned: int, eta_seconds: float) -> None:
        """Tell the front ends how far compiling is. Called in another thread, whose the sockets are meanwhile."""
        self.send_to_all(Starting(num_compiled, num_planned, eta_seconds))

    def report_failure(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """An exception hook: tell the front ends, then log as usual."""
        reason = f"the engine core failed: {kind.__name__}: {error}"
        if self.group is not None:
            time.sleep(LOSS_SECONDS)  # another process may be the reason: then this one ends meanwhile
            self.group.close(reason)
        self.send_to_all(Failed(reason))
        for socket in self._events:
            socket.close(linger=1000)
        sys.__excepthook__(kind, error, trace)

    def end_with_member(self, reason: str, user_error: bool) -> None:
        """End because of another process of the group. Called in a thread, with sockets of its own: the others' thread
        may wait for devices that will never answer.
        """
        logger.error("%s", reason)
        failed = self._encoder.encode(Failed(reason, user_error))
        for address in self._event_addresses:
            _connect(self._context, address, zmq.PUSH).send(failed)
        time.sleep(SENDING_SECONDS)
        os._exit(2 if user_error else 1)

    def _distribute(self, step: StepOutputs) -> None:
        """Send each channel the outputs of its own requests; the statistics go to all."""
        by_channel: list[list[CoreOutput]] = [[] for _ in self._events]
        for output in step.outputs:
            by_channel[self._owners[output.request_id]].append(output)
            if output.finish_reason is not None:
                del self._owners[output.request_id]
        for socket, outputs in zip(self._events, by_channel, strict=True):
            if outputs or step.stats is not None:
                socket.send(self._encoder.encode(StepOutputs(outputs, step.stats)))

    def _take_commands(self, core: EngineCore) -> bool:
        """Hand all commands that have come to the core; with nothing to do, wait for one. False: shut down."""
        idle_ms = COMPILE_REPORT_MS if self._compiling else None
        idle_ms = READ_MS if self._adapters else idle_ms
        ready = self._poller.poll(0 if core.has_work else idle_ms)
        if not ready and not core.has_work:
            stats = core.stats()
            self._compiling = stats.compile_eta_seconds > 0  # as reported: the end of it is reported too
            self.send_to_all(StepOutputs([], stats))
        while ready:
            for socket, _ in ready:
                command = self._decoder.decode(socket.recv())
                if isinstance(command, Shutdown):
                    return False
                self._handle(core, command, self._channel_of[socket])
            ready = self._poller.poll(0)
        return True

    def _handle(self, core: EngineCore, command: Command, channel: int) -> None:
        if isinstance(command, AbortNamed):  # the front ends know the names
            self.send_to_all(command)
            return
        if isinstance(command, LoadAdapter | UnloadAdapter):
            self._adapters.append((command, channel))
            return
        reply = core.handle(command)
        if reply is not None:
            self._events[channel].send(self._encoder.encode(reply))
        elif isinstance(command, Add) and len(self._events) > 1:  # with a reply, they were refused
            self._owners.update((request.request_id, channel) for request in command.requests)
        if isinstance(command, Abort):
            for request_id in command.request_ids:  # no output follows
                self._owners.pop(request_id, None)
        if not core.has_work and not isinstance(
            reply, EngineView
        ):  # the last request was aborted: say that its pages are free
            self.send_to_all(StepOutputs([], core.stats()))

    def _answer_adapters(self, core: EngineCore) -> None:
        """Have adapters come and go, in the order asked, as soon as that takes no time."""
        while self._adapters and core.is_at_hand(self._adapters[0][0]):
            command, channel = self._adapters.popleft()
            reply = core.handle(command)
            self.send_to_all(ServedAdapters(core.served_adapters.all))  # whoever asked knows it before the answer
            self._events[channel].send(self._encoder.encode(reply))


def _connect(context: "zmq.Context[zmq.Socket[bytes]]", address: str, kind: int) -> "zmq.Socket[bytes]":
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.connect(address)
    return socket


def main() -> None:
    settings = begin_as_child()
    server = CoreServer(sys.argv[1], settings["num_channels"])
    sys.excepthook = server.report_failure
    config = EngineConfig(**settings["config"])
    try:
        if config.nnodes > 1:
            server.group = lead(config, server.end_with_member)
        with reports_of_start(server.report_start) as watch:
            core = EngineCore(config, watch=watch, group=server.group)
    except ValueError as error:
        server.send_to_all(Failed(str(error), user_error=True))
        if server.group is not None:
            server.group.close(str(error), user_error=True)
        sys.exit(2)
    # What start-up made stays: the garbage collector need not look at it again and again, each time for milliseconds.
    gc.collect()
    gc.freeze()
    server.serve(core)
    core.shutdown()


if __name__ == "__main__":
    main()
