"""What every HTTP request passes: a request id, the API key, the last resort for errors, one line in the log."""

import hmac
import logging
import re
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_engine.server.errors import ApiError, is_anthropic
from jax_engine.server.in_flight import ClientGoneError, ShuttingDownError
from jax_engine.server.page_files import page_files
from jax_engine.server.tracking import RequestRecord

logger = logging.getLogger(__name__)

# Served without a key, as in vLLM: probes and scrapers have none.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/metrics", *page_files()})
# What a client may choose as its request id: it is written into logs and headers.
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...], log_requests: bool) -> None:
        self._app = app
        self._api_keys = tuple(key.encode() for key in api_keys)
        self._log_requests = log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id"))
        record = RequestRecord(request_id)
        scope.setdefault("state", {})["record"] = record
        # Anthropic's clients read it under a name of their own.
        id_headers = (b"x-request-id", b"request-id") if is_anthropic(scope["path"]) else (b"x-request-id",)
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
            self._check_key(scope["path"], headers)
            await self._app(scope, receive, send_with_id)
        except ApiError as error:
            record.note = error.code
            await error.response(scope["path"])(scope, receive, send_with_id)
        except ClientGoneError:
            record.note = "the client left"
        except ShuttingDownError:
            await self._refuse(record, shutting_down(), status, scope, receive, send_with_id)
        except Exception as error:  # the server's boundary: the log has it all, the client the id to ask by
            logger.exception("request %s failed", request_id)
            record.note = type(error).__name__
            message = f"internal error; the server's log has it under the request id {request_id}"
            refusal = ApiError(500, message, code="internal_error")
            await self._refuse(record, refusal, status, scope, receive, send_with_id)
        finally:
            quiet = scope["path"] in OPEN_PATHS or not self._log_requests
            level = logging.DEBUG if quiet else logging.INFO
            if not complete and record.note is None:
                record.note = "not answered in full"
            # The path as it was sent: decoded, it could hold a line end and forge lines of the log.
            path = scope["raw_path"].decode("ascii", "replace")
            logger.log(level, "%s", record.line(scope["method"], path, status))

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._api_keys or path in OPEN_PATHS:
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        bearer = given.strip() if scheme.lower() == b"bearer" else b""
        # Every key is compared, each in constant time, so that the time taken tells nothing about any of them.
        sent = (bearer, headers.get(b"x-api-key", b""))
        matches = [hmac.compare_digest(given, key) for key in self._api_keys for given in sent]
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
            await error.response(scope["path"])(scope, receive, send)


def request_id_of(given: bytes | None) -> str:
    """The client's own request id if it is printable and short, else a new one."""
    if given is not None and REQUEST_ID.fullmatch(given):
        return given.decode("ascii")
    return uuid.uuid4().hex


def shutting_down() -> ApiError:
    """The answer to a request that did not finish within the grace period."""
    return ApiError(503, "the server is shutting down", code="shutting_down")
