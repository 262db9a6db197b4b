"""The help of the commands: panels of rich, coloured in a terminal and plain elsewhere."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from jax_engine.server.cli.flags import Flag

if TYPE_CHECKING:
    from rich.console import Console

    from jax_engine.server.cli.parser import Command, CommandLine

PLAIN_WIDTH, MAX_WIDTH = 110, 120
# Stands for a blank at which a line must not end; no text has it.
NO_BREAK = "\ue000"


def print_top(line: "CommandLine") -> None:
    """The help of the program."""
    rows = {}
    for command in line.commands:
        rows[command.name] = command.summary
    options = {"--version": "the version", "--install-completion": "let the shell complete commands and flags"}
    _print(
        "jax-engine COMMAND [options]",
        "LLM inference and serving in JAX, on TPU, NVIDIA GPU and CPU.",
        {"commands": rows, "options": options},
        line.epilog,
    )


def print_group(word: str, commands: Iterable["Command"]) -> None:
    """The help of the commands that begin with a word."""
    rows = {command.name: command.summary for command in commands}
    epilog = f"jax-engine {word} COMMAND --help explains a command's options.\n"
    _print(f"jax-engine {word} COMMAND [options]", "", {"commands": rows}, epilog)


def print_command(command: "Command") -> None:
    """The help of one command."""
    argument = {} if command.argument is None else {command.argument.metavar or "": command.argument.help}
    panels = {
        title: {_shown_option(flag): _explained(flag) for flag in flags} for title, flags in command.panels.items()
    }
    if argument:
        panels = {"argument": argument, **panels}
    _print(f"{command.program} {command.usage}", command.summary, panels, command.epilog)


def _shown_option(flag: Flag) -> str:
    if flag.type is bool:
        return f"--[no-]{flag.option.removeprefix('--')}"
    short = f"{flag.short}, " if flag.short else ""
    more = " ..." if flag.nargs == "+" else ""
    return f"{short}{flag.option} {flag.metavar or 'NAME'}{more}"


def _explained(flag: Flag) -> str:
    text = flag.help
    if flag.choices is not None:
        text += f" [{' | '.join(flag.choices)}]"
    if flag.repeated:
        text += " [repeatable]"
    if flag.type is not bool and flag.default not in (None, "", ()):
        default = json.dumps(flag.default) if flag.takes_json else flag.default
        text += f" (default:{NO_BREAK}{default})"
    return text


def _print(usage: str, description: str, panels: dict[str, dict[str, str]], epilog: str) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = _console()
    with console.capture() as capture:
        console.print(Text.assemble(("usage: ", "bold"), usage))
        if description:
            console.print(Text(f"\n{description}"))
        console.print()
        for title, rows in panels.items():
            table = Table.grid(padding=(0, 2, 0, 0))
            table.add_column(style="cyan", max_width=max(28, console.width * 2 // 5), overflow="fold")
            table.add_column()
            for name, text in rows.items():
                table.add_row(Text(name), Text(text))
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
        if epilog:
            console.print(Text(f"\n{epilog.rstrip()}"), soft_wrap=True)
    sys.stdout.write(capture.get().replace(NO_BREAK, " "))


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, MAX_WIDTH) if console.is_terminal else PLAIN_WIDTH
    return console
