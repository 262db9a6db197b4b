"""The parts of an assistant's message, and how the text of one completion becomes them, piece by piece.

Every route that shows a chat's answer is written over these parts, whole or streamed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from jax_engine.server.parsers.reader import (
    ContentDelta,
    Part,
    Reader,
    Reading,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from jax_engine.server.parsers.reasoning import ReasoningFormat
from jax_engine.server.parsers.tool_parser import ToolParser

__all__ = [
    "ContentDelta",
    "Message",
    "MessageFormat",
    "MessageParser",
    "Part",
    "ReasoningDelta",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallStart",
    "whole_message",
]


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """How the answers to one request are read; `begins_inside`: the prompt has begun the reasoning, `reasoning` is None
    where it has ended it.
    """

    reasoning: ReasoningFormat | None = None
    begins_inside: bool = False
    tool_parser: type[ToolParser] | None = None
    tools: Sequence[Mapping[str, Any]] = ()  # in OpenAI's form, those that may be called
    parallel_tool_calls: bool = True  # False: calls after the first are left out
    include_reasoning: bool = True  # False: reasoning is left out

    def parser(self) -> "MessageParser":
        """A parser for one completion."""
        return MessageParser(self)


class MessageParser:
    """Turns a text that comes in pieces into parts; joined, they do not depend on where it was cut.

    Mutable; owned by whoever feeds it one completion.
    """

    def __init__(self, message_format: MessageFormat) -> None:
        self._format = message_format
        self._reader = Reader()
        self._reading = self._read()
        next(self._reading)
        self.has_called = False  # whether a tool call has begun
        self.has_reasoned = False  # whether reasoning has begun, shown or not
        self.has_answered = False  # whether it has ended, or there is none
        self.shows_reasoning = message_format.reasoning is not None and message_format.include_reasoning

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain now that `text` follows; what may be the beginning of a tag is held back."""
        if not text:
            return []
        self._reader.text += text
        next(self._reading)
        return self._taken()

    def finish(self, text: str) -> list[Part]:
        """The remaining parts, `text` being the last of the completion."""
        self._reader.text += text
        self._reader.ended = True
        next(self._reading, None)
        return self._taken()

    def _read(self) -> Reading[None]:
        form, reader = self._format, self._reader
        yield
        if form.reasoning is not None:
            yield from form.reasoning.read(reader, begins_inside=form.begins_inside)
        if form.tool_parser is not None:
            yield from form.tool_parser(form.tools).read(reader)
        yield from reader.content_up_to(())

    def _taken(self) -> list[Part]:
        parts, self._reader.parts = self._reader.parts, []
        for part in parts:
            is_reasoning = isinstance(part, ReasoningDelta)
            self.has_reasoned, self.has_answered = self.has_reasoned or is_reasoning, not is_reasoning
        if not self._format.parallel_tool_calls:
            parts = [part for part in parts if isinstance(part, ReasoningDelta | ContentDelta) or part.index == 0]
        if not self._format.include_reasoning:
            parts = [part for part in parts if not isinstance(part, ReasoningDelta)]
        self.has_called = self.has_called or any(isinstance(part, ToolCallStart) for part in parts)
        return parts


class ToolCall(msgspec.Struct):
    """One call of a whole message; `arguments` is JSON as far as the model wrote any."""

    call_id: str
    name: str
    arguments: str = ""


class Message(msgspec.Struct):
    """The parts of a whole answer, joined."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = []


def whole_message(parts: Iterable[Part]) -> Message:
    """The parts joined."""
    message = Message()
    for part in parts:
        match part:
            case ReasoningDelta():
                message.reasoning += part.text
            case ContentDelta():
                message.content += part.text
            case ToolCallStart():
                message.tool_calls.append(ToolCall(part.call_id, part.name))
            case ToolCallArguments():
                message.tool_calls[part.index].arguments += part.text
    return message
