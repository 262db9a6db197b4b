"""`jax-engine serve`: the listening socket, uvicorn, signals, and the process's end."""

import asyncio
import logging
import signal
import socket
import sys

import uvicorn

from jax_engine.config import EngineConfig
from jax_engine.server.app import build_app
from jax_engine.server.listening import BACKLOG
from jax_engine.server.service import EXIT_ENGINE_DEAD, EXIT_OK, Service
from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

# How long a server whose engine has died says so on /health before it exits.
FAREWELL_SECONDS = 3.0
# uvicorn's own limit is only there for what our end of the grace period does not reach, such as a slow upload.
BACKSTOP_SECONDS = 5


class EngineServer(uvicorn.Server):
    """uvicorn's server; what still runs when the grace period ends is told so. Mutable; owned by `serve`."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        grace = self._service.settings.shutdown_timeout
        logger.info("shutting down; requests in flight have %g seconds", grace)
        stopping = asyncio.get_running_loop().call_later(grace, self._service.in_flight.stop)
        try:
            await super().shutdown(sockets)
        finally:
            stopping.cancel()


def serve(engine_config: EngineConfig, settings: ServerSettings, listening: socket.socket) -> int:
    """Serve on `listening` until a signal or the engine's death; returns the exit code."""

    def end_soon() -> None:
        delay = FAREWELL_SECONDS if service.exit_code == EXIT_ENGINE_DEAD else 0
        asyncio.get_running_loop().call_later(delay, end_now)

    def end_now() -> None:
        server.should_exit = True

    service = Service(engine_config, settings, on_failure=end_soon)
    config = uvicorn.Config(
        build_app(service),
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(settings.shutdown_timeout) + BACKSTOP_SECONDS,
    )
    server = EngineServer(config, service)
    # uvicorn raises the signal again after its orderly shutdown; that must not kill the process any more.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    host, port = listening.getsockname()[:2]
    logger.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    if not settings.api_keys and host not in ("127.0.0.1", "::1"):
        logger.info("any machine that reaches this one may use it; --api-key KEY or --host 127.0.0.1 prevents that")
    server.run(sockets=[listening])
    if service.exit_code != EXIT_OK:
        print(f"jax-engine serve: error: {service.reason}", file=sys.stderr)
    return service.exit_code


def _ignore(number: int, frame: object) -> None:
    """A signal handler that does nothing."""
