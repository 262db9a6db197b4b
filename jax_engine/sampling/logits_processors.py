"""Logits processors of the user's own: pure functions that are compiled into every step.

    def dampen(logits, state, *, dampening: float = 1.0):
        return logits / dampening[:, None]

A processor takes the logits of a step's rows, `Float[Array, "B V"]` in float32, and a `ProcessorState`, and returns
logits of the same shape. Each row must depend on itself alone. Keyword-only parameters with a number as default are
arguments of a request: it gives them by name (`SamplingParams.extra_args`, `vllm_xargs` over HTTP), and the function
gets a `Float[Array, " B"]` with each row's, the default for rows without. A name in several processors is one argument.

They are registered at start (`EngineConfig.logits_processors`, "module:function") and run for every request, in that
order: after logit bias and before penalties and masks.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProcessorState:
    """What a logits processor sees of each row beside its logits."""

    output_counts: Int[Array, "B V"]  # how often each token is in the output
    in_prompt: Bool[Array, "B V"]  # whether the prompt holds it
    positions: Int[Array, " B"]  # of the token to draw, from 0 at the prompt's first
    num_output_tokens: Int[Array, " B"]  # drawn before it


@dataclass(frozen=True)
class LogitsProcessor:
    """A registered function, and its arguments with their defaults."""

    path: str
    function: Callable[..., Array]
    arguments: tuple[tuple[str, float], ...] = ()


def load_processors(paths: Sequence[str]) -> tuple[LogitsProcessor, ...]:
    """The functions at these paths, "module:function".

    Raises:
        ValueError: a path names no function of that kind, or two give one argument different defaults.
    """
    processors = tuple(_load(path) for path in paths)
    defaults: dict[str, float] = {}
    for processor in processors:
        for name, default in processor.arguments:
            if defaults.setdefault(name, default) != default:
                raise ValueError(
                    f"logits_processors: {processor.path} has the default {default:g} for {name!r}, and another "
                    f"{defaults[name]:g}; give both the same, or another name"
                )
    return processors


def argument_defaults(processors: Sequence[LogitsProcessor]) -> dict[str, float]:
    """What a request may give by name, and what stands for it otherwise."""
    return {name: default for processor in processors for name, default in processor.arguments}


def argument_names(processors: Sequence[LogitsProcessor]) -> tuple[str, ...]:
    """The arguments in the order in which they are kept."""
    return tuple(argument_defaults(processors))


def _load(path: str) -> LogitsProcessor:
    module, _, name = path.partition(":")
    try:
        function = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"logits_processors={path!r} names nothing that can be imported ({error}); give module:function, with the "
            "module on Python's path (PYTHONPATH)"
        ) from error
    if not callable(function):
        raise ValueError(f"logits_processors={path!r} is no function; it must be one of (logits, state)")
    parameters = list(inspect.signature(function).parameters.values())
    positional = [parameter for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    arguments = [parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if len(positional) != 2:
        raise ValueError(
            f"logits_processors={path!r} takes {len(positional)} positional parameters; it must take two, the logits "
            "and the state: make others keyword-only, with a number as default"
        )
    for argument in arguments:
        if isinstance(argument.default, bool) or not isinstance(argument.default, int | float):
            raise ValueError(
                f"logits_processors={path!r}: the default of {argument.name!r} must be a number, which requests may "
                "override; set one"
            )
    return LogitsProcessor(path, function, tuple((one.name, float(one.default)) for one in arguments))
