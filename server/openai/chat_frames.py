"""The bytes of a streamed chat, and the message of a whole one, made from the parts of its text."""

from typing import Any

from jax_engine.server.openai.frames import NO_FIELDS, Fields, OpenAIFrames, Piece, encode_json
from jax_engine.server.openai.message_parts import (
    ContentDelta,
    MessageFormat,
    MessageParser,
    Part,
    ReasoningDelta,
    ToolCallStart,
    whole_message,
)

CONTENT_ALONE = MessageFormat()


def called(finish_reason: str | None, parser: MessageParser) -> str | None:
    """OpenAI's finish reason: that of an answer which has called tools and ended by itself is `tool_calls`."""
    return "tool_calls" if finish_reason == "stop" and parser.has_called else finish_reason


def chat_message(parser: MessageParser, text: str) -> dict[str, Any]:
    """The message of a whole completion. What it lacks is null: the content where there are calls or reasoning alone;
    calls, and the reasoning of a model that has none, are left out.
    """
    whole = whole_message(parser.finish(text))
    message: dict[str, Any] = {"role": "assistant", "content": whole.content, "refusal": None}
    if not whole.content and (whole.tool_calls or whole.reasoning):
        message["content"] = None
    if parser.shows_reasoning:
        message |= _reasoning(whole.reasoning or None)
    if whole.tool_calls:
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in whole.tool_calls
        ]
    return message


def chat_delta(part: Part) -> dict[str, Any]:
    """One part in a chunk."""
    match part:
        case ContentDelta():
            return {"content": part.text}
        case ReasoningDelta():
            return _reasoning(part.text)
        case ToolCallStart():
            function = {"name": part.name, "arguments": ""}
            call: dict[str, Any] = {"id": part.call_id, "type": "function", "function": function}
        case _:
            call = {"function": {"arguments": part.text}}
    return {"tool_calls": [{"index": part.index, **call}]}


def _reasoning(text: str | None) -> dict[str, Any]:
    """vLLM's field under its old and its new name: clients look for either."""
    return {"reasoning_content": text, "reasoning": text}


class ChatFrames(OpenAIFrames):
    """Chunks of POST /v1/chat/completions: the role, then each part, then the reason why it ended.

    Log-probabilities and token ids go with the first part that their text gives, or by themselves where that is held
    back.
    """

    def __init__(self, *, message_format: MessageFormat = CONTENT_ALONE, **options: Any) -> None:
        super().__init__("chat.completion.chunk", **options)
        self._after_content = b'},"logprobs":null,"finish_reason":null}' + self._after_choices
        self._format = message_format
        self._parsers: dict[int, MessageParser] = {}

    def start(self, index: int, fields: Fields = NO_FIELDS) -> bytes:
        self._parsers[index] = self._format.parser()
        delta = {"role": "assistant", "content": ""}
        return self._choice({"index": index, "delta": delta, "logprobs": None, "finish_reason": None}, fields)

    def write(self, piece: Piece) -> bytes:
        index, parser = piece.choice, self._parsers[piece.choice]
        if piece.finish_reason is None:
            return self._written(piece, parser.feed(piece.text))
        last = self._written(piece, parser.finish(piece.text))
        reason = called(piece.finish_reason, parser)
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
        return last + self._choice({**choice, "stop_reason": piece.stop_reason})

    def _written(self, piece: Piece, parts: list[Part]) -> bytes:
        index = piece.choice
        if piece.is_plain and self._is_plain and len(parts) == 1 and isinstance(parts[0], ContentDelta):
            content = encode_json(parts[0].text)
            return b'%b{"index":%d,"delta":{"content":%b%b' % (
                self._before_choices,
                index,
                content,
                self._after_content,
            )
        deltas = [chat_delta(part) for part in parts]
        if not deltas and (piece.logprobs is not None or piece.fields):
            deltas = [{}]
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if choices:
            choices[0] |= {"logprobs": piece.logprobs, **piece.fields}
        return b"".join(map(self._choice, choices))
