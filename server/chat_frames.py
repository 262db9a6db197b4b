"""The bytes of a streamed chat, and the message of a whole one, made from the parts of its text."""

from typing import Any

from jax_engine.server.frames import NO_FIELDS, Fields, OpenAIFrames, encode_json
from jax_engine.server.message_parts import (
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

    def delta(self, index: int, text: str, logprobs: Any = None, fields: Fields = NO_FIELDS) -> bytes:
        return self._written(index, self._parsers[index].feed(text), logprobs, fields)

    def finish(
        self,
        index: int,
        text: str,
        finish_reason: str,
        stop_reason: int | str | None,
        logprobs: Any = None,
        fields: Fields = NO_FIELDS,
    ) -> bytes:
        parser = self._parsers[index]
        last = self._written(index, parser.finish(text), logprobs, fields)
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": called(finish_reason, parser)}
        return last + self._choice({**choice, "stop_reason": stop_reason})

    def _written(self, index: int, parts: list[Part], logprobs: Any, fields: Fields) -> bytes:
        is_plain = logprobs is None and not fields and self._is_plain
        if is_plain and len(parts) == 1 and isinstance(parts[0], ContentDelta):
            content = encode_json(parts[0].text)
            return b'%b{"index":%d,"delta":{"content":%b%b' % (
                self._before_choices,
                index,
                content,
                self._after_content,
            )
        deltas = [chat_delta(part) for part in parts]
        if not deltas and (logprobs is not None or fields):
            deltas = [{}]
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if choices:
            choices[0] |= {"logprobs": logprobs, **fields}
        return b"".join(map(self._choice, choices))
