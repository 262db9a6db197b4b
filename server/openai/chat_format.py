"""How the served model writes reasoning and tool calls: as the operator says, or as its chat template shows."""

import logging
import re
from dataclasses import dataclass

from jax_engine.frontend.chat_templates import content_format_of
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.message_parts import MessageFormat
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.parsers.names import (
    AUTO,
    NONE,
    REASONING_PARSERS,
    TOOL_PARSERS,
    reasoning_parser_of,
    tool_parser_of,
)
from jax_engine.server.parsers.reasoning import ReasoningFormat
from jax_engine.server.parsers.tool_parser import ToolParser
from jax_engine.server.settings import ServerSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChatFormat:
    """The served model's own forms; None for one that it has not, or that nobody knows of."""

    reasoning: ReasoningFormat | None = None
    tool_parser: type[ToolParser] | None = None
    special_tokens: frozenset[str] = frozenset()  # what is left out of a text with skip_special_tokens
    template: str = ""

    def reads(self, name: str) -> bool:
        """Whether the chat template speaks of a variable."""
        return re.search(rf"\b{re.escape(name)}\b", self.template) is not None

    def message_format(self, prompt: str, asked: ChatCompletionRequest | None = None) -> MessageFormat:
        """How answers to a rendered chat are read; `asked` is the request for it, if tools may be offered."""
        reasoning, tools = self.reasoning, asked.offered_tools() if asked else None
        if reasoning is not None and reasoning.is_over(prompt):
            reasoning = None
        return MessageFormat(
            reasoning=reasoning,
            begins_inside=reasoning is not None and reasoning.is_open(prompt),
            tool_parser=self.tool_parser if tools else None,
            tools=tools or (),
            parallel_tool_calls=asked is None or asked.parallel_tool_calls is not False,
            include_reasoning=asked is None or asked.include_reasoning is not False,
        )

    def needs_special_tokens(self, message_format: MessageFormat) -> bool:
        """Whether a tag that is looked for is a special token, which a text must then show."""
        tags = message_format.reasoning.tags if message_format.reasoning else ()
        tags += message_format.tool_parser.tags if message_format.tool_parser else ()
        return not self.special_tokens.isdisjoint(tags)


def chat_format(settings: ServerSettings, tokenizer: Tokenizer) -> ChatFormat:
    """The forms that `settings` name, or where they are to be found, those that the chat template tells of."""
    template = settings.chat_template or template_text(tokenizer)
    names = {"tool calls": settings.tool_call_parser, "reasoning": settings.reasoning_parser}
    seen = {"tool calls": tool_parser_of(template), "reasoning": reasoning_parser_of(template)}
    chosen = {what: seen[what] if name == AUTO else name for what, name in names.items()}
    for what, name in chosen.items():
        origin = "from the chat template" if names[what] == AUTO else "as set"
        logger.info("parser of %s: %s (%s)", what, name, origin)
    special = frozenset(tokenizer.token(token) for token in tokenizer.special_ids)
    reasoning = REASONING_PARSERS[chosen["reasoning"]] if chosen["reasoning"] != NONE else None
    tool_parser = TOOL_PARSERS[chosen["tool calls"]] if chosen["tool calls"] != NONE else None
    return ChatFormat(reasoning, tool_parser, special, template)


def rendered_chat(tokenizer: Tokenizer, settings: ServerSettings, asked: ChatCompletionRequest) -> str:
    """The text of a chat's prompt; ApiError 400 for what cannot be rendered."""
    if asked.chat_template is not None and not settings.trust_request_chat_template:
        message = "chat_template is not taken from requests; leave it out, or start the server with "
        raise ApiError(
            400, message + "--trust-request-chat-template", param="chat_template", code="unsupported_parameter"
        )
    template = asked.chat_template or settings.chat_template
    arguments, content_format = asked.template_arguments(), settings.chat_template_content_format
    given = {**(settings.default_chat_template_kwargs or {}), **(arguments.pop("chat_template_kwargs") or {})}
    if content_format == AUTO:
        content_format = content_format_of(template or template_text(tokenizer))
    try:
        return tokenizer.render_chat(
            asked.conversation(),
            chat_template=template,
            chat_template_kwargs=given,
            content_format=content_format,
            **arguments,
        )
    except ValueError as error:
        raise bad_request(error) from None


def template_text(tokenizer: Tokenizer) -> str:
    """The tokenizer's chat template; of several, all of them."""
    template = tokenizer.hugging_face.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""
