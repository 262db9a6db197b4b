"""The form that an answer is to have, by whichever of its names a client gives it."""

from typing import Any

import msgspec

from jax_engine.server.errors import ApiError
from jax_engine.server.validation import check_neutral

# vLLM's names before `structured_outputs` -> its fields.
OLDER_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
}


class FormFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields that give the answer a form; one of them at most."""

    structured_outputs: dict[str, Any] | None = None  # the fields of `StructuredOutputsParams`
    response_format: dict[str, Any] | None = None  # OpenAI's: text, json_object, json_schema, structural_tag
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structural_tag: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None

    def form(self) -> dict[str, Any] | None:
        """The fields of `StructuredOutputsParams` that are asked for, by any name; ApiError 400 for two forms."""
        check_neutral("guided_decoding_backend", self.guided_decoding_backend, ("auto", "guidance"))
        forms: dict[str, dict[str, Any]] = {}
        if self.structured_outputs is not None:
            forms["structured_outputs"] = self.structured_outputs
        if self.response_format is not None and (form := _of_response_format(self.response_format)):
            forms["response_format"] = form
        values = msgspec.structs.asdict(self)
        forms |= {name: {field: values[name]} for name, field in OLDER_NAMES.items() if values[name] is not None}
        if len(forms) > 1:
            names = " and ".join(forms)
            raise ApiError(400, f"{names} each give the answer a form; drop all but one", param=names.split()[-1])
        form = next(iter(forms.values()), None)
        if self.guided_whitespace_pattern is not None:
            name = "guided_whitespace_pattern"
            if form is None or "whitespace_pattern" in form:
                raise ApiError(400, f"{name} needs guided_json; drop it", param=name, code="invalid_value")
            form = form | {"whitespace_pattern": self.guided_whitespace_pattern}
        return form


def _of_response_format(given: dict[str, Any]) -> dict[str, Any] | None:
    """OpenAI's `response_format`, as the fields of `StructuredOutputsParams`; None for plain text."""
    kind, rest = given.get("type"), given.keys() - {"type"}
    if kind in ("text", "json_object") and not rest:
        return {"json_object": True} if kind == "json_object" else None
    if kind == "structural_tag":
        return {"structural_tag": given}
    described = given.get("json_schema")
    if kind == "json_schema" and rest == {"json_schema"} and isinstance(described, dict) and "schema" in described:
        # The schema is enforced whether `strict` or not; `name` and `description` are for the client's own use.
        if unknown := described.keys() - {"name", "description", "schema", "strict"}:
            name = f"response_format.json_schema.{min(unknown)}"
            raise ApiError(400, f"unknown parameter {name!r}", param=name, code="unknown_parameter")
        return {"json": described["schema"]}
    raise ApiError(
        400,
        'response_format must be {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", "json_schema": '
        '{"name": ..., "schema": {...}}} or {"type": "structural_tag", "structures": [...], "triggers": [...]}',
        param="response_format",
        code="invalid_value",
    )
