"""A minimal asynchronous HTTP/1.1 client for measuring: its own cost per streamed token is a few microseconds.

General clients spend as long on a chunk as a fast engine spends on the token in it, and on a small machine they would
take that time from the server under test.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


class RequestError(Exception):
    """The server refused a request, or its answer is no HTTP."""


@dataclass(frozen=True)
class Target:
    """Where requests go: the part of the address before `/v1`."""

    url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base URL {self.url!r} must look like http://localhost:8000")

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def tls(self) -> bool:
        return urlsplit(self.url).scheme == "https"

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (443 if self.tls else 80)


async def get(target: Target, path: str) -> str:
    """The body of a successful GET.

    Raises:
        RequestError: any status but 200.
        OSError: no connection.
    """
    async with _request(target, "GET", path, b"") as lines:
        return "\n".join([line async for line in lines])


async def post(target: Target, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST `body`; the JSON of a successful answer.

    Raises:
        RequestError: any status but 200.
        OSError: no connection.
    """
    async with _request(target, "POST", path, json.dumps(body).encode()) as lines:
        answer: dict[str, Any] = json.loads("\n".join([line async for line in lines]))
    return answer


async def stream(target: Target, path: str, body: dict[str, Any]) -> AsyncGenerator[tuple[float, dict[str, Any]], None]:
    """POST `body` and yield each server-sent event's JSON with its arrival time (`time.perf_counter`), until `[DONE]`.

    Raises:
        RequestError: any status but 200, or an error event in the stream.
        OSError: no connection, or a lost one.
    """
    async with _request(target, "POST", path, json.dumps(body).encode()) as lines:
        async for line in lines:
            if not line.startswith("data:"):
                continue
            arrival, data = time.perf_counter(), line[5:].strip()
            if data == "[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise RequestError(str(event["error"]))
            yield arrival, event


@asynccontextmanager
async def _request(target: Target, method: str, path: str, body: bytes) -> AsyncIterator[AsyncIterator[str]]:
    """Send one request on a connection of its own and give the lines of a successful answer."""
    reader, writer = await asyncio.open_connection(target.host, target.port, ssl=target.tls or None)
    try:
        headers = [
            f"{method} {urlsplit(target.url).path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {target.host}:{target.port}",
        ]
        headers += ["Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        if target.api_key is not None:
            headers.append(f"Authorization: Bearer {target.api_key}")
        writer.write("\r\n".join([*headers, "", ""]).encode() + body)
        status, chunked = await _read_head(reader)
        lines = _lines(_body(reader, chunked=chunked))
        if status != 200:
            raise RequestError(f"{method} {path}: status {status}: " + " ".join([line async for line in lines])[:500])
        yield lines
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body is chunked)."""
    status_line, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, rest = status_line.partition(" ")
    if not version.startswith("HTTP/1."):
        raise RequestError(f"not an HTTP/1 answer: {status_line[:80]!r}")
    fields = dict(header.lower().split(":", 1) for header in headers if header)
    return int(rest[:3]), fields.get("transfer-encoding", "").strip() == "chunked"


async def _body(reader: asyncio.StreamReader, *, chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes; without chunks it ends with the connection, which every request here asks to close."""
    while chunked:
        size = int((await reader.readline()).split(b";")[0], 16)
        data = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield data[:-2]
    while data := await reader.read(1 << 16):
        yield data


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[str]:
    rest = b""
    async for piece in pieces:
        *complete, rest = (rest + piece).split(b"\n")
        for line in complete:
            yield line.decode().rstrip("\r")
    if rest:
        yield rest.decode()
