"""Where settings come from, the first that has one: the command line, environment variables, a YAML file, defaults."""

import difflib
import json
import logging
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_engine.config import CACHE_VARIABLE, ENVIRONMENT_PREFIX
from jax_engine.server.cli.flags import Flag, Options

if TYPE_CHECKING:
    import yaml

logger = logging.getLogger(__name__)

CONFIG = Flag(
    "config",
    "YAML file of settings, with flags as keys: max-model-len: 8K. What is given here goes before variables such as "
    "JAX_ENGINE_MAX_MODEL_LEN, and these before the file",
    metavar="FILE",
)


def merged(
    flags: Sequence[Flag],
    given: Mapping[str, Sequence[str]],
    environment: Mapping[str, str],
    known_variables: Iterable[str],
) -> Options:
    """All that a command was given, each value from the first source that has one.

    `given` are the command line's texts by field; of `environment`, what `flags` know. `known_variables` are those of
    every command: any other is a misspelling, which is logged.

    Raises:
        ValueError: a text that is no value of its flag, an unknown key of the file, a required flag left out.
    """
    by_field = {flag.field: flag for flag in flags}
    values = {field: _value(by_field[field], texts, by_field[field].option) for field, texts in given.items()}
    sources: dict[str, str] = {}
    variables = {variable_of(field): field for field in by_field}
    warn_of_unknown(environment, known_variables)
    for name in variables.keys() & environment.keys():
        field = variables[name]
        if field not in values:
            flag = by_field[field]
            values[field] = _value(flag, _words(flag, environment[name], name), name)
            sources[field] = name
    if (path := values.pop(CONFIG.field, None)) is not None:
        for field, (texts, where) in file_settings(Path(path), by_field).items():
            if field not in values:
                values[field], sources[field] = _value(by_field[field], texts, where), where
    missing = [flag for flag in flags if flag.required and flag.field not in values]
    if missing:
        raise ValueError(f"{missing[0].option} is missing: {missing[0].help}")
    return Options(values, sources)


def variable_of(field: str) -> str:
    """The environment variable of a flag."""
    return ENVIRONMENT_PREFIX + field.upper()


def warn_of_unknown(environment: Mapping[str, str], known: Iterable[str]) -> None:
    """Log each variable that no flag of any command has, but not its value."""
    known = [*known, CACHE_VARIABLE]
    for name in environment.keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        logger.warning("the environment variable %s is no setting%s", name, hint)


def file_settings(path: Path, by_field: Mapping[str, Flag]) -> dict[str, tuple[list[str], str]]:
    """(texts of the value, where it stands) for each key of a YAML file, by field.

    Raises:
        ValueError: not a YAML mapping, a key that is no flag or stands there twice, a value of the wrong shape.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"--config {path} must hold keys and values, such as max-model-len: 8K")
    settings: dict[str, tuple[list[str], str]] = {}
    for key, value in node.value:
        where = f"--config {path}, line {key.start_mark.line + 1}"
        field = str(key.value).replace("-", "_")
        if field == CONFIG.field or field not in by_field:
            names = [name.replace("_", "-") for name in by_field if name != CONFIG.field]
            near = difflib.get_close_matches(field.replace("_", "-"), names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; keys are the command's flags without the dashes"
            raise ValueError(f"{where}: unknown key {key.value}{hint}")
        if field in settings:
            raise ValueError(f"{where}: {key.value} stands there for the second time; keep one")
        place = f"{where}: {key.value}"
        settings[field] = _texts(loader, by_field[field], value, place), place
    return settings


def _texts(loader: "yaml.SafeLoader", flag: Flag, node: "yaml.Node", place: str) -> list[str]:
    """A YAML value as it would stand on the command line: scalars as they are written, 0123 too."""
    import yaml

    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null":
            raise ValueError(f"{place} has no value; give one, or leave the key out")
        return [node.value]
    content: Any = loader.construct_object(node, deep=True)
    if isinstance(content, dict) or not (flag.is_list or flag.takes_json):
        if not flag.takes_json:
            raise ValueError(f"{place} takes one value, not a list or a mapping")
        return [json.dumps(content)]
    if flag.takes_json:
        return [json.dumps(content)]
    return [element.value for element in node.value if isinstance(element, yaml.ScalarNode)]


def _words(flag: Flag, text: str, place: str) -> list[str]:
    """The values in a variable: of a list, separated as a shell separates words."""
    if not flag.is_list:
        return [text]
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{place} is a list of words with quotes as in a shell, and has {error}") from None


def _value(flag: Flag, texts: Sequence[str], place: str) -> Any:
    try:
        return flag.value(texts)
    except ValueError as error:
        raise ValueError(f"{place} {error}") from None
