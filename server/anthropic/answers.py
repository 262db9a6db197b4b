"""A chat's answer as Anthropic's Messages API writes it: content blocks, whole or as a stream of events."""

import json
from typing import Any

import msgspec

from jax_engine.server.errors import ApiError
from jax_engine.server.openai.frames import EVENT_STREAM, NO_FIELDS, Fields, Frames, Piece, encode_json
from jax_engine.server.openai.message_parts import (
    ContentDelta,
    Message,
    MessageParser,
    Part,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from jax_engine.server.tracking import RequestRecord

# OpenAI's finish reasons -> Anthropic's stop reasons. A turn that someone aborted may be sent back to go on.
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "repetition": "end_turn", "abort": "pause_turn"}


class MessageHead(msgspec.Struct, frozen=True):
    """What does not depend on how the answer goes on. `context_is_limit`: the context ends before `max_tokens` do."""

    message_id: str
    model: str
    context_is_limit: bool

    def message(self, content: list[dict[str, Any]], usage: dict[str, Any], **ending: Any) -> dict[str, Any]:
        """The message object."""
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            **ending,
            "usage": usage,
        }

    def ending(self, finish_reason: str | None, stop_reason: int | str | None, *, has_called: bool) -> dict[str, Any]:
        """Why it ended; `stop_reason` is the engine's, a stop string being Anthropic's stop sequence."""
        if finish_reason == "stop" and has_called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if finish_reason == "stop" and isinstance(stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
        if finish_reason == "length" and self.context_is_limit:
            return {"stop_reason": "model_context_window_exceeded", "stop_sequence": None}
        return {"stop_reason": STOP_REASONS[finish_reason or "stop"], "stop_sequence": None}

    def whole(self, answer: Message, usage: dict[str, Any], ending: dict[str, Any]) -> dict[str, Any]:
        """The message object of a whole answer."""
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": self.message_id})
        if answer.content.strip():
            content.append({"type": "text", "text": answer.content, "citations": None})
        calls = answer.tool_calls
        content += [tool_use(call.call_id, call.name, parsed_arguments(call.arguments)) for call in calls]
        return self.message(content, usage, **ending)


def tool_use(call_id: str, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The block of a call."""
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def parsed_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. What is no JSON object, because it was cut off or the model erred, is wrapped in one, as
    Anthropic's documentation of invalid JSON in tool use has it.
    """
    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError):
        given = None
    return given if isinstance(given, dict) else {"INVALID_JSON": text}


def anthropic_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's token counts as Anthropic has them: `input_tokens` are those that were not found in the prefix cache."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    counts = {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }
    if "completion_tokens_details" in usage:
        thinking = usage["completion_tokens_details"]["reasoning_tokens"]
        counts["output_tokens_details"] = {"thinking_tokens": thinking}
    return counts


def event(kind: str, **data: Any) -> bytes:
    """One server-sent event of that type."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), encode_json({"type": kind, **data}))


class MessageFrames(Frames):
    """The events of POST /v1/messages: the message's head, its blocks one after another, and why it ended.

    Mutable; owned by the stream of one completion.
    """

    media_type = EVENT_STREAM

    def __init__(self, head: MessageHead, parser: MessageParser, record: RequestRecord) -> None:
        self._head = head
        self._parser = parser
        self._record = record
        self._number = -1  # of the block that was begun last
        self._open: object = None  # what that block holds: a class of parts, or the index of a call; None: it has ended
        self._blanks = ""  # that begin a text, held back until more follows: clients may not send blank blocks back
        self._ending: dict[str, Any] = {}

    def start(self, index: int, fields: Fields = NO_FIELDS) -> bytes:
        usage = anthropic_usage(self._record.usage())
        return event("message_start", message=self._head.message([], usage))

    def write(self, piece: Piece) -> bytes:
        parser, reason = self._parser, piece.finish_reason
        if reason is None:
            return b"".join(map(self._written, parser.feed(piece.text)))
        last = b"".join(map(self._written, parser.finish(piece.text)))
        self._ending = self._head.ending(reason, piece.stop_reason, has_called=parser.has_called)
        return last + self._close()

    def end(self, usage: dict[str, Any]) -> bytes:
        return event("message_delta", delta=self._ending, usage=anthropic_usage(usage)) + event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % encode_json(error.anthropic_body())

    def _written(self, part: Part) -> bytes:
        match part:
            case ReasoningDelta():
                return self._thought(part.text)
            case ContentDelta():
                return self._text(part.text)
            case ToolCallStart():
                return self._begin(part.index, tool_use(part.call_id, part.name, {}))
            case ToolCallArguments():
                return self._delta({"type": "input_json_delta", "partial_json": part.text})

    def _thought(self, text: str) -> bytes:
        begun = b""
        if self._open is not ReasoningDelta:
            begun = self._begin(ReasoningDelta, {"type": "thinking", "thinking": "", "signature": ""})
        return begun + self._delta({"type": "thinking_delta", "thinking": text})

    def _text(self, text: str) -> bytes:
        begun = b""
        if self._open is not ContentDelta:
            text, self._blanks = self._blanks + text, ""
            if text.isspace():
                self._blanks = text
                return b""
            begun = self._begin(ContentDelta, {"type": "text", "text": ""})
        return begun + self._delta({"type": "text_delta", "text": text})

    def _begin(self, kind: object, block: dict[str, Any]) -> bytes:
        closed = self._close()
        self._open = kind
        self._number += 1
        self._blanks = ""
        return closed + event("content_block_start", index=self._number, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return event("content_block_delta", index=self._number, delta=delta)

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open is ReasoningDelta:
            signed = self._delta({"type": "signature_delta", "signature": self._head.message_id})
        self._open = None
        return signed + event("content_block_stop", index=self._number)
