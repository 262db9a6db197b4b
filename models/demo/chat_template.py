"""The chat format: the Jinja template that ships with the tokenizer, and the same rendering in Python for training."""

import json
from dataclasses import dataclass

from jax_engine.models.demo.samples import PLAIN_TEXT, Message, Sample

BEGIN, TURN, END, PAD = "<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROL_TOKENS = (PAD, BEGIN, TURN, END)
"""Special to the tokenizer: left out of decoded text on request."""

TEXT_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Single tokens which are part of the answer's text, so that parsers see them."""

TOOLS_BEFORE = "You can call these tools:\n<tools>"
TOOLS_AFTER = '\n</tools>\nTo call one, write:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>'

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set found = namespace(last_user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set found.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if has_system or tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if has_system -%}{{- text_of(messages[0].content) -}}{%- endif -%}
  {%- if tools -%}
    {%- if has_system -%}{{- '\\n\\n' -}}{%- endif -%}
    {{- TOOLS_BEFORE -}}
    {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
    {{- TOOLS_AFTER -}}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set text = text_of(message.content) -%}
  {%- if message.role == 'system' or message.role == 'user' -%}
    {%- if not (loop.first and has_system) -%}
      {{- '<|im_start|>' + message.role + '\\n' + text + '<|im_end|>\\n' -}}
    {%- endif -%}
  {%- elif message.role == 'assistant' -%}
    {%- if loop.index0 < found.last_user and '</think>' in text -%}
      {%- set text = text.split('</think>')[-1] | trim -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' + text -}}
    {%- for call in message.tool_calls or [] -%}
      {%- if not loop.first or text -%}{{- '\\n' -}}{%- endif -%}
      {%- set called = call.function or call -%}
      {{- '<tool_call>\\n{"name": ' + called.name | tojson + ', "arguments": ' -}}
      {{- called.arguments if called.arguments is string else called.arguments | tojson -}}
      {{- '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>tool\\n<tool_response>\\n' + text + '\\n</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- raise_exception('message role must be system, user, assistant or tool, not ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""".replace("TOOLS_BEFORE", json.dumps(TOOLS_BEFORE)).replace("TOOLS_AFTER", json.dumps(TOOLS_AFTER))


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text; `answer` where the model is to write it itself."""

    text: str
    answer: bool


def render(sample: Sample) -> list[Span]:
    """The whole sample as the template renders it, cut where the model's own words begin and end."""
    if sample.messages[0]["role"] == PLAIN_TEXT:
        return [Span(BEGIN, answer=False), Span(sample.messages[0]["content"] + END, answer=True)]
    spans = [Span(BEGIN + _system_turn(sample), answer=False)]
    for place, message in enumerate(sample.messages):
        role, text = message["role"], message["content"]
        if role == "user":
            spans.append(Span(f"{TURN}user\n{text}{END}\n", answer=False))
        elif role == "tool":
            spans.append(Span(f"{TURN}tool\n<tool_response>\n{text}\n</tool_response>{END}\n", answer=False))
        elif role == "assistant":
            spans.append(Span(f"{TURN}assistant\n", answer=False))
            spans.append(Span(answer_text(message) + END, answer=place >= sample.num_history))
            spans.append(Span("\n", answer=False))
    return spans


def answer_text(message: Message) -> str:
    """An assistant turn as the model writes it: its text, then its tool calls."""
    calls = (
        json.dumps({key: call["function"][key] for key in ("name", "arguments")})
        for call in message.get("tool_calls", ())
    )
    blocks = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return "\n".join([message["content"], *blocks] if message["content"] else blocks)


def _system_turn(sample: Sample) -> str:
    first = sample.messages[0]
    parts = [first["content"]] if first["role"] == "system" else []
    if sample.tools:
        schemas = "".join("\n" + json.dumps(tool) for tool in sample.tools)
        parts.append(TOOLS_BEFORE + schemas + TOOLS_AFTER)
    return f"{TURN}system\n" + "\n\n".join(parts) + f"{END}\n" if parts else ""
