"""JSON schemas of request bodies for `/openapi.json`, made from the very structs that decode them."""

from typing import Any

import msgspec

REF_TEMPLATE = "#/components/schemas/{name}"


def body_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """A route's `openapi_extra` for a JSON body of that kind."""
    content = {"application/json": {"schema": {"$ref": REF_TEMPLATE.format(name=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def add_components(document: dict[str, Any], kinds: tuple[type[msgspec.Struct], ...]) -> None:
    """Put the schemas that `body_schema` points to into an OpenAPI document."""
    _, components = msgspec.json.schema_components(kinds, ref_template=REF_TEMPLATE)
    document.setdefault("components", {}).setdefault("schemas", {}).update(components)
