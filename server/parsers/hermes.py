"""Hermes' form, which Qwen 2.5 and 3 and the built-in model have too: JSON objects between tags."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from jax_engine.server.parsers.json_calls import read_json_call
from jax_engine.server.parsers.reader import Reader, Reading
from jax_engine.server.parsers.tool_parser import Form, ToolParser, json_tag

START, END = "<tool_call>", "</tool_call>"


class HermesToolParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, after text or not."""

    tags: ClassVar[tuple[str, ...]] = (START, END)
    trigger: ClassVar[str] = START
    separator: ClassVar[str] = "\n"

    def read(self, reader: Reader) -> Reading[None]:
        while (yield from reader.content_up_to((START,))):
            after_tag = reader.at
            yield from reader.blanks()
            if not (yield from read_json_call(reader)):
                reader.give_back(after_tag)
                continue
            yield from reader.blanks()
            if (yield from reader.follows(END)):
                reader.drop()

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        begin = f'{START}\n{{"name": {json.dumps(name)}, "arguments": '
        return json_tag(begin, schema, f"}}\n{END}")
