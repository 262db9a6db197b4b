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
    return {key: {**shared, **properties.get(key, {})} for key in order}


def required_of(schema: Mapping[str, Any]) -> list[str]:
    """The arguments that must be given."""
    return list(schema.get("required", ()))


def types_of(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that a schema speaks of; empty when it does not say."""
    own = schema.get("type", [])
    types = {own} if isinstance(own, str) else set(own)
    ways = [*schema.get("anyOf", ()), *schema.get("oneOf", ())]
    return types.union(*(types_of(way) for way in ways if isinstance(way, Mapping)))


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
