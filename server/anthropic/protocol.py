"""The bodies of Anthropic's routes, and the chats that they ask for.

A block, tool or field that this server has no use for is a 400 that names it. `cache_control` and `metadata` change no
answer: prefixes are cached without being marked.
"""

import json
from collections.abc import Sequence
from typing import Any, Literal, Self

import msgspec

from jax_engine.server.errors import ApiError
from jax_engine.server.openai.extra_fields import ExtraFields, renamed
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.validation import check_neutral, converted, decode

# Field -> the values, besides null, at which it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "user_profile_id": (),
    "workspace_id": (),
}
# A chat's parameters -> what this protocol calls them.
NAMES = {
    "stop": "stop_sequences",
    "prompt": "messages",
    "reasoning_effort": "output_config.effort",
    "thinking_token_budget": "thinking.budget_tokens",
}


class TextBlock(msgspec.Struct, tag="text", forbid_unknown_fields=True):
    """Text, in any message or result."""

    text: str
    cache_control: Any = None
    citations: Any = None

    def __post_init__(self) -> None:
        if self.citations:
            raise ValueError("citations are not supported; leave them out")


class ThinkingBlock(msgspec.Struct, tag="thinking", forbid_unknown_fields=True):
    """What the model thought in an earlier turn; its signature is not looked at."""

    thinking: str
    signature: str | None = None


class ToolUseBlock(msgspec.Struct, tag="tool_use", forbid_unknown_fields=True):
    """A call that the model made."""

    id: str
    name: str
    input: dict[str, Any]
    cache_control: Any = None
    caller: Any = None
    toolset_name: None = None


class ToolResultBlock(msgspec.Struct, tag="tool_result", forbid_unknown_fields=True):
    """What a call returned."""

    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None
    cache_control: Any = None
    toolset_name: None = None


Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One turn; a user's may hold results of tools, an assistant's thinking and calls."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    """A function that the client runs."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None  # arguments are always streamed as they come
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class AutoChoice(msgspec.Struct, tag="auto", forbid_unknown_fields=True):
    """The model decides."""

    disable_parallel_tool_use: bool = False


class AnyChoice(msgspec.Struct, tag="any", forbid_unknown_fields=True):
    """Some tool has to be called."""

    disable_parallel_tool_use: bool = False


class ToolChoice(msgspec.Struct, tag="tool", forbid_unknown_fields=True):
    """This tool has to be called."""

    name: str
    disable_parallel_tool_use: bool = False


class NoChoice(msgspec.Struct, tag="none", forbid_unknown_fields=True):
    """No tool may be called."""


class ThinkingEnabled(msgspec.Struct, tag="enabled", forbid_unknown_fields=True):
    """Think, for so many tokens at most."""

    budget_tokens: int
    display: Literal["summarized", "omitted"] | None = None


class ThinkingAdaptive(msgspec.Struct, tag="adaptive", forbid_unknown_fields=True):
    """Think as the model likes."""

    display: Literal["summarized", "omitted"] | None = None


class ThinkingDisabled(msgspec.Struct, tag="disabled", forbid_unknown_fields=True):
    """Do not think."""


class JsonFormat(msgspec.Struct, tag="json_schema", forbid_unknown_fields=True):
    """An answer that meets a schema."""

    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The answer's form, and how hard to try."""

    effort: str | None = None
    format: JsonFormat | None = None


class CountTokensRequest(ExtraFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/messages/count_tokens: what of a message's body makes the prompt; the rest changes no count."""

    messages: list[Message]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: AutoChoice | AnyChoice | ToolChoice | NoChoice | None = None
    thinking: ThinkingEnabled | ThinkingAdaptive | ThinkingDisabled | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None

    speed: Any = None
    context_management: Any = None
    mcp_servers: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Decode a body; ApiError 400 for anything wrong with it."""
        asked = decode(cls, body)
        for name, neutral in NEUTRAL.items():
            if name in cls.__struct_fields__:
                check_neutral(name, getattr(asked, name), neutral)
        return asked

    def chat(self) -> ChatCompletionRequest:
        """The chat that is asked for, checked; ApiError 400 for what cannot be done."""
        with renamed(NAMES):
            chat = ChatCompletionRequest(**self.chat_fields())
            chat.check()
        return chat

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat that are not null."""
        fields: dict[str, Any] = {**self.extras(), "model": self.model, "messages": self.conversation()}
        if self.tools:
            fields["tools"] = [function(tool, f"tools[{index}]") for index, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            fields |= chosen(self.tool_choice)
        if fields["messages"] and fields["messages"][-1]["role"] == "assistant":
            if "tool_calls" in fields["messages"][-1]:
                message = "messages ends with a call; its tool_result must follow"
                raise ApiError(400, message, param="messages", code="invalid_value")
            fields["continue_final_message"] = True
        fields |= self._thinking_fields()
        if self.output_config is not None:
            if self.output_config.format is not None:
                described = {"name": "answer", "schema": self.output_config.format.schema}
                fields["response_format"] = {"type": "json_schema", "json_schema": described}
            if self.output_config.effort is not None:
                fields["reasoning_effort"] = self.output_config.effort
        return fields

    def conversation(self) -> list[dict[str, Any]]:
        """The system text and the messages in OpenAI's form."""
        turns = [] if self.system is None else [{"role": "system", "content": plain(self.system)}]
        for index, message in enumerate(self.messages):
            content = message.content
            blocks = [TextBlock(content)] if isinstance(content, str) else content
            turns += turn(message.role, blocks, f"messages[{index}]")
        return turns

    def _thinking_fields(self) -> dict[str, Any]:
        """Thinking is asked for by the argument that chat templates of models that may think or not look at. What is
        thought all the same is left out.
        """
        thinking = self.thinking
        if thinking is None:
            return {}
        wanted = not isinstance(thinking, ThinkingDisabled)
        given = {**(self.chat_template_kwargs or {}), "enable_thinking": wanted}
        fields: dict[str, Any] = {"chat_template_kwargs": given}
        if isinstance(thinking, ThinkingDisabled) or thinking.display == "omitted":
            fields["include_reasoning"] = False
        if isinstance(thinking, ThinkingEnabled):
            fields["thinking_token_budget"] = thinking.budget_tokens
        return fields


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/messages; vLLM's sampling parameters may stand beside Anthropic's."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop_sequences: list[str] | None = None

    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None

    def chat_fields(self) -> dict[str, Any]:
        own = {
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop_sequences,
        }
        return {**CountTokensRequest.chat_fields(self), **own}


def plain(content: str | list[TextBlock]) -> str | list[dict[str, Any]]:
    """Text as a message of a chat has it: itself, or in parts."""
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": block.text} for block in content]


def turn(role: str, blocks: Sequence[Block], where: str) -> list[dict[str, Any]]:
    """One message's blocks as messages of a chat: results of tools are messages of their own."""
    turns: list[dict[str, Any]] = []
    texts: list[TextBlock] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        needed = {ToolResultBlock: "user", ToolUseBlock: "assistant", ThinkingBlock: "assistant"}.get(type(block), role)
        if role != needed:
            kind = block.__struct_config__.tag
            name = f"{where}.content[{number}].type"
            message = f"{name}={kind!r} belongs into a message of role {needed!r}, not {role!r}"
            raise ApiError(400, message, param=name, code="invalid_value")
        match block:
            case TextBlock():
                texts.append(block)
            case ThinkingBlock():
                thinking.append(block.thinking)
            case ToolUseBlock():
                arguments = json.dumps(block.input, ensure_ascii=False)
                called = {"name": block.name, "arguments": arguments}
                calls.append({"id": block.id, "type": "function", "function": called})
            case ToolResultBlock():
                turns.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result(block)})
    if role == "assistant":
        answer: dict[str, Any] = {"role": role, "content": "".join(block.text for block in texts)}
        answer |= {"reasoning_content": "".join(thinking)} if thinking else {}
        return [answer | ({"tool_calls": calls} if calls else {})]
    if texts or not turns:
        content = texts[0].text if len(texts) == 1 else plain(texts)
        turns.append({"role": role, "content": content})
    return turns


def result(block: ToolResultBlock) -> str | list[dict[str, Any]]:
    """What a tool returned; that it failed is said in the text, which is all that templates have a place for."""
    content = plain(block.content or "")
    if not block.is_error:
        return content
    return f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error: "}, *content]


def function(given: dict[str, Any], where: str) -> dict[str, Any]:
    """A tool in OpenAI's form; ApiError 400 for one that the server would have to run."""
    kind = given.get("type")
    if kind not in (None, "custom"):
        message = (
            f"{where}.type={kind!r} is not supported: this server runs no tools; describe one that the client runs"
        )
        raise ApiError(400, message, param=f"{where}.type", code="unsupported_parameter")
    tool = converted(Tool, given, where)
    described: dict[str, Any] = {"name": tool.name}  # in the order in which models were taught to read them
    if tool.description is not None:
        described["description"] = tool.description
    described["parameters"] = tool.input_schema
    if tool.strict is not None:
        described["strict"] = tool.strict
    return {"type": "function", "function": described}


def chosen(choice: AutoChoice | AnyChoice | ToolChoice | NoChoice) -> dict[str, Any]:
    """`tool_choice` and `parallel_tool_calls` of the chat."""
    match choice:
        case NoChoice():
            return {"tool_choice": "none"}
        case ToolChoice():
            fields: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": choice.name}}}
        case AnyChoice():
            fields = {"tool_choice": "required"}
        case AutoChoice():
            fields = {"tool_choice": "auto"}
    return fields | ({"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {})
