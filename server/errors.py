"""OpenAI's error object, in which this server reports an error, and Anthropic's, in which its own routes do."""

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

# How a ValueError's message begins when it speaks of one field: "temperature=-1 must be", "messages[0].content has".
_LEADING_FIELD = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*)(?:=| has | holds | is empty)")

# Where Anthropic's clients call, and what their errors are called by status.
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that cannot be answered: an HTTP status and what the client is told.

    `param` names the offending parameter, `code` is stable and meant for programs, `message` for people.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of a response, or of an event in a stream that has already started."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self) -> dict[str, Any]:
        """The same as Anthropic's clients expect it."""
        kind = ANTHROPIC_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, path: str) -> Response:
        """The whole response, in the shape that belongs to the request's path."""
        content = msgspec.json.encode(self.anthropic_body() if is_anthropic(path) else self.body())
        return Response(content, self.status, headers=self.headers, media_type="application/json")


def is_anthropic(path: str) -> bool:
    """Whether it is Anthropic's clients who call that path."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def bad_request(error: ValueError, *, prefix: str = "") -> ApiError:
    """The user's mistake that `error` describes, as a 400 which names the parameter if the message starts with it."""
    message = str(error)
    leading = _LEADING_FIELD.match(message)
    return ApiError(400, prefix + message, param=leading[1] if leading else None, code="invalid_value")


def unavailable(reason: str, *, code: str, retry_after: int | None = None) -> ApiError:
    """The engine cannot take requests; `retry_after` are the seconds after which it may."""
    return ApiError(503, reason, code=code, headers={} if retry_after is None else {"retry-after": str(retry_after)})
