"""The bytes of a streamed answer. Everything that does not change between two tokens is encoded once per request."""

import random
import string
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from jax_engine.server.errors import ApiError

encode_json = msgspec.json.encode
EVENT_STREAM = "text/event-stream"
JSON_LINES = "application/x-ndjson"
DONE = b"data: [DONE]\n\n"


def event(data: object) -> bytes:
    """One server-sent event (WHATWG HTML, section 9.2) with JSON data."""
    return b"data: " + encode_json(data) + b"\n\n"


Fields = Mapping[str, Any]
NO_FIELDS: Fields = MappingProxyType({})
# Obfuscated events have a multiple of so many bytes, which hides how long the text in them is.
OBFUSCATED_BYTES = 64
PAD_CHARACTERS = string.ascii_letters + string.digits


class Piece(NamedTuple):
    """What is new of one completion."""

    choice: int  # which completion of the request
    text: str  # which may be empty
    logprobs: Any = None  # in the route's form
    fields: Fields = NO_FIELDS  # what else is new of it (see `answers.py`)
    finish_reason: str | None = None  # why it has ended, with its last piece
    stop_reason: int | str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but text."""
        return self.logprobs is None and not self.fields and self.finish_reason is None


class Frames(ABC):
    """How one route writes what happens to its completions; each method returns bytes ready for the socket."""

    media_type: str

    @abstractmethod
    def start(self, index: int, fields: Fields = NO_FIELDS) -> bytes:
        """What comes before the first text of completion `index`; the fields are of its prompt."""

    @abstractmethod
    def write(self, piece: Piece) -> bytes:
        """What is new."""

    @abstractmethod
    def end(self, usage: dict[str, Any]) -> bytes:
        """What closes a stream in which every completion has ended."""

    @abstractmethod
    def error(self, error: ApiError) -> bytes:
        """What closes a stream that cannot go on."""


def obfuscated(event: bytes) -> bytes:
    """An event that ends with a JSON object, with a field that makes its length tell little."""
    before, after = event[:-3] + b',"obfuscation":"', b'"}\n\n'
    missing = -(len(before) + len(after)) % OBFUSCATED_BYTES
    return before + "".join(random.choices(PAD_CHARACTERS, k=missing)).encode() + after


class OpenAIFrames(Frames):
    """Server-sent events in OpenAI's shape, closed by `[DONE]`."""

    media_type = EVENT_STREAM

    def __init__(
        self,
        kind: str,
        *,
        response_id: str,
        model: str,
        include_usage: bool,
        common: Fields = NO_FIELDS,
        usage: Callable[[], Fields] | None = None,
        obfuscate: bool = False,
    ) -> None:
        """`common` are fields that every chunk has; with `usage`, each chunk has the token counts so far."""
        self._common = {"id": response_id, "object": kind, "created": int(time.time()), "model": model, **common}
        self._include_usage = include_usage
        self._usage = usage
        self._obfuscate = obfuscate
        self._is_plain = usage is None and not obfuscate  # chunks differ in their text alone
        # {"id": ..., "model": ...} without its closing brace; the choices and the end of the event follow.
        self._before_choices = b"data: " + encode_json(self._common)[:-1] + b',"choices":['
        self._after_choices = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def end(self, usage: dict[str, Any]) -> bytes:
        if not self._include_usage:
            return DONE
        return event({**self._common, "choices": [], "usage": usage}) + DONE

    def error(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def _choice(self, choice: Fields, fields: Fields = NO_FIELDS) -> bytes:
        """A chunk of one choice; `fields` stand beside it."""
        after = self._after_choices
        if self._usage is not None:
            after = b'],"usage":' + encode_json(self._usage()) + b"}\n\n"
        if fields:
            after = b"]," + encode_json(fields)[1:-1] + after[1:]
        chunk = self._before_choices + encode_json(choice) + after
        return obfuscated(chunk) if self._obfuscate else chunk


class CompletionFrames(OpenAIFrames):
    """Chunks of POST /v1/completions."""

    def __init__(self, **options: Any) -> None:
        super().__init__("text_completion", **options)
        self._after_text = b',"logprobs":null,"finish_reason":null,"stop_reason":null}' + self._after_choices
        self._of_prompt: dict[int, Fields] = {}  # for the first chunk of each completion

    def start(self, index: int, fields: Fields = NO_FIELDS) -> bytes:
        if fields:
            self._of_prompt[index] = fields
        return b""

    def write(self, piece: Piece) -> bytes:
        index, text = piece.choice, piece.text
        if piece.is_plain and self._is_plain and index not in self._of_prompt:
            return b'%b{"index":%d,"text":%b%b' % (self._before_choices, index, encode_json(text), self._after_text)
        ending = {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        more = {**ending, **piece.fields, **self._of_prompt.pop(index, NO_FIELDS)}
        return self._choice({"index": index, "text": text, "logprobs": piece.logprobs, **more})


class LineFrames(Frames):
    """One JSON object a line, for POST /generate_stream."""

    media_type = JSON_LINES

    def __init__(self) -> None:
        self._of_prompt: dict[int, Fields] = {}  # for the first line of each completion

    def start(self, index: int, fields: Fields = NO_FIELDS) -> bytes:
        if fields:
            self._of_prompt[index] = fields
        return b""

    def write(self, piece: Piece) -> bytes:
        index = piece.choice
        if piece.is_plain and index not in self._of_prompt:
            return b'{"index":%d,"text":%b,"finish_reason":null}\n' % (index, encode_json(piece.text))
        line = {"index": index, "text": piece.text, "finish_reason": piece.finish_reason}
        line |= self._of_prompt.pop(index, NO_FIELDS)
        if piece.logprobs is not None:
            line["logprobs"] = piece.logprobs
        return encode_json(line) + b"\n"

    def end(self, usage: dict[str, Any]) -> bytes:
        return encode_json({"usage": usage}) + b"\n"

    def error(self, error: ApiError) -> bytes:
        return encode_json(error.body()) + b"\n"
