"""What every HTTP request passes: a request id, the API key, limits on connections and on slow bodies, the last resort
for errors, one line in the log.
"""

import asyncio
import hmac
import logging
import re
import time
import uuid
from hashlib import sha256

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_engine.server.connection import too_slow
from jax_engine.server.errors import ApiError, is_anthropic, unavailable
from jax_engine.server.in_flight import ClientGoneError, ShuttingDownError
from jax_engine.server.metrics.http_metrics import HttpMetrics
from jax_engine.server.page_files import page_files
from jax_engine.server.settings import ServerSettings
from jax_engine.server.tracing import Tracer
from jax_engine.server.tracking import RequestRecord

logger = logging.getLogger(__name__)

# Served without a key, as in vLLM: probes and scrapers have none.
OPEN_PATHS = frozenset({"/health", "/ping", "/live", "/version", "/metrics", *page_files()})
# Not worth a line of the log each time: who looks at the page asks for the last one once a second.
QUIET_PATHS = OPEN_PATHS | {"/engine_state"}
# What a client may choose as its request id: it is written into logs and headers.
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(
        self, app: ASGIApp, *, settings: ServerSettings, http_metrics: HttpMetrics, tracer: Tracer | None
    ) -> None:
        self._app = app
        self._http_metrics = http_metrics
        self._tracer = tracer
        # Hashes are compared: they are all of one length, and are no use to who reads them in a memory dump.
        self._key_hashes = tuple(sha256(key.encode()).digest() for key in settings.api_keys)
        self._log_requests = settings.enable_log_requests
        self._max_connections = settings.limit_concurrency
        self._receive_timeout = settings.receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, headers = get_route_path(scope), dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id"))
        record = RequestRecord(request_id)
        span = None if self._tracer is None else self._tracer.begin(headers)
        scope.setdefault("state", {})["record"] = record
        # Anthropic's clients read it under a name of their own.
        id_headers = (b"x-request-id", b"request-id") if is_anthropic(path) else (b"x-request-id",)
        status: int | None = None
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *((name, request_id.encode()) for name in id_headers)]
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            self._check_key(path, headers)
            self._check_connections(path, scope)
            await self._app(scope, timed(receive, self._receive_timeout), send_with_id)
        except ApiError as error:
            await self._refuse(record, error, status, scope, receive, send_with_id)
        except ClientGoneError:
            record.note = "the client left"
        except ShuttingDownError:
            await self._refuse(record, shutting_down(), status, scope, receive, send_with_id)
        except Exception as error:  # the server's boundary: the log has it all, the client the id to ask by
            logger.exception("request %s failed", request_id, extra={"fields": {"request_id": request_id}})
            record.note = type(error).__name__
            message = f"internal error; the server's log has it under the request id {request_id}"
            refusal = ApiError(500, message, code="internal_error")
            await self._refuse(record, refusal, status, scope, receive, send_with_id)
        finally:
            self._http_metrics.observe(scope, status, time.monotonic() - record.started)
            quiet = path in QUIET_PATHS or not self._log_requests
            level = logging.DEBUG if quiet else logging.INFO
            if not complete and record.note is None:
                record.note = "not answered in full"
            # The path as it was sent: decoded, it could hold a line end and forge lines of the log.
            sent_path = scope["raw_path"].decode("ascii", "replace")
            if self._tracer is not None and span is not None:
                self._tracer.end(span, record, status)
            fields = record.fields(scope["method"], sent_path, status)
            logger.log(level, "%s", record.line(fields), extra={"fields": fields})

    def _check_connections(self, path: str, scope: Scope) -> None:
        """Refuse what comes by a connection too many; probes and scrapers are told how the server is all the same."""
        if self._max_connections is None or path in OPEN_PATHS:
            return
        if scope["state"].get("connections", 0) > self._max_connections:
            message = f"all {self._max_connections} connections that --limit-concurrency allows are taken; try again"
            error = unavailable(message, code="too_many_connections", retry_after=1)
            error.headers["connection"] = "close"
            raise error

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._key_hashes or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        bearer = given.strip() if scheme.lower() == b"bearer" else b""
        # Every key is compared, each in constant time, so that the time taken tells nothing about any of them.
        sent = [sha256(given).digest() for given in (bearer, headers.get(b"x-api-key", b""))]
        matches = [hmac.compare_digest(given, key) for key in self._key_hashes for given in sent]
        if not any(matches):
            message = "no valid API key; send it in the header 'Authorization: Bearer KEY', or in 'x-api-key: KEY'"
            headers_out = {"www-authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers_out)

    async def _refuse(
        self, record: RequestRecord, error: ApiError, status: int | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer with `error`; once a response has begun, leave it incomplete, which closes the connection."""
        record.note = record.note or error.code
        if status is None:
            await error.response(get_route_path(scope))(scope, receive, send)


def timed(receive: Receive, seconds: float) -> Receive:
    """`receive`, which raises ApiError 408 when the request's body is not there within `seconds` from now."""
    deadline = asyncio.get_running_loop().time() + seconds
    body_is_there = False

    async def receive_in_time() -> Message:
        nonlocal body_is_there
        if body_is_there:  # now whoever waits waits for the client to leave
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise too_slow(seconds) from None
        body_is_there = not message.get("more_body", False)
        return message

    return receive_in_time


def request_id_of(given: bytes | None) -> str:
    """The client's own request id if it is printable and short, else a new one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return uuid.uuid4().hex


def shutting_down() -> ApiError:
    """The answer to a request that did not finish within the grace period."""
    return ApiError(503, "the server is shutting down", code="shutting_down")
