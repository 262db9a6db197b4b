"""Reading a request's body, and no more of it than allowed."""

import asyncio
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request

from jax_engine.server.errors import ApiError
from jax_engine.server.in_flight import ClientGoneError

# A client that is still sending would not see a refusal: of what is too much, this much more is read and dropped first.
LINGER_BYTES = 64 * 2**20
LINGER_SECONDS = 2.0


async def read_body(request: Request, *, limit: int) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413 when it is longer than `limit` bytes, found by counting and not only by its declared length;
            415 when it is compressed.
        ClientGoneError: the connection ended before the body did.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(
            415,
            f"content-encoding {encoding!r} is not supported; send the body uncompressed",
            code="unsupported_encoding",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        await _refuse(request, limit, sent=0)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            chunks.append(chunk)
            if size > limit:
                break
    except ClientDisconnect:
        raise ClientGoneError from None
    if size > limit:
        chunks.clear()
        await _refuse(request, limit, sent=size)
    return b"".join(chunks)


async def _refuse(request: Request, limit: int, *, sent: int) -> NoReturn:
    """Drop what is still coming, for a while, then say that it was too much."""
    if request.headers.get("expect", "").lower() != "100-continue":  # such a client waits for leave to send
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                dropped = 0
                async for chunk in request.stream():
                    dropped += len(chunk)
                    if dropped > LINGER_BYTES:
                        break
        except TimeoutError:
            pass
        except ClientDisconnect:
            raise ClientGoneError from None
    message = f"the body has more than {limit} bytes; send less, or start the server with --max-request-body-bytes"
    raise ApiError(413, message, code="request_too_large", headers={"connection": "close"})
