"""Qwen3-Coder's form: XML in which each argument is an element with its bare text."""

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jax_engine.server.parsers.reader import Reader, Reading, held_back
from jax_engine.server.parsers.schema_values import (
    NOTHING,
    cannot_be_enforced,
    either,
    properties_of,
    required_of,
    sequence,
    text,
    types_of,
)
from jax_engine.server.parsers.tool_parser import Form, ToolParser

START, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
MAX_NAME = 256  # characters
OF_STRINGS = {"pattern", "format", "minLength", "maxLength", "allOf", "anyOf", "oneOf", "$ref"}


class Qwen3CoderToolParser(ToolParser):
    """`<tool_call><function=get_weather><parameter=city>Paris</parameter></function></tool_call>`, on several lines.

    What a value means is for the function's schema to say: it is text unless that has another type.
    """

    tags: ClassVar[tuple[str, ...]] = (START, END)
    trigger: ClassVar[str] = START
    separator: ClassVar[str] = "\n"

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(tools)
        functions = [tool["function"] for tool in tools]
        self._properties = {
            function["name"]: (function.get("parameters") or {}).get("properties") or {} for function in functions
        }

    def read(self, reader: Reader) -> Reading[None]:
        while tag := (yield from reader.content_up_to((START, FUNCTION))):
            after_tag = reader.at
            if tag == START:
                yield from reader.blanks()
            is_call = tag == FUNCTION or (yield from reader.follows(FUNCTION))
            name = (yield from reader.up_to(">", MAX_NAME)) if is_call else None
            if not name or name != name.strip():
                reader.give_back(after_tag)
                continue
            reader.start_call(name)
            reader.drop()
            yield from self._read_arguments(reader, self._properties.get(name, {}))

    def _read_arguments(self, reader: Reader, properties: Mapping[str, Any]) -> Reading[None]:
        before = "{"
        while True:
            yield from reader.blanks()
            if not (yield from reader.more()):
                return
            if not (yield from reader.follows(PARAMETER)):
                break
            key = yield from reader.up_to(">", MAX_NAME)
            if key is None:
                break
            yield from reader.follows("\n")
            reader.drop()
            reader.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._read_value(reader, types_of(properties.get(key)) or {"string"})):
                return
            before = ", "
        reader.arguments("{}" if before == "{" else "}")
        if (yield from reader.follows(FUNCTION_END)):
            yield from reader.blanks()
            yield from reader.follows(END)
            reader.drop()

    def _read_value(self, reader: Reader, types: set[str]) -> Reading[bool]:
        """Show a value as JSON; False when the text ends in it."""
        ends = ("\n" + PARAMETER_END, PARAMETER_END)
        streams = types == {"string"}
        if streams:
            reader.arguments('"')
        while not (found := [reader.text.index(end) for end in ends if end in reader.text]):
            if streams:
                certain = len(reader.text) - (0 if reader.ended else held_back(reader.text, ends))
                reader.at = certain
                reader.arguments(_inside_string(reader.drop()))
            if reader.ended:
                return False
            yield
        value = reader.text[: min(found)]
        reader.at = reader.text.index(PARAMETER_END) + len(PARAMETER_END)
        reader.drop()
        reader.arguments(_inside_string(value) + '"' if streams else as_json(value, types))
        return True

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        required, elements = required_of(schema), []
        for key, inside in properties_of(name, schema).items():
            value = _value_form(name, key, inside)
            element = sequence(text(f"{PARAMETER}{key}>\n"), *value)
            elements.append(element if key in required else either([element, NOTHING]))
        begin, end = f"{START}\n{FUNCTION}{name}>\n", f"{FUNCTION_END}\n{END}"
        return {"type": "tag", "begin": begin, "content": sequence(*(elements or [NOTHING])), "end": end}


def _value_form(name: str, key: str, schema: Mapping[str, Any]) -> list[Form]:
    end = f"\n{PARAMETER_END}\n"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) for choice in choices):
        return [either([text(choice) for choice in choices]), text(end)]
    if "string" not in types_of(schema) and types_of(schema):
        return [{"type": "json_schema", "json_schema": dict(schema)}, text(end)]
    if unknown := OF_STRINGS & schema.keys():
        raise cannot_be_enforced(name, f"{key!r} is a text and has {min(unknown)!r}")
    return [{"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": end}]


def _inside_string(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)[1:-1]


def as_json(value: str, types: set[str]) -> str:
    """The JSON of a value that is meant to be of one of these types; text where it is of none."""
    bare = value.strip()
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # the model's, not ours
                meant = read(bare)
            written = json.dumps(meant, ensure_ascii=False, allow_nan=False)
            written.encode()
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if not isinstance(meant, str) or "string" not in types:
            return written
    return json.dumps(value, ensure_ascii=False)
