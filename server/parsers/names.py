"""The parsers by vLLM's names, and which of them a chat template tells of."""

from collections.abc import Mapping
from types import MappingProxyType

from jax_engine.server.parsers.hermes import HermesToolParser
from jax_engine.server.parsers.reasoning import ReasoningFormat
from jax_engine.server.parsers.tool_parser import ToolParser

AUTO, NONE = "auto", "none"
THINK = ReasoningFormat()

TOOL_PARSERS: Mapping[str, type[ToolParser]] = MappingProxyType({"hermes": HermesToolParser})
REASONING_PARSERS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {"think": THINK, "qwen3": THINK, "deepseek_r1": ReasoningFormat(begins_inside=True)}
)
# What a template holds that speaks of this form and of no other one, the most telling first.
TOOL_MARKS = (("hermes", ("<tool_call>", "</tool_call>")),)


def tool_parser_of(template: str) -> str:
    """The name of the parser for calls as this chat template writes those of earlier answers; NONE for no known one."""
    return next((name for name, marks in TOOL_MARKS if all(mark in template for mark in marks)), NONE)


def reasoning_parser_of(template: str) -> str:
    """The same for reasoning."""
    return "think" if THINK.end in template else NONE
