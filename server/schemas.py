"""JSON schemas of what requests hold for `/openapi.json`, made from the very structs that decode them."""

from typing import Any

import msgspec

REF_TEMPLATE = "#/components/schemas/{name}"


def body_schema(kind: type[msgspec.Struct], *, example: dict[str, Any] | None = None) -> dict[str, Any]:
    """A route's `openapi_extra` for a JSON body of that kind, with an example that the built-in model can answer."""
    media: dict[str, Any] = {"schema": {"$ref": REF_TEMPLATE.format(name=kind.__name__)}}
    if example is not None:
        media["example"] = example
    return {"requestBody": {"required": True, "content": {"application/json": media}}}


def add_components(document: dict[str, Any], kinds: tuple[type[msgspec.Struct], ...]) -> None:
    """Put the schemas that `body_schema` points to into an OpenAPI document."""
    _, components = msgspec.json.schema_components(kinds, ref_template=REF_TEMPLATE)
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)


def query_schema(parameter: dict[str, Any]) -> dict[str, Any]:
    """A route's `openapi_extra` for one parameter in its URL, which may be left out."""
    return {"parameters": [{"in": "query", "required": False, **parameter}]}
