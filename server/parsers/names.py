"""The parsers by vLLM's names, and which of them a chat template tells of."""

from collections.abc import Mapping
from types import MappingProxyType

from jax_engine.server.parsers.deepseek import CALL as DEEPSEEK_CALL
from jax_engine.server.parsers.deepseek import DeepSeekV3ToolParser, DeepSeekV31ToolParser
from jax_engine.server.parsers.hermes import HermesToolParser
from jax_engine.server.parsers.llama3_json import Llama3JsonToolParser
from jax_engine.server.parsers.mistral import MistralNamedToolParser, MistralToolParser
from jax_engine.server.parsers.pythonic import Llama4PythonicToolParser, PythonicToolParser
from jax_engine.server.parsers.qwen3_coder import Qwen3CoderToolParser
from jax_engine.server.parsers.reasoning import ReasoningFormat
from jax_engine.server.parsers.tool_parser import ToolParser

AUTO, NONE = "auto", "none"
THINK = ReasoningFormat()
MISTRAL = ReasoningFormat(start="[THINK]", end="[/THINK]")

TOOL_PARSERS: Mapping[str, type[ToolParser]] = MappingProxyType(
    {
        "hermes": HermesToolParser,
        "llama3_json": Llama3JsonToolParser,
        "llama4_pythonic": Llama4PythonicToolParser,
        "pythonic": PythonicToolParser,
        "mistral": MistralToolParser,
        "mistral_v11": MistralNamedToolParser,
        "qwen3_coder": Qwen3CoderToolParser,
        "deepseek_v3": DeepSeekV3ToolParser,
        "deepseek_v31": DeepSeekV31ToolParser,
    }
)
REASONING_PARSERS: Mapping[str, ReasoningFormat] = MappingProxyType(
    {
        "think": THINK,
        "qwen3": THINK,
        "deepseek_r1": ReasoningFormat(begins_inside=True),
        "deepseek_v3": THINK,
        "mistral": MISTRAL,
    }
)
# What a template holds that speaks of this form and of no other one, the most telling first.
TOOL_MARKS = (
    ("qwen3_coder", ("<tool_call>", "<function=")),
    ("hermes", ("<tool_call>", '"arguments"')),
    ("mistral_v11", ("[TOOL_CALLS]", "[ARGS]")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", (DEEPSEEK_CALL, "```json")),
    ("deepseek_v31", (DEEPSEEK_CALL,)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ('{"name": function name, "parameters":',)),
)


def tool_parser_of(template: str) -> str:
    """The name of the parser for calls as this chat template writes those of earlier answers; NONE for no known one."""
    plain = template.replace('\\"', '"')
    return next((name for name, marks in TOOL_MARKS if all(mark in plain for mark in marks)), NONE)


def reasoning_parser_of(template: str) -> str:
    """The same for reasoning."""
    return next((name for name, form in (("think", THINK), ("mistral", MISTRAL)) if form.end in template), NONE)
