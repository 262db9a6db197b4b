"""DeepSeek's forms: V3 and R1 write the arguments in a fenced block, V3.1 by themselves."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jax_engine.server.parsers.reader import Reader, Reading
from jax_engine.server.parsers.tool_parser import Form, ToolParser, json_tag

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001  # the tokens' own characters
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
FENCE, FENCE_END = "```json\n", "\n```"
MAX_NAME = 256  # characters


class DeepSeekV31ToolParser(ToolParser):
    """All calls between two tags, each `<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{...}<｜tool▁call▁end｜>`."""

    tags: ClassVar[tuple[str, ...]] = (CALLS, CALLS_END, CALL, SEPARATOR, CALL_END)
    trigger: ClassVar[str] = CALLS
    around: ClassVar[tuple[str, str]] = (CALLS, CALLS_END)

    def read(self, reader: Reader) -> Reading[None]:
        while tag := (yield from reader.content_up_to((CALLS, CALL, CALLS_END))):
            after_tag = reader.at
            if tag == CALLS_END and reader.num_calls:
                reader.drop()
                continue
            if tag == CALLS:
                yield from reader.blanks()
            is_call = tag == CALL or (tag == CALLS and (yield from reader.follows(CALL)))
            if not is_call or not (yield from self._read_call(reader)):
                reader.give_back(after_tag)

    def _read_call(self, reader: Reader) -> Reading[bool]:
        name = yield from self._read_name(reader)
        yield from reader.more()
        if not name or not reader.text.startswith("{", reader.at):
            return False
        reader.start_call(name)
        reader.drop()
        yield from reader.arguments_value()
        yield from reader.blanks()
        yield from reader.follows(FENCE_END.strip())
        yield from reader.blanks()
        if (yield from reader.follows(CALL_END)):
            reader.drop()
        return True

    def _read_name(self, reader: Reader) -> Reading[str | None]:
        name = yield from reader.up_to(SEPARATOR, MAX_NAME)
        yield from reader.blanks()
        return name and name.strip()

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        return json_tag(f"{CALL}{name}{SEPARATOR}", schema, CALL_END)


class DeepSeekV3ToolParser(DeepSeekV31ToolParser):
    """The same with `function<｜tool▁sep｜>get_weather`, and the arguments in a fenced block on lines of their own."""

    separator: ClassVar[str] = "\n"

    def _read_name(self, reader: Reader) -> Reading[str | None]:
        if (yield from reader.up_to(SEPARATOR, MAX_NAME)) is None:
            return None
        name = yield from reader.up_to("\n", MAX_NAME)
        yield from reader.blanks()
        if (yield from reader.follows(FENCE.strip())):
            yield from reader.blanks()
        return name and name.strip()

    @classmethod
    def call(cls, name: str, schema: Mapping[str, Any]) -> Form:
        return json_tag(f"{CALL}function{SEPARATOR}{name}\n{FENCE}", schema, FENCE_END + CALL_END)
