"""The bytes of a streamed answer. Everything that does not change between two tokens is encoded once per request."""

import time
from abc import ABC, abstractmethod
from typing import Any

import msgspec

from jax_engine.server.errors import ApiError

encode_json = msgspec.json.encode
EVENT_STREAM = "text/event-stream"
JSON_LINES = "application/x-ndjson"
DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2) with JSON data."""
    return b"data: " + encode_json(data) + b"\n\n"


class Frames(ABC):
    """How one route writes what happens to its completions; each method returns bytes ready for the socket."""

    media_type: str

    @abstractmethod
    def start(self, index: int) -> bytes:
        """What comes before the first text of completion `index`."""

    @abstractmethod
    def delta(self, index: int, text: str, logprobs: Any = None) -> bytes:
        """New text, and log-probabilities in the route's form (see `answers.py`)."""

    @abstractmethod
    def finish(
        self, index: int, text: str, finish_reason: str, stop_reason: int | str | None, logprobs: Any = None
    ) -> bytes:
        """The last text, which may be empty, and why it ended."""

    @abstractmethod
    def end(self, usage: dict[str, Any]) -> bytes:
        """What closes a stream in which every completion has ended."""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """What closes a stream that cannot go on."""


class OpenAIFrames(Frames):
    """Server-sent events in OpenAI's shape, closed by `[DONE]`."""

    media_type = EVENT_STREAM

    def __init__(self, kind: str, *, response_id: str, model: str, include_usage: bool) -> None:
        self._common = {"id": response_id, "object": kind, "created": int(time.time()), "model": model}
        self._include_usage = include_usage
        # {"id": ..., "model": ...} without its closing brace; the choices and the end of the event follow.
        self._before_choices = b"data: " + encode_json(self._common)[:-1] + b',"choices":['
        self._after_choices = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def end(self, usage: dict[str, Any]) -> bytes:
        if not self._include_usage:
            return DONE
        return event({**self._common, "choices": [], "usage": usage}) + DONE

    def error(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def _choice(self, choice: dict[str, Any]) -> bytes:
        return self._before_choices + encode_json(choice) + self._after_choices


class CompletionFrames(OpenAIFrames):
    """Chunks of POST /v1/completions."""

    def __init__(self, *, response_id: str, model: str, include_usage: bool) -> None:
        super().__init__("text_completion", response_id=response_id, model=model, include_usage=include_usage)
        self._after_text = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._after_choices

    def start(self, index: int) -> bytes:
        return b""

    def delta(self, index: int, text: str, logprobs: Any = None) -> bytes:
        if logprobs is not None:
            ending = {"logprobs": logprobs, "finish_reason": None, "stop_reason": None}
            return self._choice({"index": index, "text": text, **ending})
        return b'%b{"index":%d,"text":%b%b' % (self._before_choices, index, encode_json(text), self._after_text)

    def finish(
        self, index: int, text: str, finish_reason: str, stop_reason: int | str | None, logprobs: Any = None
    ) -> bytes:
        return self._choice(
            {
                "index": index,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": finish_reason,
                "stop_reason": stop_reason,
            }
        )


class LineFrames(Frames):
    """One JSON object a line, for POST /generate_stream."""

    media_type = JSON_LINES

    def start(self, index: int) -> bytes:
        return b""

    def delta(self, index: int, text: str, logprobs: Any = None) -> bytes:
        if logprobs is not None:
            return self._line({"index": index, "text": text, "finish_reason": None, "logprobs": logprobs})
        return b'{"index":%d,"text":%b,"finish_reason":null}\n' % (index, encode_json(text))

    def finish(
        self, index: int, text: str, finish_reason: str, stop_reason: int | str | None, logprobs: Any = None
    ) -> bytes:
        line = {"index": index, "text": text, "finish_reason": finish_reason}
        return self._line(line if logprobs is None else {**line, "logprobs": logprobs})

    def _line(self, content: dict[str, Any]) -> bytes:
        return encode_json(content) + b"\n"

    def end(self, usage: dict[str, Any]) -> bytes:
        return encode_json({"usage": usage}) + b"\n"

    def error(self, error: ApiError) -> bytes:
        return encode_json(error.body()) + b"\n"
