"""A chat's answer as OpenAI's Responses API writes it: output items, whole or as a stream of events."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from jax_engine.server.errors import ApiError
from jax_engine.server.openai.frames import EVENT_STREAM, NO_FIELDS, Fields, Frames, Piece, encode_json, obfuscated
from jax_engine.server.openai.message_parts import (
    ContentDelta,
    MessageParser,
    Part,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)
from jax_engine.server.responses.items import encoded_reasoning, new_id
from jax_engine.server.responses.protocol import ResponsesRequest
from jax_engine.server.tracking import RequestRecord

Event = dict[str, Any]


def response_fields(asked: ResponsesRequest, *, model: str, store: bool, params: Any) -> dict[str, Any]:
    """What a response object says of its request; `params` are the sampling parameters in effect."""
    text = msgspec.to_builtins(asked.text) if asked.text is not None else {}
    choice = asked.tool_choice
    return {
        "background": bool(asked.background),
        "instructions": asked.instructions,
        "max_output_tokens": asked.max_output_tokens,
        "max_tool_calls": asked.max_tool_calls,
        "metadata": asked.metadata or {},
        "model": model,
        "parallel_tool_calls": asked.parallel_tool_calls is not False,
        "previous_response_id": asked.previous_response_id,
        "prompt_cache_key": asked.prompt_cache_key,
        "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
        "safety_identifier": asked.safety_identifier,
        "service_tier": "default",
        "store": store,
        "temperature": params.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": "auto" if choice is None else msgspec.to_builtins(choice),
        "tools": [{"strict": None, "parameters": None, "description": None, **tool} for tool in asked.tools or ()],
        "top_logprobs": asked.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": asked.truncation or "disabled",
        "user": asked.user,
    }


def responses_usage(usage: dict[str, Any]) -> dict[str, Any]:
    """Token counts as this protocol names them."""
    details = usage.get("completion_tokens_details") or {}
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": details.get("reasoning_tokens", 0)},
        "total_tokens": usage["total_tokens"],
    }


class OutputWriter:
    """Makes the items of one answer from its text, and an event of each change. Mutable; owned by its `LiveResponse`.

    Log-probabilities, one entry for each token, go with the answer's text that the tokens make.
    """

    def __init__(self, parser: MessageParser, *, encodes_reasoning: bool) -> None:
        self._encodes_reasoning = encodes_reasoning
        self.items: list[dict[str, Any]] = []
        self._parser = parser
        self._calls: dict[int, int] = {}  # index of a call -> place of its item
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text has not come yet
        self._blanks = ""  # that begin a message, held back until more follows

    def feed(self, text: str, logprobs: Any) -> Iterator[Event]:
        """The events of new text."""
        self._logprobs += logprobs["content"] if logprobs else ()
        for part in self._parser.feed(text):
            yield from self._part(part)

    def finish(self, text: str, logprobs: Any, status: str) -> Iterator[Event]:
        """The events of the last text; `status` is that of the item that it ends."""
        self._logprobs += logprobs["content"] if logprobs else ()
        for part in self._parser.finish(text):
            yield from self._part(part)
        yield from self._end_item(status)

    def stop(self) -> None:
        """Nothing follows any more, whatever has been begun."""
        for item in self.items:
            if item["status"] == "in_progress":
                item["status"] = "incomplete"

    def _part(self, part: Part) -> Iterator[Event]:
        match part:
            case ReasoningDelta():
                yield from self._text("reasoning", "reasoning_text", part.text, {})
            case ContentDelta():
                if self._is_open("message"):
                    yield from self._content(part.text)
                elif (self._blanks + part.text).isspace():
                    self._blanks += part.text
                else:
                    text, self._blanks = self._blanks + part.text, ""
                    yield from self._content(text)
            case ToolCallStart():
                call = {"arguments": "", "call_id": part.call_id, "name": part.name}
                yield from self._begin("function_call", "fc", call)
                self._calls[part.index] = len(self.items) - 1
            case ToolCallArguments():
                place = self._calls[part.index]
                item = self.items[place]
                item["arguments"] += part.text
                yield {
                    "type": "response.function_call_arguments.delta",
                    "item_id": item["id"],
                    "output_index": place,
                    "delta": part.text,
                }
        self._logprobs.clear()

    def _content(self, text: str) -> Iterator[Event]:
        logprobs = entries_of(text, self._logprobs)
        yield from self._text("message", "output_text", text, {"logprobs": logprobs})
        self.items[-1]["content"][0]["logprobs"] += logprobs

    def _text(self, kind: str, part: str, text: str, extra: dict[str, Any]) -> Iterator[Event]:
        if not self._is_open(kind):
            if kind == "message":
                yield from self._begin(kind, "msg", {"role": "assistant", "content": []})
                begun: dict[str, Any] = {"type": part, "text": "", "annotations": [], "logprobs": []}
            else:
                yield from self._begin(kind, "rs", {"summary": [], "content": []})
                begun = {"type": part, "text": ""}
            self.items[-1]["content"].append(begun)
            yield self._event("response.content_part.added", content_index=0, part=begun)
        self.items[-1]["content"][0]["text"] += text
        yield self._event(f"response.{part}.delta", content_index=0, delta=text, **extra)

    def _is_open(self, kind: str) -> bool:
        return bool(self.items) and self.items[-1]["type"] == kind and self.items[-1]["status"] == "in_progress"

    def _begin(self, kind: str, prefix: str, fields: dict[str, Any]) -> Iterator[Event]:
        yield from self._end_item("completed")
        self._blanks = ""
        item = {"id": new_id(prefix), "type": kind, "status": "in_progress", **fields}
        self.items.append(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _end_item(self, status: str) -> Iterator[Event]:
        if not self.items or self.items[-1]["status"] != "in_progress":
            return
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event("response.function_call_arguments.done", arguments=item["arguments"])
        else:
            (part,) = item["content"]
            if item["type"] == "reasoning" and self._encodes_reasoning:
                item["encrypted_content"] = encoded_reasoning(part["text"])
            extra = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._event(f"response.{part['type']}.done", content_index=0, text=part["text"], **extra)
            yield self._event("response.content_part.done", content_index=0, part=part)
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _event(self, kind: str, **data: Any) -> Event:
        """An event of the last item."""
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **data}


def entries_of(text: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last of the tokens' entries, as many as it takes for `text`: before them are tags, and blanks around them."""
    missing, first = len(text.encode()), len(entries)
    while missing > 0 and first > 0:
        first -= 1
        missing -= len(entries[first]["bytes"])
    return entries[first:]


class LiveResponse:
    """One response while it is made. Mutable; owned by the route, or by its task in the background."""

    def __init__(
        self,
        response_id: str,
        fields: dict[str, Any],
        parser: MessageParser,
        record: RequestRecord,
        *,
        encodes_reasoning: bool = False,
    ) -> None:
        self.response_id = response_id
        self.status = "queued" if fields["background"] else "in_progress"
        self.created = int(time.time())
        self._begun = time.monotonic()
        self._fields = fields
        self._writer = OutputWriter(parser, encodes_reasoning=encodes_reasoning)
        self._record = record
        self._error: dict[str, Any] | None = None
        self._incomplete: dict[str, Any] | None = None
        self._completed_at: int | None = None
        self._final = "completed"  # the status that its last text gave it

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.status not in ("queued", "in_progress")

    def content(self) -> dict[str, Any]:
        """The response object, as far as it has got."""
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": self._completed_at,
            "status": self.status,
            "error": self._error,
            "incomplete_details": self._incomplete,
            "output": self._writer.items,
            "usage": responses_usage(self._record.usage()) if self.has_ended else None,
            **self._fields,
        }

    def begin(self) -> Iterator[Event]:
        """The events before any output."""
        yield {"type": "response.created", "response": self.content()}
        self.status = "in_progress"
        yield {"type": "response.in_progress", "response": self.content()}

    def feed(self, text: str, logprobs: Any) -> Iterator[Event]:
        """The events of new text."""
        return self._writer.feed(text, logprobs)

    def finish(self, text: str, finish_reason: str | None, logprobs: Any) -> Iterator[Event]:
        """The events of the last text."""
        status = "completed"
        if finish_reason in ("length", "repetition"):
            status = "incomplete"
            self._incomplete = {"reason": "max_output_tokens" if finish_reason == "length" else finish_reason}
        yield from self._writer.finish(text, logprobs, status)
        if finish_reason == "abort":
            self._error = {"code": "server_error", "message": "the request was aborted"}
            status = "failed"
        self._final = status

    def end(self) -> Event:
        """The last event; from here on the response has its usage."""
        self.status = self._final
        if self.status == "completed":
            self._completed_at = self.created + round(time.monotonic() - self._begun)
        return {"type": f"response.{self.status}", "response": self.content()}

    def fail(self, error: ApiError) -> Event:
        """The last event of a response that cannot go on."""
        self.status = "failed"
        self._writer.stop()
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self._error = {"code": code, "message": error.message}
        return {"type": "response.failed", "response": self.content()}

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self.status = "cancelled"
        self._writer.stop()


class ResponseFrames(Frames):
    """The events of a streamed response, numbered. Mutable; owned by its stream."""

    media_type = EVENT_STREAM

    def __init__(self, live: LiveResponse, *, ended: Callable[[LiveResponse], object], obfuscate: bool = False) -> None:
        self.live = live
        self._obfuscate = obfuscate
        self._number = 0
        self._ended = ended  # called once with the response that has ended

    def start(self, index: int, fields: Fields = NO_FIELDS) -> bytes:
        return self._encoded(self.live.begin())

    def write(self, piece: Piece) -> bytes:
        if piece.finish_reason is None:
            return self._encoded(self.live.feed(piece.text, piece.logprobs))
        return self._encoded(self.live.finish(piece.text, piece.finish_reason, piece.logprobs))

    def end(self, usage: dict[str, Any]) -> bytes:
        last = self._encoded([self.live.end()])
        self._ended(self.live)
        return last

    def error(self, error: ApiError) -> bytes:
        last = self._encoded([self.live.fail(error)])
        self._ended(self.live)
        return last

    def _encoded(self, events: Any) -> bytes:
        """Each event is encoded at once: it holds what goes on changing."""
        return b"".join(map(self._event, events))

    def _event(self, event: Event) -> bytes:
        data = encode_json({"type": event["type"], "sequence_number": self._number, **event})
        self._number += 1
        written = b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)
        return obfuscated(written) if self._obfuscate and "delta" in event else written
