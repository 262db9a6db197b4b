"""Whom the terminal's commands talk to: a server by its address, or the same routes in this process."""

import asyncio
import http.client
import urllib.error
import urllib.request
from collections.abc import Generator, Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any, Protocol

import msgspec

from jax_engine.config import EngineConfig
from jax_engine.server.cli.in_process import in_process_server
from jax_engine.server.settings import ServerSettings

CONNECT_SECONDS = 600.0
PREFIX = b"data: "
Chunks = Generator[dict[str, Any], None, None]


class Partner(Protocol):
    """Whom one talks to."""

    def stream(self, path: str, body: dict[str, Any]) -> Chunks:
        """The chunks of a streamed answer to `body`; leaving the iterator stops it. ValueError: it cannot answer."""

    def close(self) -> None:
        """Say goodbye."""


class RemotePartner:
    """A server with OpenAI's routes. Mutable; owned by its command."""

    def __init__(self, url: str, api_key: str | None, model: str | None) -> None:
        base = url.rstrip("/")
        self._base = base.removesuffix("/v1")
        self._model = {"model": model} if model else {}
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    def stream(self, path: str, body: dict[str, Any]) -> Chunks:
        url = self._base + path
        content = msgspec.json.encode({**self._model, **body, "stream": True})
        try:
            request = urllib.request.Request(url, content, self._headers, method="POST")
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response:
                yield from chunks(response)
        except urllib.error.HTTPError as error:
            raise ValueError(f"{url} answered {error.code}: {error_message(error.read())}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(f"the connection to {url} failed: {error}") from error

    def close(self) -> None:
        """Nothing is kept open between answers."""


class LocalPartner:
    """The server's routes in this process, with an engine of their own. Mutable; owned by its command. Its event loop
    runs while an answer is awaited.
    """

    def __init__(self, config: EngineConfig, settings: ServerSettings) -> None:
        """ValueError, EngineDeadError: see `in_process_server`."""
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        try:
            server = in_process_server(config, settings)
            self._server = self._runner.run(self._stack.enter_async_context(server))
        except BaseException:
            self._runner.close()
            raise

    def stream(self, path: str, body: dict[str, Any]) -> Chunks:
        messages = self._server.exchange(path, msgspec.json.encode({**body, "stream": True}))
        try:
            started = self._runner.run(_next_message(messages))
            assert started is not None
            pieces = self._pieces(messages)
            if started["status"] != 200:
                raise ValueError(error_message(b"".join(pieces)))
            yield from chunks(lines(pieces))
        finally:
            self._runner.run(messages.aclose())

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def _pieces(self, messages: Any) -> Iterator[bytes]:
        while (message := self._runner.run(_next_message(messages))) is not None:
            yield message.get("body", b"")


async def _next_message(messages: Any) -> Any:
    return await anext(messages, None)


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines in a stream of bytes, each as soon as it is whole."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
    if rest:
        yield rest


def chunks(lines_of_stream: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event; ValueError for an error among them."""
    for line in lines_of_stream:
        if line.startswith(PREFIX + b"{"):
            chunk = msgspec.json.decode(line[len(PREFIX) :])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            yield chunk


def error_message(body: bytes) -> str:
    """OpenAI's error message if `body` holds one, else its beginning."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body[:200].decode(errors="replace")
