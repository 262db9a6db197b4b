"""`jax-engine serve`: the listening socket, uvicorn, signals, and the process's end."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Literal, cast

import uvicorn
from starlette.types import ASGIApp

from jax_engine.config import EngineConfig
from jax_engine.server.app import build_app
from jax_engine.server.connection import Connection
from jax_engine.server.listening import BACKLOG, log_address, tls_context
from jax_engine.server.service import BACKSTOP_SECONDS, EXIT_ENGINE_DEAD, EXIT_OK, Service
from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

# How long a server whose engine has died says so on /health before it exits.
FAREWELL_SECONDS = 3.0


class EngineServer(uvicorn.Server):
    """uvicorn's server around a service: it ends when the service fails, and tells what still runs when the grace
    period ends. Mutable; owned by its process.
    """

    def __init__(self, make_service: Callable[[Callable[[], None]], Service]) -> None:
        """`make_service` is given what the service is to call when it fails."""
        self.service = make_service(self._end_soon)
        settings = self.service.settings
        super().__init__(http_config(build_app(self.service), settings))
        # uvicorn raises the signal again after its orderly shutdown; that must not kill the process any more.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _ignore)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.is_draining = True  # at once, not when uvicorn next looks
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self.service.settings.shutdown_timeout
        logger.info("shutting down; requests in flight have %g seconds", grace)
        stopping = asyncio.get_running_loop().call_later(grace, self.service.in_flight.stop)
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()

    def _end_soon(self) -> None:
        delay = FAREWELL_SECONDS if self.service.exit_code == EXIT_ENGINE_DEAD else 0
        asyncio.get_running_loop().call_later(delay, self._end_now)

    def _end_now(self) -> None:
        self.should_exit = True


def http_config(app: ASGIApp, settings: ServerSettings, *, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    """How uvicorn serves an app; ValueError when a file that TLS needs cannot be used."""
    tls = tls_context(settings)
    return uvicorn.Config(
        app,
        http=cast("type[asyncio.Protocol]", partial(Connection, settings=settings)),
        ws="none",
        lifespan=lifespan,
        ssl_context_factory=None if tls is None else lambda _config, _default: tls,
        timeout_keep_alive=cast("int", settings.timeout_keep_alive),  # it takes any number
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(settings.shutdown_timeout) + BACKSTOP_SECONDS,
    )


def serve(engine_config: EngineConfig, settings: ServerSettings, listening: socket.socket) -> int:
    """Serve on `listening` until a signal or the engine's death; returns the exit code."""
    server = EngineServer(lambda end: Service(engine_config, settings, on_failure=end))
    log_address(settings, listening)
    service = server.service
    server.run(sockets=[listening])
    if service.exit_code != EXIT_OK:
        print(f"jax-engine serve: error: {service.reason}", file=sys.stderr)
    return service.exit_code


def _ignore(number: int, frame: object) -> None:
    """A signal handler that does nothing."""
