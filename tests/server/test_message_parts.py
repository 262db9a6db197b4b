# ruff: noqa: RUF001  # DeepSeek's tags have such characters
"""A completion's text becomes the parts of a message, the same ones wherever it is cut."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_engine.server.openai.message_parts import Message, MessageFormat, whole_message
from jax_engine.server.parsers.names import REASONING_PARSERS, TOOL_PARSERS, reasoning_parser_of, tool_parser_of
from jax_engine.server.parsers.reader import ContentDelta, ReasoningDelta, ToolCallArguments, ToolCallStart

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "object"}},
        },
    },
}
# For each parser, a text with two calls as the model's documentation has it.
CALL = {"city": "Paris", "days": 2}
TWO_CALLS = {
    "hermes": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
    "llama3_json": '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}; '
    '{"name": "get_time", "parameters": {}}',
    "pythonic": '[get_weather(city="Paris", days=2), get_time()]',
    "llama4_pythonic": "<|python_start|>[get_weather(city='Paris', days=2), get_time()]<|python_end|>",
    "mistral": '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}, '
    '{"name": "get_time", "arguments": {}}]',
    "mistral_v11": '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}[TOOL_CALLS]get_time[ARGS]{}',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=get_time>\n</function>\n</tool_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
    '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜>\n'
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "Paris", "days": 2}<｜tool▁call▁end｜>'
    "<｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
}


def message_format(tool_parser: str = "hermes", reasoning: str | None = None, **options) -> MessageFormat:
    return MessageFormat(
        tool_parser=TOOL_PARSERS[tool_parser],
        tools=(WEATHER,),
        reasoning=REASONING_PARSERS[reasoning] if reasoning else None,
        **options,
    )


def joined(form: MessageFormat, *pieces: str) -> tuple[Message, list]:
    """The whole message, and its parts in order, neighbours of one kind as one and ids by number."""
    parser = form.parser()
    parts = [part for piece in pieces[:-1] for part in parser.feed(piece)] + parser.finish(pieces[-1])
    order: list[tuple[str, int, str]] = []
    for part in parts:
        kind, index = type(part).__name__, getattr(part, "index", -1)
        text = part.name if isinstance(part, ToolCallStart) else part.text
        if order and order[-1][:2] == (kind, index):
            text = order.pop()[2] + text
        order.append((kind, index, text))
    message = whole_message(parts)
    assert all(re.fullmatch(r"call_\w{24}|\w{9}", call.call_id) for call in message.tool_calls)
    return message, order


def calls(message: Message) -> list[tuple[str, str]]:
    return [(call.name, call.arguments) for call in message.tool_calls]


@pytest.mark.parametrize("name", TWO_CALLS)
def test_calls_in_the_models_own_form_are_read(name):
    text = TWO_CALLS[name]
    message, _ = joined(message_format(name), text)
    assert message.content == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls(message)] == [
        ("get_weather", CALL),
        ("get_time", {}),
    ]


@pytest.mark.parametrize("name", TWO_CALLS)
def test_a_text_fed_by_characters_never_shows_a_tag(name):
    form = message_format(name, "think")
    text = "<think>\nLet me see.\n</think>\n\n" + TWO_CALLS[name]
    parser = form.parser()
    parts = [part for character in text for part in parser.feed(character)] + parser.finish("")
    assert [part for part in parts if isinstance(part, ContentDelta)] == []
    assert "".join(part.text for part in parts if isinstance(part, ReasoningDelta)) == "Let me see."
    assert len([part for part in parts if isinstance(part, ToolCallStart)]) == 2
    whole_calls = name in ("pythonic", "llama4_pythonic")
    assert len(parts) > (10 if whole_calls else 12), "they come as they are written"


def fragments(name: str) -> st.SearchStrategy[str]:
    """Texts that are likely to go wrong: pieces of calls, tags and JSON in any order."""
    text = TWO_CALLS[name]
    tags = TOOL_PARSERS[name].tags
    words = [*tags, *(tag[:-1] for tag in tags), "<think>", "</think>", "<", " ", "\n", '"', "\\", "{", "}", "[", "]"]
    words += ["(", ")", ",", ":", "=", "a", "é", "1", '"name"', '"arguments"', '"f"', "null"]
    words += [text, text[: len(text) // 2]]
    words += re.split(r"(?<=[^\w])", text)
    return st.lists(st.sampled_from(words), max_size=14).map("".join)


@pytest.mark.parametrize("reasoning", [None, "think"])
@pytest.mark.parametrize("name", TWO_CALLS)
@settings(max_examples=60)
@given(data=st.data())
def test_the_same_parts_wherever_the_text_is_cut(name, reasoning, data):
    text = data.draw(fragments(name))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    form = message_format(name, reasoning)
    assert joined(form, *pieces)[1] == joined(form, text)[1] == joined(form, *text, "")[1]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f',
        "<tool_call>",
        "<tool_call>no JSON</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        "a < b <tool_ca",
        "text with <tool_call> in it \n",
        "</tool_call>",
    ],
)
def test_what_is_no_call_stays_content(text):
    message, _ = joined(message_format(), text)
    assert (message.content, message.tool_calls) == (text, [])


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
        ('{"name": "f", "parameters": {"a": "}{\\""}}', '{"a": "}{\\""}'),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"id": [1, {}], "name": "f", "arguments": {"a": "</tool_call>"}, "x": 1}', '{"a": "</tool_call>"}'),
    ],
)
def test_a_call_may_be_written_in_several_ways(call, arguments):
    message, _ = joined(message_format(), f"Let me see.\n<tool_call>{call}</tool_call> Done.")
    assert (message.content, calls(message)) == ("Let me see. Done.", [("f", arguments)])


def test_a_call_that_is_cut_off_keeps_what_was_written():
    message, _ = joined(message_format(), '<tool_call>{"name": "f", "arguments": {"city": "Par')
    assert (message.content, calls(message)) == ("", [("f", '{"city": "Par')])


def test_arguments_come_as_they_are_written():
    parser = message_format().parser()
    assert parser.feed('<tool_call>{"name": "f') == []
    assert not parser.has_called
    (start,) = parser.feed('", "argum')
    assert (start.index, start.name, parser.has_called) == (0, "f", True)
    assert parser.feed('ents": {"a') == [ToolCallArguments(0, '{"a')]
    assert parser.feed('": 1}') == [ToolCallArguments(0, '": 1}')]
    assert parser.feed("}\n</tool") == parser.finish("_call>") == []


def test_calls_after_the_first_are_left_out_where_one_is_asked_for():
    message, _ = joined(message_format(parallel_tool_calls=False), TWO_CALLS["hermes"] + "Text")
    assert ([name for name, _ in calls(message)], message.content) == (["get_weather"], "Text")


@pytest.mark.parametrize(
    ("reasoning", "options", "text", "expected"),
    [
        ("think", {}, "<think>\na b\n</think>\n\nc\n", ("a b", "c\n")),
        ("think", {}, " \n<think>a</think>c<think>d</think>", ("a", "c<think>d</think>")),
        ("think", {}, "c</think>", ("", "c</think>")),
        ("think", {}, " c <think>", ("", " c <think>")),
        ("think", {}, "<think>a</thi", ("a</thi", "")),
        ("think", {"begins_inside": True}, "a</think>c", ("a", "c")),
        ("deepseek_r1", {}, "\na\n</think>\nc", ("a", "c")),
        ("deepseek_r1", {}, "<think>a</think>c", ("a", "c")),
        ("deepseek_r1", {}, "a <tool_call>", ("a <tool_call>", "")),
        ("think", {"include_reasoning": False}, "<think>a</think>c", ("", "c")),
    ],
)
def test_reasoning_and_content_are_told_apart(reasoning, options, text, expected):
    message, _ = joined(message_format(reasoning=reasoning, **options), text)
    assert (message.reasoning, message.content) == expected


def test_every_parser_is_tested_with_a_text_in_its_form():
    assert set(TWO_CALLS) == set(TOOL_PARSERS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"answer": 42}'),
        ("llama3_json", '{"name": "f"'[:9]),
        ("llama3_json", 'Here: {"name": "f", "parameters": {}}'),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[f(1)]"),
        ("pythonic", "[f(a=b)]"),
        ("pythonic", '[f(a="b"'),
        ("pythonic", "[f(a=1e999)]"),
        ("pythonic", "text [f(a=1)]"),
        ("mistral", "[TOOL_CALLS] [5]"),
        ("mistral", "[TOOL_CALLS]f[ARGS]none"),
        ("mistral", "[TOOL_CALLS]"),
        ("qwen3_coder", "<tool_call>\n<function"),
        ("qwen3_coder", '<tool_call>\n{"name": "f"}\n</tool_call>'),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> and text"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>none<｜tool▁call▁end｜>"),
    ],
)
def test_what_is_no_call_in_a_models_form_stays_content(name, text):
    message, _ = joined(message_format(name), text)
    assert (message.content, message.tool_calls) == (text, [])


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("f(a='x\"y', b=[1, (2, None)], c={'k': True})", {"a": 'x"y', "b": [1, [2, None]], "c": {"k": True}}),
        ('f(a=true, b=null, c="\\u00e9)", d=-1.5)', {"a": True, "b": None, "c": "é)", "d": -1.5}),
        ('mod.f(a="(", b="\\"[")', {"a": "(", "b": '"['}),
    ],
)
def test_arguments_in_python_are_json(source, arguments):
    message, _ = joined(message_format("pythonic"), f"[{source}]")
    assert [json.loads(call.arguments) for call in message.tool_calls] == [arguments]


def test_values_in_xml_are_of_the_types_that_the_schema_says():
    values = {"city": '2 "x"\n<b>', "days": "3", "units": "{'a': True}", "other": "5"}
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    text = f"<tool_call>\n<function=get_weather>\n{parameters}</function>\n</tool_call>"
    message, _ = joined(message_format("qwen3_coder"), text)
    (call,) = message.tool_calls
    assert json.loads(call.arguments) == {"city": '2 "x"\n<b>', "days": 3, "units": {"a": True}, "other": "5"}


def test_mistral_calls_have_the_ids_that_its_templates_take():
    message, _ = joined(message_format("mistral"), TWO_CALLS["mistral"])
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call.call_id) for call in message.tool_calls)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("hermes", r'{{- "<tool_call>\n{\"name\": " }}{{- ", \"arguments\": " }}'),
        ("qwen3_coder", "{{- '<tool_call>\\n<function=' + tool_call.name }}"),
        ("mistral", '{{- "[TOOL_CALLS] [" }}'),
        ("mistral_v11", '{{- "[TOOL_CALLS]" + name + "[ARGS]" }}'),
        ("deepseek_v3", "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '```json'}}"),
        ("deepseek_v31", "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'}}"),
        ("llama3_json", 'in the format {"name": function name, "parameters": dictionary of argument name}'),
        ("none", "{{ message.content }}"),
    ],
)
def test_a_chat_template_tells_how_its_model_writes(name, template):
    assert tool_parser_of(template) == name
    assert reasoning_parser_of(template) == "none"
    assert reasoning_parser_of(template + "{{ content.split('</think>')[-1] }}") == "think"
