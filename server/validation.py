"""Decoding a request's body, and the errors that name what is wrong with it."""

import difflib
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec

from jax_engine.server.errors import ApiError

MAX_PROMPTS = 2048

_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?", re.DOTALL)
_UNKNOWN_KIND = re.compile(r"Invalid value '(.*)' - at `\$\.?(.*)`", re.DOTALL)
_LOCATED = re.compile(r"(.*) - at `\$\.?(.*)`", re.DOTALL)

Request = TypeVar("Request", bound=msgspec.Struct)
NOTHING_NESTED: Mapping[str, type[msgspec.Struct]] = MappingProxyType({})


def decode(kind: type[Request], body: bytes, nested: Mapping[str, type[msgspec.Struct]] = NOTHING_NESTED) -> Request:
    """`body` as a request of that kind; `nested` are the structs among its fields.

    Raises:
        ApiError: 400; not UTF-8, not JSON, an unknown, missing or wrongly typed field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise explained(error, kind, nested) from None
    except msgspec.DecodeError as error:
        return _decode_with_nan(kind, body, nested, error)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not valid UTF-8; send JSON encoded as UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body's JSON is nested too deeply", code="invalid_json") from None


def _decode_with_nan(
    kind: type[Request], body: bytes, nested: Mapping[str, type[msgspec.Struct]], error: msgspec.DecodeError
) -> Request:
    """Read the NaN and Infinity that some clients write although JSON has none, so that the refusal names the field."""
    malformed = ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json")
    if b"NaN" not in body and b"Infinity" not in body:
        raise malformed from None
    try:
        return msgspec.convert(json.loads(body), kind)
    except msgspec.ValidationError as invalid:
        raise explained(invalid, kind, nested) from None
    except (ValueError, RecursionError):
        raise malformed from None


def converted(kind: Any, given: object, where: str) -> Any:
    """A part of a request as `kind`, a struct or a union of them; `where` is its place in the body.

    Raises:
        ApiError: 400, naming the place.
    """
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise explained(error, kind, NOTHING_NESTED, where) from None


def explained(
    error: msgspec.ValidationError, kind: Any, nested: Mapping[str, type[msgspec.Struct]], where: str = ""
) -> ApiError:
    """msgspec's complaint in the API's own words, with the parameter's name; for an unknown one, the nearest known.
    What was decoded stands at `where` in the body.
    """
    text = str(error)
    if unknown := _UNKNOWN_FIELD.fullmatch(text):
        name, path = unknown[1], unknown[2]
        owner = nested.get(path or "", kind)
        known = owner.__struct_fields__ if isinstance(owner, type) and issubclass(owner, msgspec.Struct) else ()
        return unknown_parameter(name, known, path=_joined(where, path))
    if missing := _MISSING_FIELD.fullmatch(text):
        name = _joined(where, missing[2], missing[1])
        return ApiError(400, f"{name} is required", param=name, code="missing_required_parameter")
    if kind_of_part := _UNKNOWN_KIND.fullmatch(text):
        name = _joined(where, kind_of_part[2])
        return ApiError(400, f"{name}={kind_of_part[1]!r} is not supported", param=name, code="unsupported_parameter")
    if located := _LOCATED.fullmatch(text):
        what, name = located[1][0].lower() + located[1][1:], _joined(where, located[2])
        return ApiError(400, f"{name}: {what}", param=name, code="invalid_type")
    subject = where or "the body"
    return ApiError(400, f"{subject} must be a JSON object: {text}", param=where or None, code="invalid_type")


def _joined(*parts: str | None) -> str:
    """A path in the body; an index follows without a dot."""
    return ".".join(part for part in parts if part).replace(".[", "[")


def unknown_parameter(name: str, known: tuple[str, ...], *, path: str | None = None) -> ApiError:
    """The error for a parameter that no route knows; names the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    full = f"{path}.{name}" if path else name
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ApiError(400, f"unknown parameter {full!r}{hint}", param=full, code="unknown_parameter")


def not_supported(name: str, value: object, neutral: tuple[Any, ...]) -> ApiError:
    """The error for a feature that does not exist yet."""
    shown = _shown(value)
    allowed = " or ".join(_shown(item) for item in neutral)
    remedy = f"leave it out or send {allowed}" if neutral else "leave it out"
    return ApiError(400, f"{name}={shown} is not supported yet; {remedy}", param=name, code="unsupported_parameter")


def _shown(value: object) -> str:
    """`value` as the client wrote it, cut to a readable length."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def check_neutral(name: str, value: object, neutral: tuple[Any, ...]) -> None:
    """Raise an ApiError unless `value` is null or one of `neutral`; true and 1 are different values."""
    same = (isinstance(value, bool) == isinstance(item, bool) and value == item for item in neutral)
    if value is not None and not any(same):
        raise not_supported(name, value, neutral)


def checked_prompts(value: object, *, name: str = "prompt") -> list[str | list[int]]:
    """OpenAI's four forms of `prompt`, or of the field `name`, as one list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) or _is_token_ids(item) for item in value):
            if len(value) > MAX_PROMPTS:
                message = f"{name} has {len(value)} entries; at most {MAX_PROMPTS} are allowed: send several requests"
                raise ApiError(400, message, param=name, code="invalid_value")
            return value
    wanted = "a string, a list of strings, a list of token ids or a list of such lists, and not empty"
    raise ApiError(400, f"{name}={_shown(value)} must be {wanted}", param=name, code="invalid_type")


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
