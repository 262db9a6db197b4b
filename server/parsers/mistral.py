"""Mistral's forms: a list of JSON objects, and since the eleventh version of its tokenizer a name and its arguments."""

import json
import re
import secrets
import string
from collections.abc import Mapping
from typing import Any, ClassVar

from jax_engine.server.parsers.json_calls import read_json_call
from jax_engine.server.parsers.reader import Reader, Reading
from jax_engine.server.parsers.tool_parser import Form, ToolParser, json_tag

START, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
NAME = re.compile(r"[\w.-]*")


def short_id() -> str:
    """Nine letters and digits: Mistral's templates refuse other ids."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


class MistralToolParser(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`; the later form is read too."""

    tags: ClassVar[tuple[str, ...]] = (START, CALL_ID, ARGUMENTS)
    trigger: ClassVar[str] = START
    separator: ClassVar[str] = ", "
    around: ClassVar[tuple[str, str]] = (f"{START}[", "]")

    def read(self, reader: Reader) -> Reading[None]:
        reader.new_id = short_id
        while (yield from reader.content_up_to((START,))):
            after_tag, num_calls = reader.at, reader.num_calls
            yield from reader.blanks()
            if (yield from reader.follows("[")):
                yield from self._read_list(reader)
            else:
                yield from self._read_named(reader)
            if reader.num_calls == num_calls:
                reader.give_back(after_tag)

    def _read_list(self, reader: Reader) -> Reading[None]:
        yield from reader.blanks()
        while (yield from read_json_call(reader)):
            yield from reader.blanks()
            if not (yield from reader.follows(",")):
                break
            yield from reader.blanks()
        if (yield from reader.follows("]")):
            reader.drop()

    def _read_named(self, reader: Reader) -> Reading[None]:
        name = yield from reader.matching(NAME)
        if (yield from reader.follows(CALL_ID)):
            yield from reader.matching(NAME)
        yield from reader.follows(ARGUMENTS)
        yield from reader.blanks()
        yield from reader.more()
        if name and reader.text.startswith("{", reader.at):
            reader.start_call(name)
            reader.drop()
            yield from reader.arguments_value()

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        return json_tag(f'{{"name": {json.dumps(name)}, "arguments": ', schema, "}")


class MistralNamedToolParser(MistralToolParser):
    """`[TOOL_CALLS]get_weather[ARGS]{...}`, any number of them; the earlier form is read too."""

    separator: ClassVar[str] = ""
    around: ClassVar[tuple[str, str]] = ("", "")

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        return json_tag(f"{START}{name}{ARGUMENTS}", schema, "")
