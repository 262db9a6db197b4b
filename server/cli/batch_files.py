"""OpenAI's batch format: a file of requests, and the file of their results, which a later run can go on with."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

# What answers one body with one JSON object; routes that change the server's state are not for batches.
URLS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
    "/pooling",
    "/v1/score",
    "/score",
    "/v1/rerank",
    "/v2/rerank",
    "/rerank",
    "/classify",
)


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True):
    """A line of the input; `body` is left as it stands, for the route to decode."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"

    def __post_init__(self) -> None:
        if not self.custom_id:
            raise ValueError("custom_id is empty; give each line one of its own")
        if self.method != "POST":
            raise ValueError(f"method={self.method!r} must be POST")
        if self.url not in URLS:
            raise ValueError(f"url={self.url!r} must be one of {', '.join(URLS)}")


class BatchResponse(msgspec.Struct):
    """What the route answered."""

    status_code: int
    request_id: str
    body: Any


class BatchError(msgspec.Struct):
    """Why no route was asked."""

    code: str
    message: str


class BatchResult(msgspec.Struct, kw_only=True):
    """A line of the output: `response`, also of a request that the route refused, or else `error`."""

    id: str
    custom_id: str | None
    response: BatchResponse | None = None
    error: BatchError | None = None


class _Named(msgspec.Struct):
    custom_id: str | None = None


class _Finished(msgspec.Struct):
    """What is read of a line of the output."""

    id: str
    custom_id: str | None
    response: msgspec.Raw
    error: msgspec.Raw


@dataclass(frozen=True)
class InputLine:
    """One line of the input, from 1."""

    number: int
    content: bytes

    @property
    def custom_id(self) -> str | None:
        """Its `custom_id`; None when it has none that can be read."""
        try:
            return msgspec.json.decode(self.content, type=_Named).custom_id
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    @property
    def key(self) -> str:
        """What its result is known by."""
        return key_of(self.result_id, self.custom_id)

    @property
    def result_id(self) -> str:
        return f"batch_req_{self.number}"

    def request(self) -> BatchRequest:
        """The line decoded; ValueError when it is not a request for a batch."""
        return msgspec.json.decode(self.content, type=BatchRequest)


def key_of(result_id: str, custom_id: str | None) -> str:
    """One text for each line: its `custom_id`, or the number in its result's id when it has none."""
    return f"line {result_id}" if custom_id is None else f"custom_id {custom_id!r}"


def input_lines(path: Path) -> Iterator[InputLine]:
    """The lines that are not blank, one at a time; ValueError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                if content.strip():
                    yield InputLine(number, content)
    except OSError as error:
        raise ValueError(f"--input-file {path} cannot be read: {error.strerror}") from error


def keys_of(path: Path) -> dict[str, int]:
    """Every line's key and number; ValueError, naming both lines, when two have one `custom_id`."""
    numbers: dict[str, int] = {}
    for line in input_lines(path):
        key = line.key
        first = numbers.setdefault(key, line.number)
        if first != line.number:
            raise ValueError(f"--input-file {path}: lines {first} and {line.number} have the same {key}")
    return numbers


def finished_keys(path: Path, asked: dict[str, int]) -> set[str]:
    """The keys of the results that an earlier run has left in `path`; a torn last line is cut off the file.

    Raises:
        ValueError: the file cannot be read, or holds something else than results of the lines `asked`.
    """
    finished: set[str] = set()
    complete = 0
    remedy = "give another --output-file, or remove this one"
    try:
        if not path.exists():
            return finished
        with path.open("rb+") as file:
            for number, content in enumerate(file, start=1):
                if not content.endswith(b"\n"):
                    break
                try:
                    result = msgspec.json.decode(content, type=_Finished)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    raise ValueError(f"--output-file {path}, line {number}: not a result; {remedy}") from None
                key = key_of(result.id, result.custom_id)
                if key not in asked:
                    raise ValueError(f"--output-file {path}, line {number}: {key} is not in the input; {remedy}")
                finished.add(key)
                complete += len(content)
            file.truncate(complete)
    except OSError as error:
        raise ValueError(f"--output-file {path} cannot be read: {error.strerror}") from error
    return finished
