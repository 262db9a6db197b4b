"""The server's routes without a server: the same app and engine, called in this process."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Scope

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import EngineDeadError
from jax_engine.server.app import build_app
from jax_engine.server.service import EXIT_USER_ERROR, Service, State
from jax_engine.server.settings import ServerSettings

POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Answer:
    """A route's whole answer to one request."""

    status: int
    request_id: str
    content_type: str
    body: bytes


@dataclass(frozen=True)
class InProcessServer:
    """An app whose engine serves requests."""

    app: ASGIApp
    service: Service

    def check_alive(self) -> None:
        """EngineDeadError once the engine has died."""
        if self.service.state is State.DEAD:
            raise EngineDeadError(self.service.reason)

    async def post(self, path: str, body: bytes) -> Answer:
        """What the route answers to a JSON body, read to its end."""
        async with aclosing(self.exchange(path, body)) as messages:
            started, *pieces = [message async for message in messages]
        headers = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in started["headers"]}
        content = b"".join(piece.get("body", b"") for piece in pieces)
        return Answer(started["status"], headers.get("x-request-id", ""), headers.get("content-type", ""), content)

    async def exchange(self, path: str, body: bytes) -> AsyncGenerator[Message, None]:
        """ASGI's messages of the answer as they come: its start, then pieces. To close it early is to leave."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        asked = False

        async def receive() -> Message:
            nonlocal asked
            if asked:
                await left.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        answering = asyncio.ensure_future(self.app(post_scope(path, len(body)), receive, send))
        answering.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            answering.result()
        finally:
            left.set()
            await asyncio.wait({answering})


def post_scope(path: str, length: int) -> Scope:
    """What an HTTP server would tell the app of a POST of `length` bytes of JSON."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [
            (b"host", b"in-process"),
            (b"content-type", b"application/json"),
            (b"content-length", str(length).encode()),
        ],
        "client": None,
        "server": ("in-process", None),
    }


@asynccontextmanager
async def in_process_server(config: EngineConfig, settings: ServerSettings) -> AsyncIterator[InProcessServer]:
    """A server of this process, its engine ready, ended with the block.

    Raises:
        ValueError: the model or the settings cannot be served.
        EngineDeadError: the engine failed for another reason.
    """
    service = Service(config, settings, on_failure=lambda: None)
    server = InProcessServer(build_app(service), service)
    service.begin()
    try:
        while service.state is State.STARTING:
            await asyncio.sleep(POLL_SECONDS)
        if service.state is State.DEAD and service.exit_code == EXIT_USER_ERROR:
            raise ValueError(service.reason)
        server.check_alive()
        yield server
    finally:
        await service.end()
