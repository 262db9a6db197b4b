"""Which tools may be called, which must be, and the form that an answer has for that reason."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax_engine.server.errors import ApiError
from jax_engine.server.parsers.tool_parser import ToolParser, arguments_schema

Form = Mapping[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """What `tool_choice` asks for: `mode` is `none`, `auto` or `required`, `functions` those that may be called."""

    mode: str
    functions: tuple[Mapping[str, Any], ...] = ()

    @property
    def is_strict(self) -> bool:
        """Whether any function's arguments are to meet its schema, should it be called."""
        return any(function.get("strict") for function in self.functions)


def tool_choice(choice: str | Mapping[str, Any] | None, tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
    """OpenAI's `tool_choice` over checked tools.

    Raises:
        ApiError: 400; a choice of another form, without tools, or of a function that is none of them.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in tools or ()}
    if choice is None:
        choice = "auto"
    if choice in ("none", "auto"):
        return ToolChoice("auto", tuple(functions.values())) if functions and choice == "auto" else ToolChoice("none")
    if not functions:
        raise _invalid("tool_choice asks for a call, and there are no tools; send tools, or leave it out")
    if choice == "required":
        return ToolChoice("required", tuple(functions.values()))
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    given = choice.get(kind) if isinstance(choice, Mapping) and isinstance(kind, str) else None
    if kind == "function" and isinstance(given, Mapping):
        return ToolChoice("required", (_function(given.get("name"), functions),))
    if kind == "allowed_tools" and isinstance(given, Mapping):
        mode, allowed = given.get("mode"), given.get("tools")
        if mode in ("auto", "required") and isinstance(allowed, list) and allowed:
            return ToolChoice(mode, tuple(_function(_name(tool), functions) for tool in allowed))
    raise _invalid(
        'tool_choice must be \'none\', \'auto\', \'required\', {"type": "function", "function": {"name": ...}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}'
    )


def answer_form(
    choice: ToolChoice,
    parser: type[ToolParser] | None,
    form: Mapping[str, Any] | None,
    *,
    all_allowed: bool,
    parallel: bool,
) -> Form | None:
    """The structural tag that an answer must be, None for none; `form` is what the request gives by itself, as
    `StructuredOutputsParams`' fields.

    Raises:
        ApiError: 400; a call must be written, and nobody knows how the model does it, or its parser has no form for it.
    """
    must = choice.mode == "required"
    if choice.mode == "none" or not (must or choice.is_strict or form is not None or not all_allowed):
        return None
    if parser is None:
        if form is not None and not must and not choice.is_strict:
            return None
        what = "tool_choice" if must else "strict"
        raise ApiError(
            400,
            f"{what}: how this model writes tool calls is not known; start the server with --tool-call-parser NAME",
            param="tool_choice" if must else "tools",
            code="unsupported_parameter",
        )
    schemas = [(function["name"], _schema(function, must=must)) for function in choice.functions]
    if must:
        return parser.calls(schemas, parallel=parallel)
    if form is None:
        return parser.text_and_calls(schemas, parallel=parallel)
    return {"type": "or", "elements": [parser.calls(schemas, parallel=parallel), _content(form)]}


def _schema(function: Mapping[str, Any], *, must: bool) -> dict[str, Any]:
    """What a call's arguments have to meet."""
    return arguments_schema(function) if must or function.get("strict") else {"type": "object"}


def _content(form: Mapping[str, Any]) -> Form:
    """The form that the content has where no tool is called."""
    match form:
        case {"json": dict(schema), **rest} if not rest:
            return {"type": "json_schema", "json_schema": schema}
        case {"json_object": True, **rest} if not rest:
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case {"regex": str(pattern), **rest} if not rest:
            return {"type": "regex", "pattern": pattern}
        case {"choice": list(texts), **rest} if not rest:
            return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in texts]}
    message = f"a form by {' and '.join(form)} cannot go with tools; leave it out, or send tool_choice='none'"
    raise ApiError(400, message, param="tool_choice", code="unsupported_parameter")


def _name(tool: object) -> object:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    return function.get("name") if isinstance(function, Mapping) else None


def _function(name: object, functions: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if not isinstance(name, str) or name not in functions:
        raise _invalid(f"tool_choice names {name!r}, and the tools are {', '.join(functions)}; name one of them")
    return functions[name]


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, param="tool_choice", code="invalid_value")
