"""Chat messages and tools as OpenAI's clients send them -> as `AsyncLLM.render_chat` takes them."""

from typing import Any

from jax_engine.server.errors import ApiError


def plain_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without nulls, which clients send back from earlier answers, and with `developer` as `system`.

    Raises:
        ApiError: 400, naming a message with neither content nor tool calls.
    """
    plain = []
    for index, message in enumerate(messages):
        kept = {name: value for name, value in message.items() if value is not None}
        if kept.get("role") == "developer":
            kept["role"] = "system"
        if (reasoning := kept.get("reasoning_content", kept.get("reasoning"))) is not None:
            kept |= {"reasoning_content": reasoning, "reasoning": reasoning}  # templates read either
        if "content" not in kept:
            if not kept.get("tool_calls"):
                raise _invalid(f"messages[{index}].content", "is missing; send a string or a list of text parts")
            kept["content"] = ""
        plain.append(kept)
    return plain


def checked_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools as given, once each is known to describe a function.

    Raises:
        ApiError: 400, naming the tool; another kind of tool, no name, or parameters that are no object's schema.
    """
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        if tool.get("type") != "function":
            raise _invalid(f"{where}.type", "must be 'function'; no other kind of tool is supported")
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise _invalid(f"{where}.function", "must be an object with a name")
        if function.get("strict") not in (None, True, False):
            raise _invalid(f"{where}.function.strict", "must be true or false")
        parameters = function.get("parameters")
        if parameters is not None and (
            not isinstance(parameters, dict) or parameters.get("type", "object") != "object"
        ):
            raise _invalid(f"{where}.function.parameters", "must be the JSON schema of an object")
        _check_properties(parameters or {}, f"{where}.function.parameters")
    if len({tool["function"]["name"] for tool in tools}) < len(tools):
        raise _invalid("tools", "has two functions of one name; give each its own")
    return tools


def _check_properties(parameters: dict[str, Any], where: str) -> None:
    """ApiError 400 unless what a schema says of an object's properties has the form that it must."""
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(value, dict | bool) for value in properties.values()):
        raise _invalid(f"{where}.properties", "must be an object of JSON schemas")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _invalid(f"{where}.required", "must be a list of names")


def shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A checked tool as a chat template prints it."""
    return {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}


def _invalid(where: str, complaint: str) -> ApiError:
    return ApiError(400, f"{where} {complaint}", param=where, code="invalid_value")
