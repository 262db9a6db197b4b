"""How a front end reaches the engine core: in its own process, or in another one over ZeroMQ and msgpack."""

import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from dataclasses import asdict
from typing import TYPE_CHECKING

import msgspec
import zmq
import zmq.asyncio

from jax_engine.config import EngineConfig
from jax_engine.messages import (
    Command,
    Event,
    Failed,
    PrefixCacheReset,
    Ready,
    ResetPrefixCache,
    Shutdown,
    StepOutputs,
)
from jax_engine.stats import EngineStats

if TYPE_CHECKING:
    pass

COMMANDS, EVENTS = "commands", "events"  # names of the two sockets in the folder that both processes share


class EngineDeadError(RuntimeError):
    """The engine core has ended; no request can be served any more. The message says why."""


def endpoint(folder: str, name: str) -> str:
    """The address of one of the two sockets."""
    return f"ipc://{folder}/{name}"


class InProcessCore:
    """The core in the caller's process and thread: what `LLM` uses. Mutable; owned by it."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model and compile; ValueError when the model or the settings cannot be served."""
        from jax_engine.engine_core import EngineCore  # JAX is imported with it

        self._core: EngineCore = EngineCore(config)
        self.info = self._core.info

    def send(self, command: Command) -> None:
        self._core.handle(command)

    def reset_prefix_cache(self) -> bool:
        """Forget what free pages hold; False, and nothing is forgotten, while a request holds pages."""
        reply = self._core.handle(ResetPrefixCache())
        assert isinstance(reply, PrefixCacheReset)
        return reply.done

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


class CoreProcess:
    """The core in a process of its own: what `AsyncLLM` uses. Mutable; owned by it, in one event loop."""

    def __init__(self, process: Process, folder: str, context: zmq.asyncio.Context) -> None:
        """Use `start`."""
        self.process = process
        self._folder = folder
        self._context = context
        # Sends must not wait for the event loop: the plain socket underneath is used, with no limit on its queue.
        self._commands: zmq.Socket[bytes] = zmq.Socket.shadow(_bind(context, folder, COMMANDS, zmq.PUSH))
        self._events = _bind(context, folder, EVENTS, zmq.PULL)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)
        self._exited = asyncio.create_task(process.wait())
        self.info = Ready(0, 0, 0, 0)

    @classmethod
    async def start(cls, config: EngineConfig) -> "CoreProcess":
        """Start the core and wait until it serves.

        Raises:
            ValueError: the model or the settings cannot be served.
            EngineDeadError: the core failed for another reason.
        """
        folder = tempfile.mkdtemp(prefix="jax_engine_")
        # The child's standard input carries the settings, and its end tells the child that this process is gone.
        # -P: a folder named jax_engine where the user happens to stand is not the package.
        command = (sys.executable, "-P", "-m", "jax_engine.core_process", folder)
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE)
        core = cls(process, folder, zmq.asyncio.Context())
        level = logging.getLogger("jax_engine").getEffectiveLevel()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"config": asdict(config), "log_level": level}).encode() + b"\n")
        try:
            event = await core._next_event()
        except BaseException:  # cancelled, or dead already: nothing of it may stay behind
            await core.shutdown(timeout=0)
            raise
        assert isinstance(event, Ready)
        core.info = event
        return core

    def send(self, command: Command) -> None:
        """Queue a command; never blocks. To a dead core it does nothing: `receive` reports the death."""
        try:
            self._commands.send(self._encoder.encode(command), flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            if self.process.returncode is None:
                raise

    async def receive(self) -> StepOutputs | PrefixCacheReset:
        """The outputs of the next step, or the answer to a command; EngineDeadError once the core has died."""
        event = await self._next_event()
        assert not isinstance(event, Ready)
        return event

    async def shutdown(self, timeout: float = 5.0) -> None:
        """End the core, by force after `timeout` seconds, and release sockets and files."""
        if self.process.returncode is None and timeout > 0:
            self.send(Shutdown())
            await asyncio.wait({self._exited}, timeout=timeout)
        if self.process.returncode is None:
            self.process.kill()
        await self._exited
        self._events.close(linger=0)
        self._commands.close(linger=0)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _next_event(self) -> Ready | StepOutputs | PrefixCacheReset:
        received = asyncio.ensure_future(self._events.recv())
        try:
            await asyncio.wait({received, self._exited}, return_when=asyncio.FIRST_COMPLETED)
            if not received.done() and not await self._events.poll(timeout=0):
                raise EngineDeadError(_epitaph(self._exited.result()))
            event = self._decoder.decode(await received)
        finally:
            received.cancel()
        if isinstance(event, Failed):
            raise ValueError(event.reason) if event.user_error else EngineDeadError(event.reason)
        return event


def _bind(context: zmq.asyncio.Context, folder: str, name: str, kind: int) -> zmq.asyncio.Socket:
    socket = context.socket(kind)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.bind(endpoint(folder, name))
    return socket


def _epitaph(status: int) -> str:
    """Why a core that said nothing is gone."""
    if status < 0:
        hint = " (out of memory?)" if status == -signal.SIGKILL else ""
        return f"the engine core was ended by signal {signal.Signals(-status).name}{hint}"
    return f"the engine core exited with status {status}; its log says why"
