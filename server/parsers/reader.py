"""Reading a text that comes in pieces. What is read is a generator that yields where it needs more text.

Decisions are made on characters alone, never on where a piece ends, so that any cuts give the same parts.
"""

import json
import re
import uuid
from collections.abc import Callable, Generator
from typing import TypeVar

import msgspec

Result = TypeVar("Result")
Reading = Generator[None, None, Result]

BLANKS = " \t\r\n"
# As much of a JSON string as matters to find its end.
STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers."""

    text: str


class ContentDelta(msgspec.Struct, frozen=True):
    """More of the answer."""

    text: str


class ToolCallStart(msgspec.Struct, frozen=True):
    """The tool call of number `index` in this message begins."""

    index: int
    call_id: str
    name: str


class ToolCallArguments(msgspec.Struct, frozen=True):
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


Part = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallArguments


def new_call_id() -> str:
    """An id in OpenAI's manner."""
    return f"call_{uuid.uuid4().hex[:24]}"


class Reader:
    """A text as far as it has come, a place in it, and the parts read from it. Mutable; owned by a `MessageParser`.

    What is before `at` has been looked at and not yet used; `drop` uses it up, `give_back` makes it content.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False  # no text will follow
        self.parts: list[Part] = []
        self.num_calls = 0
        self.new_id: Callable[[], str] = new_call_id

    # What is shown.

    def content(self, text: str) -> None:
        """Show text of the answer."""
        if text:
            self.parts.append(ContentDelta(text))

    def reasoning(self, text: str) -> None:
        """Show text of the reasoning."""
        if text:
            self.parts.append(ReasoningDelta(text))

    def start_call(self, name: str) -> None:
        """Show that a call begins."""
        self.parts.append(ToolCallStart(self.num_calls, self.new_id(), name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """Show more of the arguments of the latest call."""
        if text:
            self.parts.append(ToolCallArguments(self.num_calls - 1, text))

    # What is used up.

    def drop(self) -> str:
        """Use up what is before the place; returns it."""
        used, self.text, self.at = self.text[: self.at], self.text[self.at :], 0
        return used

    def give_back(self, end: int) -> None:
        """Show the first `end` characters as content after all, and go on from there."""
        self.at = end
        self.content(self.drop())

    # What is looked at.

    def more(self) -> Reading[bool]:
        """Wait for a character at the place; False when the text has ended there."""
        while self.at >= len(self.text):
            if self.ended:
                return False
            yield
        return True

    def follows(self, literal: str) -> Reading[bool]:
        """Whether `literal` comes next; the place moves behind it if so."""
        while not self.ended and len(self.text) < self.at + len(literal) and literal.startswith(self.text[self.at :]):
            yield
        found = self.text.startswith(literal, self.at)
        self.at += len(literal) if found else 0
        return found

    def blanks(self) -> Reading[None]:
        """Move the place behind blanks."""
        while (yield from self.more()) and self.text[self.at] in BLANKS:
            self.at += 1

    def string(self) -> Reading[str | None]:
        """A JSON string, decoded; None when there is none."""
        if not (yield from self.more()) or self.text[self.at] != '"':
            return None
        while (found := STRING.match(self.text, self.at)) is None:
            if self.ended:
                return None
            yield
        self.at = found.end()
        try:
            return str(json.loads(found[0], strict=False))
        except ValueError:
            return None

    def matching(self, pattern: re.Pattern[str]) -> Reading[str]:
        """As many characters as a pattern takes, which must not look beyond them."""
        while (yield from self.more()):
            found = pattern.match(self.text, self.at)
            if found is None:
                return ""
            if found.end() < len(self.text) or self.ended:
                self.at = found.end()
                return found[0]
            yield
        return ""

    def up_to(self, literal: str, limit: int) -> Reading[str | None]:
        """What comes before `literal` with the place behind both; None when that is more than `limit` characters."""
        while True:
            place = self.text.find(literal, self.at, self.at + limit + len(literal))
            before = self.text[self.at : place if place >= 0 else None]
            if place < 0 and (self.ended or len(before) >= limit + len(literal)):
                return None
            if place >= 0:
                self.at = place + len(literal)
                return before
            yield

    def arguments_value(self) -> Reading[bool]:
        """Show a JSON value as the arguments of the latest call, as it comes; whether it is whole."""

        def show(text: str) -> None:
            self.arguments(text)
            self.drop()

        return (yield from self.value(show))

    def value(self, write: Callable[[str], None]) -> Reading[bool]:
        """Pass on the text of a JSON value as it comes, which `write` may `drop`; False when it is not whole. Only
        brackets and quotes are minded.
        """
        depth, in_string, escaped, done, is_empty = 0, False, False, False, True
        while not done and (yield from self.more()):
            begin = self.at
            for character in self.text[begin:]:
                if in_string:
                    in_string = escaped or character != '"'
                    escaped = not escaped and character == "\\"
                    done = not in_string and depth == 0
                elif character in "}]," + BLANKS and depth == 0:  # a number or a word has ended before this
                    is_empty = is_empty and self.at == begin
                    write(self.text[begin : self.at])
                    return not is_empty
                elif character == '"':
                    in_string = True
                elif character in "{[":
                    depth += 1
                elif character in "}]":
                    depth -= 1
                    done = depth == 0
                self.at += 1
                if done:
                    break
            is_empty = False
            write(self.text[begin : self.at])
        return done

    def content_up_to(self, tags: tuple[str, ...]) -> Reading[str | None]:
        """Show content up to the first of the tags, and return that, with the place behind it; None at the end.

        The tag and the blanks before it are still in the text, for `drop` or `give_back`. Blanks behind calls are not
        shown when nothing follows them.
        """
        return (yield from self._up_to(tags, self.content))

    def reasoning_up_to(self, tag: str) -> Reading[bool]:
        """Show reasoning up to the tag, which is used up with the blanks before it; whether there was one."""
        found = yield from self._up_to((tag,), self.reasoning)
        self.drop()
        return found is not None

    def _up_to(self, tags: tuple[str, ...], show: Callable[[str], None]) -> Reading[str | None]:
        while True:
            places = [(place, tag) for tag in tags if (place := self.text.find(tag, self.at)) >= 0]
            if places:
                place, tag = min(places)
                self._show(place - _num_blanks_before(self.text, place), show)
                self.at = self.text.index(tag) + len(tag)
                return tag
            if self.ended:
                text = self.text.rstrip(BLANKS) if self.num_calls else self.text
                self._show(len(text), show)
                return None
            self._show(len(self.text) - (held_back(self.text, tags) if tags or self.num_calls else 0), show)
            yield

    def _show(self, end: int, show: Callable[[str], None]) -> None:
        show(self.text[:end])
        self.text, self.at = self.text[end:], 0


def held_back(text: str, tags: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a tag, or blanks before one."""
    begun = 0
    for tag in tags:
        for count in range(min(len(tag) - 1, len(text)), begun, -1):
            if text.endswith(tag[:count]):
                begun = count
                break
    return begun + _num_blanks_before(text, len(text) - begun)


def _num_blanks_before(text: str, place: int) -> int:
    return place - len(text[:place].rstrip(BLANKS))
