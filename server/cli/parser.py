"""The command line from data: typer's commands out of lists of `Flag`s, and what typer leaves to be wished for.

Before typer sees the arguments, underscores in options become dashes, options with several values are written out one
by one, and a misspelled name ends with one line that names the nearest.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from jax_engine.server.cli.flags import Flag, Options
from jax_engine.server.cli.sources import CONFIG, merged, variable_of

PROGRAM = "jax-engine"
HELP_OPTIONS = ("--help", "-h")
TOP_OPTIONS = (*HELP_OPTIONS, "--version", "--install-completion", "--show-completion")


@dataclass(frozen=True)
class Command:
    """One command: what it takes, and what runs it."""

    name: str  # two words for one of a group
    summary: str
    run: Callable[[Options], int]
    usage: str = "[options]"
    argument: Flag | None = None
    groups: Mapping[str, tuple[Flag, ...]] = field(default_factory=dict)
    epilog: str = ""
    configurable: bool = True  # by a file, and by variables

    @property
    def program(self) -> str:
        return f"{PROGRAM} {self.name}"

    @property
    def panels(self) -> dict[str, tuple[Flag, ...]]:
        """Its options by their titles in the help."""
        settings = {"settings": (CONFIG,)} if self.configurable else {}
        return {**self.groups, **settings}

    @property
    def options(self) -> list[Flag]:
        return [flag for flags in self.panels.values() for flag in flags]

    @property
    def flags(self) -> list[Flag]:
        """Its options, and its argument."""
        return [*([self.argument] if self.argument else []), *self.options]


@dataclass(frozen=True)
class CommandLine:
    """All commands of the program."""

    commands: tuple[Command, ...]
    epilog: str

    def names(self) -> set[str]:
        """The first words of the commands."""
        return {command.name.split()[0] for command in self.commands}

    def group(self, word: str) -> dict[str, Command]:
        """The commands that begin with `word`, by what follows it."""
        return {command.name.partition(" ")[2]: command for command in self.commands if command.name.split()[0] == word}

    def variables(self) -> set[str]:
        """The environment variables that stand for a flag of any command."""
        return {variable_of(flag.field) for command in self.commands for flag in command.flags}


def run_command_line(
    line: CommandLine,
    arguments: Sequence[str],
    *,
    version: str,
    environment: Mapping[str, str],
    run: Callable[[Command, Options], int],
) -> int:
    """Parse the arguments and `run` the command that they name; returns the exit code. A mistake ends the process."""

    def start(command: Command, given: Mapping[str, Any]) -> int:
        texts = {name: _texts(value) for name, value in given.items() if value not in (None, [])}
        try:
            variables, known = (environment, line.variables()) if command.configurable else ({}, set[str]())
            options = merged(command.flags, texts, variables, known)
        except ValueError as error:
            fail(command.program, str(error))
        return run(command, options)

    plain = checked(line, arguments)
    try:
        result = _app(line, version, start)(plain, standalone_mode=False, prog_name=PROGRAM)
    except typer.TyperException as error:
        fail(PROGRAM, error.format_message())
    return result if isinstance(result, int) else 0


def fail(program: str, message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"{program}: error: {message}", file=sys.stderr)
    sys.exit(2)


def checked(line: CommandLine, arguments: Sequence[str]) -> list[str]:
    """The arguments in typer's terms, once every name among them is known; a mistake ends the process."""
    words = list(arguments)
    if not words or words[0].startswith("-"):
        if words and words[0].partition("=")[0] not in TOP_OPTIONS:
            fail(PROGRAM, f"unknown option {words[0]}{_hint(words[0], TOP_OPTIONS, PROGRAM)}")
        return [word if word != "-h" else "--help" for word in words] or ["--help"]
    name, rest = words[0], words[1:]
    if name not in line.names():
        fail(PROGRAM, f"unknown command {name}{_hint(name, line.names(), PROGRAM)}")
    group = line.group(name)
    if "" in group:
        return [name, *_checked_options(group[""], rest)]
    program = f"{PROGRAM} {name}"
    if not rest or rest[0] in HELP_OPTIONS:
        return [name, "--help"]
    if rest[0] not in group:
        fail(program, f"unknown command {rest[0]}{_hint(rest[0], group, program)}")
    return [name, rest[0], *_checked_options(group[rest[0]], rest[1:])]


def _checked_options(command: Command, words: Sequence[str]) -> list[str]:
    by_name = {name: flag for flag in command.options for name in flag.names}
    result: list[str] = []
    positional: list[str] = []
    collecting: str | None = None  # the option that words go to, as long as they are no options
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            positional += waiting
        elif word in HELP_OPTIONS:
            return ["--help"]
        elif word.startswith("-") and word != "-":
            name, *value = _checked_option(command, by_name, word, waiting)
            result += [name, *value]
            collecting = name if by_name[name].nargs == "+" and "=" not in word else None
        elif collecting is not None:
            result += [collecting, word]
        else:
            positional.append(word)
    accepted = 0 if command.argument is None else len(positional) if command.argument.nargs else 1
    if len(positional) > accepted:
        excess, known = positional[accepted], [flag.option for flag in command.options]
        fail(command.program, f"unknown argument {excess}{_hint(excess, known, command.program)}")
    return [*result, "--", *positional]


def _checked_option(command: Command, by_name: Mapping[str, Flag], word: str, waiting: Iterator[str]) -> list[str]:
    name, equals, value = word.partition("=")
    name = name.replace("_", "-") if name.startswith("--") else name
    if name not in by_name:
        fail(command.program, f"unknown option {name}{_hint(name, by_name, command.program)}")
    if by_name[name].type is bool:
        if equals:
            fail(command.program, f"{name} takes no value; write {' or '.join(by_name[name].names[-2:])}")
        return [name]
    if not equals:
        following = next(waiting, None)
        if following is None:
            fail(command.program, f"{name} needs a value: {by_name[name].help}")
        value = following
    return [by_name[name].option, value]


def _hint(name: str, known: Iterable[str], program: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; {program} --help lists all"


def _texts(value: Any) -> list[str]:
    if isinstance(value, bool):
        return ["true" if value else "false"]
    return list(value) if isinstance(value, list | tuple) else [value]


def _app(line: CommandLine, version: str, start: Callable[[Command, Mapping[str, Any]], int]) -> typer.Typer:
    from jax_engine.server.cli import help as cli_help

    class Top(TyperGroup):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            cli_help.print_top(line)

    app = typer.Typer(cls=Top, rich_markup_mode=None, pretty_exceptions_enable=False)

    def show_version(asked: bool) -> None:
        if asked:
            print(f"{PROGRAM} {version}")
            raise typer.Exit

    @app.callback()
    def top(version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True)] = False) -> None:
        """LLM inference and serving in JAX."""

    groups: dict[str, typer.Typer] = {}
    for command in line.commands:
        first, _, second = command.name.partition(" ")
        if second and first not in groups:
            groups[first] = typer.Typer(cls=_group_class(line, first), rich_markup_mode=None)
            app.add_typer(groups[first], name=first)
        owner = groups[first] if second else app
        owner.command(second or first, cls=_command_class(command))(_entry(command, start))
    return app


def _group_class(line: CommandLine, word: str) -> type[TyperGroup]:
    from jax_engine.server.cli import help as cli_help

    class Group(TyperGroup):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            cli_help.print_group(word, line.group(word).values())

    return Group


def _command_class(command: Command) -> type[TyperCommand]:
    from jax_engine.server.cli import help as cli_help

    class Own(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            cli_help.print_command(command)

    return Own


def _entry(command: Command, start: Callable[[Command, Mapping[str, Any]], int]) -> Callable[..., int]:
    """The function that typer calls for a command, with the signature that typer reads its options from."""

    def entry(**given: Any) -> int:
        return start(command, given)

    parameters = [_parameter(flag, flag is command.argument) for flag in command.flags]
    entry.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    entry.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    entry.__doc__ = command.summary
    return entry


def _parameter(flag: Flag, is_argument: bool) -> inspect.Parameter:
    kind: Any = bool if flag.type is bool else list[str] if flag.is_list else str
    if is_argument:
        how = typer.Argument(metavar=flag.metavar, help=flag.help)
    elif flag.type is bool:
        how = typer.Option("/".join(flag.names), help=flag.help)
    else:
        how = typer.Option(*flag.names, metavar=flag.metavar, help=flag.help)
    annotation = Annotated[kind | None, how]
    return inspect.Parameter(flag.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
