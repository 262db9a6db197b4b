"""What the parsers of tool calls have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jax_engine.server.parsers.reader import Reader, Reading

Form = dict[str, Any]  # in the terms of `jax_engine/grammar/tag_formats.py`
Schemas = Sequence[tuple[str, Mapping[str, Any]]]  # of functions that may be called, by name


class ToolParser(ABC):
    """Reads the calls of one message; everything else in it is content. A call that is none stays content.

    It also says what form calls have, so that a model can be held to it.
    """

    tags: ClassVar[tuple[str, ...]]  # what a model writes around calls; kept in its text though they be special tokens
    trigger: ClassVar[str]  # how a call, or the first one, begins
    separator: ClassVar[str] = ""  # between calls
    around: ClassVar[tuple[str, str]] = ("", "")  # all calls

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools` are those that may be called, in OpenAI's form."""
        self.tools = tools

    @abstractmethod
    def read(self, reader: Reader) -> Reading[None]:
        """Read to the end of the text."""

    @classmethod
    @abstractmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        """The form of a call whose arguments meet a schema: a `tag`. ApiError 400 when there is none."""

    @classmethod
    def calls(cls, schemas: Schemas, *, parallel: bool) -> Form:
        """The form of one call or, with `parallel`, of several."""
        several = {
            "type": "tags_with_separator",
            "tags": [cls.call(name, schema) for name, schema in schemas],
            "separator": cls.separator,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
        begin, end = cls.around
        return {"type": "tag", "begin": begin, "content": several, "end": end} if begin or end else several

    @classmethod
    def text_and_calls(cls, schemas: Schemas, *, parallel: bool) -> Form:
        """The form of any text in which whatever begins like a call is one."""
        begin, _ = cls.around
        tags = [cls.calls(schemas, parallel=parallel)] if begin else [cls.call(*schema) for schema in schemas]
        once = bool(begin) or not parallel
        return {"type": "triggered_tags", "triggers": [cls.trigger], "tags": tags, "stop_after_first": once}


def json_tag(begin: str, schema: Mapping[str, Any], end: str) -> Form:
    """A tag whose content is JSON."""
    return {"type": "tag", "begin": begin, "content": {"type": "json_schema", "json_schema": dict(schema)}, "end": end}


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments: an object, without properties if none are described."""
    parameters = function.get("parameters")
    return {"type": "object", **(parameters or {"properties": {}, "additionalProperties": False})}
