"""One client's connection: uvicorn's, with limits on what a client may send before anything looks at it, and on how
long it may take.
"""

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from jax_engine.server.errors import ApiError
from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)

# A body in chunks of a byte, the worst that is still HTTP, costs five more for each; what comes beyond is no body.
OVERHEAD_PER_BODY_BYTE = 8
# Between a header's name and its value, and behind it.
SEPARATORS = len(": \r\n")
# A client that is still sending loses a refusal if its connection ends at once: what comes is dropped for a while.
LINGER_SECONDS = 1.0


class Connection(HttpToolsProtocol):
    """A connection with limits, whose client is told in OpenAI's error object what it did wrong. Mutable; owned by the
    event loop.

    The number of connections that there are when a request comes is in its scope's `state`.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        settings: ServerSettings,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._max_head_bytes = settings.h11_max_incomplete_event_size
        self._max_headers = settings.h11_max_header_count
        self._receive_timeout = settings.receive_timeout
        self._deadline: asyncio.TimerHandle | None = None  # of what the client is sending
        self._receiving = False  # between the first byte of a request and its last
        self._head_bytes = 0  # of the request's first line and headers, trailers included
        self._raw_bytes = 0  # of the whole request, as far as it was received by itself
        self._body_bytes = 0
        self._refusal: ApiError | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._start_clock()
        self._raw_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # there is nothing to upgrade to: the request is answered as it stands
        except httptools.HttpParserError:
            self._refuse(self._refusal or ApiError(400, "this is not valid HTTP", code="invalid_http"))
        overhead = self._raw_bytes - OVERHEAD_PER_BODY_BYTE * self._body_bytes
        if self._receiving and overhead > self._max_head_bytes:
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving = True
        self._head_bytes = self._body_bytes = self._raw_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + SEPARATORS)

    def on_headers_complete(self) -> None:
        self._start_clock()  # anew, for the body
        self.scope["state"]["connections"] = len(self.connections)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._receiving = False
        self._stop_clock()
        super().on_message_complete()

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._max_head_bytes or len(self.headers) > self._max_headers:
            self._refusal = self._too_large()
            raise self._refusal  # out of the parser, as an HttpParserError

    def _too_large(self) -> ApiError:
        message = (
            f"the request has more than {self._max_head_bytes} bytes or {self._max_headers} lines of headers; "
            "send fewer, or start the server with --h11-max-incomplete-event-size or --h11-max-header-count"
        )
        return ApiError(431, message, code="headers_too_large")

    def _refuse(self, error: ApiError) -> None:
        """Answer with `error`, unless that would be in the middle of another response, and close."""
        self._stop_clock()
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if self.pipeline or (self.cycle and self.cycle.response_started and not self.cycle.response_complete):
            self.transport.close()
            return
        response = error.response("/")  # its path may not have come
        head = [STATUS_LINE[error.status], b"connection: close\r\n"]
        head += [name + b": " + value + b"\r\n" for name, value in response.raw_headers if name != b"connection"]
        self.transport.write(b"".join([*head, b"\r\n", bytes(response.body)]))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)
        logger.warning("a request was refused before it was read: %s", error.message)

    def _start_clock(self) -> None:
        self._stop_clock()
        self._deadline = self.loop.call_later(self._receive_timeout, self._too_slow)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        """The client is still sending a request, or has not begun one."""
        self._deadline = None
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False  # the application is reading the body, and has a clock of its own
        elif self._receiving and (self.cycle is None or self.cycle.scope is not self.scope):  # in the headers
            self._refuse(too_slow(self._receive_timeout))
        else:
            self.transport.close()


def too_slow(seconds: float) -> ApiError:
    """The answer to a client that does not get its request sent."""
    message = f"the request did not come within {seconds:g} seconds; the server's --receive-timeout is the limit"
    return ApiError(408, message, code="receive_timeout", headers={"connection": "close"})
