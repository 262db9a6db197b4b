"""A client that only keeps what it receives, and looks at it when the stream has ended: to find a server's limit.

It costs a few microseconds a chunk, all that it takes from the cores of the server. `bench_client` of the package tells
when each token came; this one does not.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from jax_engine.server.bench.client import RequestError, Target

END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True)
class StreamedText:
    """One streamed completion: its text, how many events carried it, and the tokens that the server counted."""

    text: str
    num_events: int
    num_tokens: int


async def streamed_texts(target: Target, path: str, bodies: Sequence[dict[str, Any]]) -> list[StreamedText]:
    """POST every body at once, each on a connection of its own, and read all answers to their ends.

    Raises:
        RequestError: any status but 200, or a stream that does not end with its usage and `[DONE]`.
        OSError: no connection.
    """
    loop = asyncio.get_running_loop()
    protocols = [_Connection(_request(target, path, body), loop.create_future()) for body in bodies]

    async def connect(own: _Connection) -> None:
        await loop.create_connection(lambda: own, target.host, target.port)

    await asyncio.gather(*map(connect, protocols))
    await asyncio.gather(*(own.ended for own in protocols))
    return [_parse(b"".join(own.received)) for own in protocols]


class _Connection(asyncio.Protocol):
    """Sends one request and keeps the answer. Mutable; owned by `streamed_texts`."""

    def __init__(self, request: bytes, ended: "asyncio.Future[None]") -> None:
        self.received: list[bytes] = []
        self.ended = ended
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        self.received.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set_result(None)


def _request(target: Target, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {target.host}\r\nConnection: close\r\nContent-Length: {len(content)}"
    return head.encode() + END_OF_HEAD + content


def _parse(answer: bytes) -> StreamedText:
    head, _, body = answer.partition(END_OF_HEAD)
    status = head.split(b"\r\n", 1)[0]
    events = _without_chunks(body).split(b"\n\n")
    if b" 200 " not in status or events[-2:] != [b"data: [DONE]", b""]:
        raise RequestError(f"{status.decode('latin-1')!r}: {body[-500:]!r}")
    *pieces, last = [json.loads(event.removeprefix(b"data: ")) for event in events[:-2]]
    texts = [choice["text"] for piece in pieces for choice in piece["choices"]]
    return StreamedText("".join(texts), len(pieces), last["usage"]["completion_tokens"])


def _without_chunks(body: bytes) -> bytes:
    """The content of a chunked body (RFC 9112, section 7.1)."""
    content: list[bytes] = []
    position = 0
    while True:
        end = body.find(b"\r\n", position)
        if end < 0 or (size := int(body[position:end], 16)) == 0:
            return b"".join(content)
        content.append(body[end + 2 : end + 2 + size])
        position = end + 2 + size + 2
