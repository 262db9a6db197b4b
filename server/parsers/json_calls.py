"""Calls as JSON objects: `{"name": "get_weather", "arguments": {"city": "Paris"}}`."""

import json

from jax_engine.server.parsers.reader import Reader, Reading

ARGUMENTS = ("arguments", "parameters")
BEFORE_NAME = ("id", "type")  # JSON that begins otherwise is some other object, which is not held back any longer


def read_json_call(reader: Reader) -> Reading[bool]:
    """Read a call from the place on; False, with nothing shown, when there is none.

    The name is shown as soon as it is known, the arguments as they come. After the name there is no way back: where the
    object goes wrong then, the place stops.
    """
    if not (yield from reader.follows("{")):
        return False
    call = _Call(reader)
    while True:
        yield from reader.blanks()
        if (yield from reader.follows("}")):
            break
        if not (yield from call.read_member()):
            return call.end()
        yield from reader.blanks()
        if not (yield from reader.follows(",")):
            if not (yield from reader.follows("}")):
                return call.end()
            break
    if call.has_begun and not call.has_arguments:
        reader.arguments("{}")
    return call.end()


class _Call:
    """One call as far as it is read. Mutable; owned by `read_json_call`."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._held: list[str] = []  # arguments that stand before the name
        self.has_begun = False
        self.has_arguments = False

    def read_member(self) -> Reading[bool]:
        """A name and its value; False when that is not what comes."""
        reader = self._reader
        key = yield from reader.string()
        yield from reader.blanks()
        if key is None or not (yield from reader.follows(":")):
            return False
        yield from reader.blanks()
        if key == "name" and not self.has_begun:
            name = yield from reader.string()
            if not name:
                return False
            self._begin(name)
            return True
        if key in ARGUMENTS and not self.has_arguments:
            self.has_arguments = True
            return (yield from self._read_arguments())
        if not self.has_begun and key not in BEFORE_NAME:
            return False
        return (yield from reader.value(_ignore))

    def end(self) -> bool:
        """Use up what was read, if it was a call; whether it was."""
        if self.has_begun:
            self._reader.drop()
        return self.has_begun

    def _begin(self, name: str) -> None:
        self._reader.start_call(name)
        self._reader.arguments("".join(self._held))
        self.has_begun = True

    def _read_arguments(self) -> Reading[bool]:
        reader = self._reader
        yield from reader.more()
        if reader.text.startswith(("{", "["), reader.at):
            if self.has_begun:
                return (yield from reader.arguments_value())
            return (yield from reader.value(self._held.append))
        # JSON inside a string, or nothing.
        pieces: list[str] = []
        is_whole = yield from reader.value(pieces.append)
        text = "".join(pieces)
        if is_whole and text.startswith('"'):
            try:
                text = str(json.loads(text, strict=False))
            except ValueError:
                is_whole = False
        text = "{}" if text == "null" else text
        if self.has_begun:
            reader.arguments(text)
        else:
            self._held.append(text)
        return is_whole


def _ignore(text: str) -> None:
    """A member that says nothing about the call."""
