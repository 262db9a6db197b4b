"""Random JSON schemas, every output of which is short, and a judge of outputs that knows nothing of grammars."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Schema = dict[str, Any]
MAX_DEPTH = 2
NAMES = ("id", "name", "größe", "a b", "tags", "x", "is_new", 'quo"ted', "list", "日付")
WORDS = ("red", "green", "", "two words", "naïve", 'say "hi"', "line\nbreak", "\\", "0", "true")
PATTERNS = (r"^[a-f0-9]{4}$", r"^[A-Z]{2}-[0-9]{1,3}$", r"^(yes|no|maybe)$", r"^\d{4}-\d{2}$")


def random_schema(seed: int) -> Schema:
    """The schema of that number: an object, often with definitions that it refers to."""
    chooser = random.Random(seed)
    definitions = {f"d{index}": _any(chooser, MAX_DEPTH, ()) for index in range(chooser.randrange(3))}
    schema = _object(chooser, 0, tuple(definitions))
    return schema | {"$defs": definitions} if definitions else schema


def is_met(value: Any, schema: Schema, root: Schema | None = None) -> bool:
    """Whether a parsed output has a schema's form; for the keywords that `random_schema` uses."""
    root = schema if root is None else root
    if "$ref" in schema:
        return is_met(value, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(is_met(value, option, root) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        allowed = schema["enum"] if "enum" in schema else [schema["const"]]
        return any(type(value) is type(item) and value == item for item in allowed)
    return {
        "object": _is_object,
        "array": _is_array,
        "string": _is_string,
        "integer": lambda value, schema, _: type(value) is int and schema["minimum"] <= value <= schema["maximum"],
        "boolean": lambda value, *_: isinstance(value, bool),
        "null": lambda value, *_: value is None,
    }[schema["type"]](value, schema, root)


def _any(chooser: random.Random, depth: int, definitions: Sequence[str]) -> Schema:
    kinds: list[Callable[[random.Random, int, Sequence[str]], Schema]] = [_string, _string, _integer, _constant, _fixed]
    if depth < MAX_DEPTH:
        kinds += [_object, _array, _any_of]
    if definitions:
        kinds += [_reference]
    return chooser.choice(kinds)(chooser, depth, definitions)


def _object(chooser: random.Random, depth: int, definitions: Sequence[str]) -> Schema:
    names = chooser.sample(NAMES, chooser.randrange(1, 4 - depth + 1))
    properties = {name: _any(chooser, depth + 1, definitions) for name in names}
    required = [name for name in names if chooser.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chooser: random.Random, depth: int, definitions: Sequence[str]) -> Schema:
    least = chooser.randrange(2)
    items = _any(chooser, depth + 1, definitions)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + chooser.randrange(3)}


def _string(chooser: random.Random, *_: object) -> Schema:
    if chooser.random() < 0.4:
        return {"type": "string", "pattern": chooser.choice(PATTERNS)}
    least = chooser.randrange(3)
    return {"type": "string", "minLength": least, "maxLength": least + chooser.randrange(6)}


def _integer(chooser: random.Random, *_: object) -> Schema:
    low = chooser.randrange(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + chooser.randrange(2000)}


def _constant(chooser: random.Random, *_: object) -> Schema:
    if chooser.random() < 0.3:
        return {"const": chooser.choice(WORDS)}
    return {"enum": chooser.sample([*WORDS, 1, -2.5, None, True], 3)}


def _fixed(chooser: random.Random, *_: object) -> Schema:
    return {"type": chooser.choice(("boolean", "null"))}


def _any_of(chooser: random.Random, depth: int, definitions: Sequence[str]) -> Schema:
    return {"anyOf": [_any(chooser, depth + 1, definitions) for _ in range(2)]}


def _reference(chooser: random.Random, _: int, definitions: Sequence[str]) -> Schema:
    return {"$ref": f"#/$defs/{chooser.choice(definitions)}"}


def _is_object(value: Any, schema: Schema, root: Schema) -> bool:
    return (
        isinstance(value, Mapping)
        and set(schema["required"]) <= value.keys() <= schema["properties"].keys()
        and all(is_met(item, schema["properties"][name], root) for name, item in value.items())
    )


def _is_array(value: Any, schema: Schema, root: Schema) -> bool:
    return (
        isinstance(value, list)
        and schema["minItems"] <= len(value) <= schema["maxItems"]
        and all(is_met(item, schema["items"], root) for item in value)
    )


def _is_string(value: Any, schema: Schema, _: Schema) -> bool:
    if not isinstance(value, str):
        return False
    if "pattern" in schema:
        return re.search(schema["pattern"], value, re.ASCII) is not None
    return bool(schema["minLength"] <= len(value) <= schema["maxLength"])
