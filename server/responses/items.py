"""Items of OpenAI's Responses API: what a client sends in, as messages of a chat."""

import base64
from collections.abc import Sequence
from typing import Any, Literal
from uuid import uuid4

import msgspec

from jax_engine.server.validation import converted

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(msgspec.Struct, tag="input_text", forbid_unknown_fields=True):
    """Text of a user or an instruction, or what a function returned."""

    text: str
    prompt_cache_breakpoint: Any = None  # prefixes are cached without being marked


class OutputText(msgspec.Struct, tag="output_text", forbid_unknown_fields=True):
    """Text of an earlier answer, as it came."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = None  # what OpenAI's client adds to it


class Refusal(msgspec.Struct, tag="refusal", forbid_unknown_fields=True):
    """What an earlier answer said instead of answering."""

    refusal: str


class MessageItem(msgspec.Struct, tag="message", forbid_unknown_fields=True):
    """One turn of anyone."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OutputText | Refusal]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None

    def text(self) -> str | list[dict[str, Any]]:
        """The content as a chat has it."""
        if isinstance(self.content, str):
            return self.content
        texts = [part.refusal if isinstance(part, Refusal) else part.text for part in self.content]
        if self.role == "assistant":
            return "".join(texts)
        return texts[0] if len(texts) == 1 else [{"type": "text", "text": text} for text in texts]


class FunctionCall(msgspec.Struct, tag="function_call", forbid_unknown_fields=True):
    """A call that the model made; `arguments` is JSON."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    caller: Any = None
    namespace: None = None
    is_async: Literal[False] | None = msgspec.field(default=None, name="async")
    parsed_arguments: Any = None  # what OpenAI's client adds to it


class FunctionCallOutput(msgspec.Struct, tag="function_call_output", forbid_unknown_fields=True):
    """What a call returned."""

    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status | None = None
    caller: Any = None
    name: str | None = None
    namespace: None = None


class SummaryText(msgspec.Struct, tag="summary_text", forbid_unknown_fields=True):
    """A piece of a summary of reasoning."""

    text: str


class ReasoningText(msgspec.Struct, tag="reasoning_text", forbid_unknown_fields=True):
    """Reasoning itself."""

    text: str


class ReasoningItem(msgspec.Struct, tag="reasoning", forbid_unknown_fields=True):
    """What the model thought before an answer or a call."""

    summary: list[SummaryText] = []
    content: list[ReasoningText] | None = None
    id: str | None = None
    status: Status | None = None
    encrypted_content: str | None = None

    def __post_init__(self) -> None:
        self.text()

    def text(self) -> str:
        """The reasoning, or what else there is of it."""
        if self.content is None and self.encrypted_content is not None:
            return decoded_reasoning(self.encrypted_content)
        return "".join(part.text for part in (self.summary if self.content is None else self.content))


def encoded_reasoning(text: str) -> str:
    """Reasoning in the form that clients hand back unseen. Nothing is secret here, so it is not encrypted."""
    return base64.b64encode(text.encode()).decode()


def decoded_reasoning(encoded: str) -> str:
    """What `encoded_reasoning` was given; ValueError for what did not come from it."""
    try:
        return base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        raise ValueError("encrypted_content is not of this server; leave it out") from None


Item = MessageItem | FunctionCall | FunctionCallOutput | ReasoningItem
PREFIXES = {MessageItem: "msg", FunctionCall: "fc", FunctionCallOutput: "fco", ReasoningItem: "rs"}


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{uuid4().hex}"


def checked_items(given: Sequence[dict[str, Any]]) -> list[Item]:
    """A request's input, each item with an id; ApiError 400 for an item that this server has no use for."""
    checked: list[Item] = []
    for index, item in enumerate(given):
        made: Item = converted(Item, {"type": "message", **item}, f"input[{index}]")
        if made.id is None:
            made.id = new_id(PREFIXES[type(made)])
        if isinstance(made, MessageItem) and isinstance(made.content, str):
            part = OutputText if made.role == "assistant" else InputText
            made.content = [part(made.content)]
        made.status = made.status or "completed"
        checked.append(made)
    return checked


def conversation(items: Sequence[Item]) -> list[dict[str, Any]]:
    """The items as messages of a chat: what one turn of the model consists of becomes one message."""
    turns: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                turn = turns[-1] if turns and is_open(turns[-1]) else begun(turns)
                turn["content"] = item.text()
            case MessageItem():
                turns.append({"role": item.role, "content": item.text()})
            case ReasoningItem():
                begun(turns)["reasoning_content"] = item.text()
            case FunctionCall():
                turn = turns[-1] if turns and turns[-1]["role"] == "assistant" else begun(turns)
                called = {"name": item.name, "arguments": item.arguments}
                turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": called})
            case FunctionCallOutput():
                output = item.output if isinstance(item.output, str) else "".join(part.text for part in item.output)
                turns.append({"role": "tool", "tool_call_id": item.call_id, "content": output})
    return turns


def begun(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A new turn of the model, at the end of `turns`."""
    turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def is_open(turn: dict[str, Any]) -> bool:
    """Whether a turn is the model's and has only thought so far."""
    return "reasoning_content" in turn and not turn["content"] and "tool_calls" not in turn
