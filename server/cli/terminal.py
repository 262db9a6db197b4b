"""How an answer is shown while it comes: as Markdown in a terminal, as it is elsewhere."""

import re
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

FENCE = re.compile(r"^\s*(```|~~~)", re.MULTILINE)


class Display(Protocol):
    """What shows one answer. Mutable; owned by whoever asks."""

    def reason(self, text: str) -> None:
        """More of what the model thinks before it answers."""

    def write(self, text: str) -> None:
        """More of the answer."""

    def end(self, note: str = "") -> None:
        """The answer is over; `note` stands behind it."""


class PlainDisplay:
    """The answer as it is, and nothing else, on standard output: for pipes and files."""

    def reason(self, text: str) -> None:
        """What is thought is no part of the answer."""

    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def end(self, note: str = "") -> None:
        print(note)


class MarkdownDisplay:
    """Markdown, a block at a time: a block that has ended stays as it was drawn, only the last one is drawn again."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._live: Live | None = None
        self._reasoning = False
        self._rest = ""

    def reason(self, text: str) -> None:
        self._reasoning = True
        self._console.print(text, end="", style="dim", highlight=False, markup=False, soft_wrap=True)

    def write(self, text: str) -> None:
        from rich.live import Live
        from rich.markdown import Markdown

        if self._reasoning:
            self._console.print("\n")
            self._reasoning = False
        self._rest += text
        block, self._rest = split_block(self._rest)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="visible")
            self._live.start()
        self._live.update(Markdown(self._rest), refresh=not block)
        if block:  # printed above the last one, which is drawn again with it
            self._console.print(Markdown(f"{block}\n"), end="\n\n")

    def end(self, note: str = "") -> None:
        if self._live is not None:
            self._live.stop()
        if note:
            self._console.print(note.strip(), style="dim", markup=False)


def split_block(text: str) -> tuple[str, str]:
    """(the blocks of Markdown that have ended, the rest): cut at the last blank line outside a fence of code."""
    position = text.rfind("\n\n")
    while position > 0:
        if len(FENCE.findall(text[:position])) % 2 == 0:
            return text[:position], text[position:].lstrip("\n")
        position = text.rfind("\n\n", 0, position)
    return "", text


def display() -> Display:
    """Markdown in a terminal, plain text elsewhere."""
    if not sys.stdout.isatty():
        return PlainDisplay()
    from rich.console import Console

    return MarkdownDisplay(Console())
