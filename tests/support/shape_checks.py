"""Checks the shapes that annotations claim on every call under pytest: jaxtyping with beartype, arrays only."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from beartype import beartype
from jaxtyping import AbstractArray

Function = TypeVar("Function", bound=Callable[..., Any])


def check_arrays(function: Function) -> Function:
    """Check the arguments and results of `function` that are annotated as arrays.

    The rest is left to mypy: beartype does not know `Self`, and asks more of protocols than they say. The fields of a
    dataclass are not checked: JAX itself rebuilds pytrees with placeholders in them.
    """
    if not inspect.isfunction(function) or function.__name__ == "__init__":
        return function
    arrays = {name: kind for name, kind in function.__annotations__.items() if _is_array(kind)}
    if not arrays:
        return function
    annotations, function.__annotations__ = function.__annotations__, arrays
    checked = beartype(function)
    function.__annotations__ = checked.__annotations__ = annotations
    return checked


def _is_array(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)
