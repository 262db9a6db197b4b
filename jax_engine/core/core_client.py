"""How a front end reaches the engine core: in its own process, or in another one over ZeroMQ and msgpack."""

import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from jax_engine.config import EngineConfig, process_environment
from jax_engine.core.engine_view import EngineView
from jax_engine.core.messages import (
    AbortNamed,
    AdapterReply,
    AdminReply,
    Command,
    Event,
    Failed,
    IsSleeping,
    LoadAdapter,
    PrefixCacheReset,
    Profile,
    Ready,
    ResetPrefixCache,
    ServedAdapters,
    Shutdown,
    Sleep,
    Starting,
    StepOutputs,
    WakeUp,
)
from jax_engine.core.replica_devices import device_environment, replica_config
from jax_engine.core.stats import EngineStats
from jax_engine.frontend.progress import CompileBar, reports_of_start
from jax_engine.log_lines import log_format
from jax_engine.lora_request import LoRARequest

OnProgress = Callable[[Starting], object]
Answer = StepOutputs | PrefixCacheReset | AdapterReply | AdminReply | AbortNamed | ServedAdapters | EngineView

COMMANDS, EVENTS = "commands", "events"  # names of the two sockets of a channel, in a folder that both processes share


class EngineDeadError(RuntimeError):
    """The engine core has ended; no request can be served any more. The message says why."""


def endpoint(folder: str, name: str, channel: int) -> str:
    """The address of one of a channel's two sockets."""
    return f"ipc://{folder}/{name}-{channel}"


class InProcessCore:
    """The core in the caller's process and thread: what `LLM` uses. Mutable; owned by it."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and compile; ValueError when the model or the settings cannot be served."""
        if config.data_parallel_size != 1:
            raise ValueError(
                f"data_parallel_size={config.data_parallel_size} is for servers (`jax-engine serve`, AsyncLLM) and "
                "must be 1 here; start a process for each replica, with its part of the prompts"
            )
        if config.nnodes > 1:
            raise ValueError(
                f"nnodes={config.nnodes} needs an engine core in a process of its own: use `jax-engine serve`"
            )
        from jax_engine.core.engine_core import EngineCore  # JAX is imported with it

        with CompileBar() as bar, reports_of_start(bar.update) as watch:
            self._core: EngineCore = EngineCore(config, watch=watch)
        self.info = self._core.info

    def send(self, command: Command) -> None:
        self._core.handle(command)

    def reset_prefix_cache(self) -> bool:
        """Forget what free pages hold; False, and nothing is forgotten, while a request holds pages."""
        reply = self._core.handle(ResetPrefixCache())
        assert isinstance(reply, PrefixCacheReset)
        return reply.done

    def load_adapter(self, lora: LoRARequest) -> None:
        """Have an adapter in host memory; ValueError when it cannot be used."""
        reply = self._core.handle(LoadAdapter(lora))
        assert isinstance(reply, AdapterReply)
        if reply.error is not None:
            raise ValueError(reply.error)

    def admin(self, order: Sleep | WakeUp | IsSleeping | Profile) -> AdminReply:
        """Give an operator's order."""
        reply = self._core.handle(order)
        assert isinstance(reply, AdminReply)
        return reply

    def has_work(self) -> bool:
        return self._core.has_work

    def step(self) -> StepOutputs:
        """One engine step; blocks until the step before it has run."""
        return self._core.step()

    def stats(self) -> EngineStats:
        return self._core.stats()

    def wait_until_compiled(self) -> None:
        """Block until every step program is compiled, not only the largest: for measuring."""
        self._core.runner.compiled.wait()

    def shutdown(self) -> None:
        self._core.shutdown()


class CoreConnection:
    """A front end's two sockets to a core in another process. Mutable; owned by one `AsyncLLM`, in one event loop."""

    def __init__(self, folder: str, channel: int, ended: "asyncio.Future[str]") -> None:
        """`folder` and `channel` name the sockets; `ended` gets the reason when the core has ended."""
        self.folder = folder
        self.info = Ready(0, 0, 0, 0)
        self._ended = ended
        self._context = zmq.asyncio.Context()
        # Sends must not wait for the event loop: the plain socket underneath is used, with no limit on its queue.
        commands = _bind(self._context, endpoint(folder, COMMANDS, channel), zmq.PUSH)
        self._commands: zmq.Socket[bytes] = zmq.Socket.shadow(commands)
        self._events = _bind(self._context, endpoint(folder, EVENTS, channel), zmq.PULL)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

    async def wait_until_ready(self, on_progress: OnProgress | None = None) -> None:
        """Return once the core serves, and take its `info`; `on_progress` is told meanwhile how far it is.

        Raises:
            ValueError: the model or the settings cannot be served.
            EngineDeadError: the core failed for another reason.
        """
        while isinstance(event := await self._next_event(), Starting):
            if on_progress is not None:
                on_progress(event)
        assert isinstance(event, Ready)
        self.info = event

    def send(self, command: Command) -> None:
        """Queue a command; never blocks. To a dead core it does nothing: `receive` reports the death."""
        try:
            self._commands.send(self._encoder.encode(command), flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            if not self._ended.done():
                raise

    async def receive(self) -> Answer:
        """The outputs of the next step, or the answer to a command; EngineDeadError once the core has died."""
        event = await self._next_event()
        assert not isinstance(event, Ready | Starting)
        return event

    async def shutdown(self) -> None:
        """Release the sockets."""
        self._events.close(linger=0)
        self._commands.close(linger=0)
        self._context.destroy(linger=0)

    async def _next_event(self) -> Starting | Ready | Answer:
        received = asyncio.ensure_future(self._events.recv())
        try:
            either: set[asyncio.Future[Any]] = {received, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not received.done() and not await self._events.poll(timeout=0):
                raise EngineDeadError(self._ended.result())
            event = self._decoder.decode(await received)
        finally:
            received.cancel()
        if isinstance(event, Failed):
            raise ValueError(event.reason) if event.user_error else EngineDeadError(event.reason)
        return event


class CoreProcess(CoreConnection):
    """A core in a process of its own, and the first connection to it. Mutable; owned by whoever started it, in one
    event loop.
    """

    def __init__(self, process: Process, folder: str, name: str) -> None:
        """Use `spawn`."""
        super().__init__(folder, 0, asyncio.create_task(_epitaph_of(f"the engine {name}", process)))
        self.process = process

    @classmethod
    async def spawn(cls, config: EngineConfig, *, num_channels: int = 1, replica: int = 0) -> "CoreProcess":
        """Start the core of a replica, which takes commands from `num_channels` connections; returns before it serves.

        ValueError when there is no device for it.
        """
        name, environment = "core", process_environment()
        if config.data_parallel_size > 1:
            name = f"core {replica}"
            num_devices = prod(config.parallel_sizes)
            environment |= device_environment(replica, config.data_parallel_size, num_devices, environment)
        folder = tempfile.mkdtemp(prefix="jax_engine_")
        # The child's standard input carries the settings, and its end tells the child that this process is gone.
        # -P: a folder named jax_engine where the user happens to stand is not the package.
        command = (sys.executable, "-P", "-m", "jax_engine.core.core_process", folder)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, env=environment)
        core = cls(process, folder, name)
        level = logging.getLogger("jax_engine").getEffectiveLevel()
        assert process.stdin is not None
        logs = {"name": name, "log_level": level, "log_format": log_format()}
        settings = {"config": asdict(replica_config(config, replica)), **logs, "num_channels": num_channels}
        process.stdin.write(json.dumps(settings).encode() + b"\n")
        return core

    async def shutdown(self, timeout: float = 5.0) -> None:
        """End the core, by force after `timeout` seconds, and release sockets and files."""
        if self.process.returncode is None and timeout > 0:
            self.send(Shutdown())
            await asyncio.wait({self._ended}, timeout=timeout)
        if self.process.returncode is None:
            self.process.kill()
        await self._ended
        await super().shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


async def _epitaph_of(what: str, process: Process) -> str:
    """Why a process that said nothing has ended, once it has."""
    return epitaph(what, await process.wait())


def _bind(context: zmq.asyncio.Context, address: str, kind: int) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.bind(address)
    return socket


def epitaph(what: str, status: int) -> str:
    """How the process `what` ended, by its exit status."""
    if status < 0:
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return f"{what} was ended by signal {signal.Signals(-status).name}{hint}"
    return f"{what} exited with status {status}; its log says why"
