"""Llama 3.1's and 3.2's form: an answer that is JSON objects and nothing else."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from jax_engine.server.parsers.json_calls import read_json_call
from jax_engine.server.parsers.reader import Reader, Reading
from jax_engine.server.parsers.tool_parser import Form, Schemas, ToolParser, json_tag

PYTHON_TAG = "<|python_tag|>"


class Llama3JsonToolParser(ToolParser):
    """`{"name": ..., "parameters": {...}}`, several with semicolons between them, at the beginning of the text."""

    tags: ClassVar[tuple[str, ...]] = (PYTHON_TAG,)
    separator: ClassVar[str] = "; "

    def read(self, reader: Reader) -> Reading[None]:
        yield from reader.blanks()
        yield from reader.follows(PYTHON_TAG)
        yield from reader.blanks()
        while (yield from read_json_call(reader)):
            yield from reader.blanks()
            if not (yield from reader.follows(";")):
                break
            yield from reader.blanks()
        reader.at = 0

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        return json_tag(f'{{"name": {json.dumps(name)}, "parameters": ', schema, "}")

    @classmethod
    def text_and_calls(cls, schemas: Schemas, *, parallel: bool) -> Form:
        text = {"type": "regex", "pattern": r"([^{](.|\n)*)?"}
        return {"type": "or", "elements": [cls.calls(schemas, parallel=parallel), text]}
