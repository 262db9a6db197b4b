"""The body of POST /v1/responses, and the chat that it asks for.

An item, tool or field that this server has no use for is a 400 that names it.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

import msgspec

from jax_engine.server.errors import ApiError
from jax_engine.server.openai.extra_fields import ExtraFields, renamed
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.responses.items import Item, conversation
from jax_engine.server.validation import check_neutral, converted, decode

# Field -> the values, besides null, at which it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "access_programs": (),
    "background_options": (),
    "image": (),
}
# A chat's parameters -> what this protocol calls them.
NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "messages": "input",
    "prompt": "input",
}
LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"


class TextFormat(msgspec.Struct, tag="text", forbid_unknown_fields=True):
    """An answer of any form."""


class JsonObjectFormat(msgspec.Struct, tag="json_object", forbid_unknown_fields=True):
    """An answer that is a JSON object."""


class JsonSchemaFormat(msgspec.Struct, tag="json_schema", forbid_unknown_fields=True):
    """An answer that meets a schema, `strict` or not."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class TextConfig(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The form of the answer."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """How to think; nothing is summarized."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class FunctionTool(msgspec.Struct, tag="function", forbid_unknown_fields=True):
    """A function that the client runs."""

    name: str
    parameters: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    is_async: Literal[False] | None = msgspec.field(default=None, name="async")
    defer_loading: Literal[False] | None = None
    output_schema: None = None


class FunctionChoice(msgspec.Struct, tag="function", forbid_unknown_fields=True):
    """This function has to be called."""

    name: str

    def in_chat(self) -> dict[str, Any]:
        """The same in the form of chats."""
        return {"type": "function", "function": {"name": self.name}}


class AllowedTools(msgspec.Struct, tag="allowed_tools", forbid_unknown_fields=True):
    """Of the tools, these alone may be called, or have to be."""

    mode: Literal["auto", "required"]
    tools: list[FunctionChoice]


class PromptCacheOptions(msgspec.Struct, forbid_unknown_fields=True):
    """How OpenAI's prefixes are cached; here all are, and the answer is the same."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None
    prewarm: Literal[False] | None = None
    comparison_response_id: None = None


class ResponseStreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides its events."""

    include_obfuscation: bool | None = None


class ResponsesRequest(ExtraFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/responses; vLLM's sampling parameters may stand beside OpenAI's."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | AllowedTools | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None  # of tools that a server runs, of which there are none
    truncation: Literal["auto", "disabled"] | None = None

    # Shown again in the response, and without effect on the answer.
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None

    service_tier: Any = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    access_programs: Any = None
    background_options: Any = None
    image: Any = None

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Decode and check a body; ApiError 400 for anything wrong with it."""
        asked = decode(cls, body)
        for name, neutral in NEUTRAL.items():
            check_neutral(name, getattr(asked, name), neutral)
        if asked.top_logprobs and not asked.shows_logprobs:
            message = (
                f"top_logprobs={asked.top_logprobs} needs include=[{LOGPROBS!r}]; add it, or leave top_logprobs out"
            )
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options needs stream=true", param="stream_options", code="invalid_value")
        if asked.background and asked.store is False:
            message = "background=true needs store=true: the answer is kept until it is asked for"
            raise ApiError(400, message, param="background", code="invalid_value")
        return asked

    @property
    def obfuscates(self) -> bool:
        """Whether the lengths of a stream's events are to tell little."""
        return bool(self.stream_options and self.stream_options.include_obfuscation)

    @property
    def shows_logprobs(self) -> bool:
        """Whether log-probabilities of the answer's text are asked for."""
        return LOGPROBS in (self.include or ())

    @property
    def encodes_reasoning(self) -> bool:
        """Whether reasoning is also asked for in the form that clients hand back unseen."""
        return ENCRYPTED in (self.include or ())

    def functions(self) -> list[dict[str, Any]]:
        """The tools in the form of chats; ApiError 400 for one that the server would have to run."""
        made = []
        for index, given in enumerate(self.tools or ()):
            where = f"tools[{index}]"
            if (kind := given.get("type")) != "function":
                message = f"{where}.type={kind!r} is not supported: this server runs no tools; describe a function"
                raise ApiError(400, message, param=f"{where}.type", code="unsupported_parameter")
            tool: FunctionTool = converted(FunctionTool, given, where)
            fields = {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": tool.strict,
            }
            described = {name: value for name, value in fields.items() if value is not None}
            made.append({"type": "function", "function": described})
        return made

    def chat(self, items: Sequence[Item]) -> ChatCompletionRequest:
        """The chat that is asked for, whose conversation `items` are; ApiError 400 for what cannot be done."""
        with renamed(NAMES):
            chat = ChatCompletionRequest(**self._chat_fields(items))
            chat.check()
        return chat

    def _chat_fields(self, items: Sequence[Item]) -> dict[str, Any]:
        instructions = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        fields: dict[str, Any] = {
            **self.extras(),
            "model": self.model,
            "messages": [*instructions, *conversation(items)],
            "tools": self.functions() or None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "tool_choice": self.tool_choice,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stop": self.stop,
            # Whose text each token belongs to is told as it comes.
            "stream": bool(self.stream or self.background or self.shows_logprobs),
        }
        match self.tool_choice:
            case FunctionChoice():
                fields["tool_choice"] = self.tool_choice.in_chat()
            case AllowedTools(mode=mode, tools=tools):
                allowed = {"mode": mode, "tools": [tool.in_chat() for tool in tools]}
                fields["tool_choice"] = {"type": "allowed_tools", "allowed_tools": allowed}
        if self.shows_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.text is not None:
            fields["verbosity"] = self.text.verbosity
            match self.text.format:
                case JsonObjectFormat():
                    fields["response_format"] = {"type": "json_object"}
                case JsonSchemaFormat() as described:
                    schema = {"name": described.name, "schema": described.schema}
                    fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields
