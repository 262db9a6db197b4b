"""Forms of calls that name their arguments one by one, from the schema of the object that they make up."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_engine.server.errors import ApiError
from jax_engine.server.parsers.tool_parser import Form

NOTHING: Form = {"type": "const_string", "value": ""}
# What may stand beside the properties without meaning anything to them.
KNOWN = {"type", "properties", "required", "additionalProperties", "title", "description", "$defs", "definitions"}


def properties_of(name: str, schema: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The schemas of a function's arguments by name, each whole by itself, those that are required first.

    Raises:
        ApiError: 400; the schema says something about them together.
    """
    if unknown := schema.keys() - KNOWN:
        raise cannot_be_enforced(name, f"its parameters have {min(unknown)!r}")
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = required_of(schema)
    properties = schema.get("properties", {})
    order = [*required, *(key for key in properties if key not in required)]
    return {key: {**shared, **_as_object(properties.get(key, True))} for key in order}


def _as_object(schema: Mapping[str, Any] | bool) -> Mapping[str, Any]:
    """A schema of JSON's own form: `true` allows everything, `false` nothing."""
    return ({} if schema else {"not": {}}) if isinstance(schema, bool) else schema


def required_of(schema: Mapping[str, Any]) -> list[str]:
    """The arguments that must be given."""
    return list(schema.get("required", ()))


def types_of(schema: object) -> set[str]:
    """The JSON types that a schema and its immediate alternatives speak of; empty when they do not say."""
    if not isinstance(schema, Mapping):
        return set()
    ways = [schema, *(way for key in ("anyOf", "oneOf") for way in _listed(schema.get(key)))]
    given = [way.get("type") for way in ways if isinstance(way, Mapping)]
    return {kind for own in given for kind in (_listed(own) or [own]) if isinstance(kind, str)}


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def sequence(*elements: Form) -> Form:
    """One after the other."""
    return {"type": "sequence", "elements": list(elements)}


def either(elements: Sequence[Form]) -> Form:
    """One of them."""
    return {"type": "or", "elements": list(elements)}


def text(value: str) -> Form:
    """A text to the letter."""
    return {"type": "const_string", "value": value}


def cannot_be_enforced(name: str, reason: str) -> ApiError:
    """The error for a function that a model cannot be held to in the form that it writes."""
    message = f"the parameters of the tool {name!r} cannot be enforced in the form that this model writes: {reason}"
    return ApiError(400, message, param="tools", code="unsupported_parameter")
