"""Typed reading of a parsed `config.json`: a field that is absent or null has its default, a wrong one is named."""

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


def integer(fields: Fields, name: str, *, default: int | None = None, low: int = 1) -> int:
    """An integer of at least `low`; required when there is no default."""
    value = default if fields.get(name) is None else fields[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {'missing' if value is None else repr(value)}; it must be an integer")
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")
    return value


def number(fields: Fields, name: str, *, default: float) -> float:
    """An integer or float, as a float."""
    value = default if fields.get(name) is None else fields[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)


def boolean(fields: Fields, name: str, *, default: bool = False) -> bool:
    """True or false."""
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; it must be true or false")
    return value


def text(fields: Fields, name: str, *, default: str) -> str:
    """A string."""
    value = default if fields.get(name) is None else fields[name]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}; it must be a string")
    return value


def listing(fields: Fields, name: str, kind: type) -> tuple[Any, ...]:
    """A list whose entries are all of one kind (int or str; float takes integers too); empty when absent."""
    value = [] if fields.get(name) is None else fields[name]
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, list) or not all(isinstance(entry, kinds) for entry in value):
        raise ValueError(f"{name} is {value!r}; it must be a list of {kind.__name__}")
    return tuple(kind(entry) for entry in value)


def group(fields: Fields, name: str) -> Fields:
    """A nested object; empty when absent."""
    value = {} if fields.get(name) is None else fields[name]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; it must be an object")
    return value
