"""Pythonic form, of Llama 3.2 and 4 and others: an answer that is a list of calls as Python would write them."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from jax_engine.server.parsers.reader import Reader, Reading
from jax_engine.server.parsers.schema_values import NOTHING, either, properties_of, required_of, sequence, text
from jax_engine.server.parsers.tool_parser import Form, Schemas, ToolParser

PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
NAME = re.compile(r"[^\W\d][\w.]*")
JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicToolParser(ToolParser):
    """`[get_weather(city="Paris"), get_time()]` at the beginning of the text, Llama 4's with tags around it.

    A call is shown when it is whole: only then is it known to be one.
    """

    tags: ClassVar[tuple[str, ...]] = (PYTHON_START, PYTHON_END)
    separator: ClassVar[str] = ", "
    around: ClassVar[tuple[str, str]] = ("[", "]")

    def read(self, reader: Reader) -> Reading[None]:
        yield from reader.blanks()
        yield from reader.follows(PYTHON_START)
        yield from reader.blanks()
        if (yield from reader.follows("[")):
            yield from self._read_calls(reader)
        reader.at = 0

    def _read_calls(self, reader: Reader) -> Reading[None]:
        while True:
            yield from reader.blanks()
            begin = reader.at
            name = yield from reader.matching(NAME)
            if not name or not (yield from _skip_parentheses(reader)):
                return
            arguments = call_arguments(reader.text[begin : reader.at])
            if arguments is None:
                return
            reader.start_call(name)
            reader.arguments(arguments)
            reader.drop()
            yield from reader.blanks()
            if not (yield from reader.follows(",")):
                break
        if (yield from reader.follows("]")):
            reader.drop()
            yield from reader.blanks()
            if (yield from reader.follows(PYTHON_END)):
                reader.drop()

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        required = required_of(schema)
        given = {
            key: sequence(text(f"{key}="), {"type": "json_schema", "json_schema": inside})
            for key, inside in properties_of(name, schema).items()
        }
        return {"type": "tag", "begin": f"{name}(", "content": _listed(given, required), "end": ")"}

    @classmethod
    def text_and_calls(cls, schemas: Schemas, *, parallel: bool) -> Form:
        free = {"type": "regex", "pattern": r"([^\[](.|\n)*)?"}
        return {"type": "or", "elements": [cls.calls(schemas, parallel=parallel), free]}


class Llama4PythonicToolParser(PythonicToolParser):
    """The same with `<|python_start|>` and `<|python_end|>` around the list."""

    around: ClassVar[tuple[str, str]] = (f"{PYTHON_START}[", f"]{PYTHON_END}")


def _listed(given: Mapping[str, Form], required: list[str]) -> Form:
    """Arguments with commas between them: the required ones, and of the others any, in order."""
    others = [either([sequence(text(", "), form), NOTHING]) for key, form in given.items() if key not in required]
    if required:
        first, *rest = [given[key] for key in required]
        return sequence(first, *(sequence(text(", "), form) for form in rest), *others)
    ways = [sequence(form, *others[number + 1 :]) for number, form in enumerate(given.values())]
    return either([*ways, NOTHING])


def _skip_parentheses(reader: Reader) -> Reading[bool]:
    """Move the place behind the brackets that open at it; False when they do not, or do not close."""
    if not (yield from reader.follows("(")):
        return False
    depth, quote, escaped = 1, "", False
    while depth and (yield from reader.more()):
        character = reader.text[reader.at]
        if quote:
            quote = quote if escaped or character != quote else ""
            escaped = not escaped and character == "\\"
        elif character in "\"'":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        reader.at += 1
    return depth == 0


def call_arguments(source: str) -> str | None:
    """The arguments of a Python call as a JSON object; None for what is no call with literals by name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # the model's, not ours
            call = ast.parse(source, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                return None
            values[keyword.arg] = _literal(source, keyword.value)
        written = json.dumps(values, ensure_ascii=False, allow_nan=False)
        written.encode()
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return written


def _literal(source: str, node: ast.expr) -> Any:
    """A value as JSON has it, or else as Python has it."""
    try:
        return json.loads(ast.get_source_segment(source, node) or "")
    except ValueError:
        named = _JsonNames().visit(node)
        return ast.literal_eval(ast.fix_missing_locations(named))


class _JsonNames(ast.NodeTransformer):
    """JSON's own words among Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(JSON_NAMES[node.id]) if node.id in JSON_NAMES else node
