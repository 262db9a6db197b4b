"""The strategy that an engine's settings ask for: a built-in one, or a user's own, from a file or a function.

A file is TOML, with the tables of `strategies.Strategy` (which see for the names of logical axes):

    mesh = ["data", "tensor"]    # what devices are divided between; --mesh-shape says how many along each
    [weights]
    vocab = ["tensor"]
    heads = ["tensor"]
    ...
    [activations]
    ...

A function, `module:function`, takes the model's configuration and the number of devices, and returns a `Strategy`.
"""

import importlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_engine.config import EngineConfig
from jax_engine.kv_cache.page_partitions import PAGE_RULES
from jax_engine.sharding.strategies import STRATEGIES, Axes, Strategy, strategy_name

if TYPE_CHECKING:
    from jax_engine.models.config import ModelConfig

_KEYS = ("name", "mesh", "gathers", "page_rule", "weights", "activations")


def strategy_of(config: EngineConfig, model: "ModelConfig") -> Strategy:
    """The strategy for a model under these settings.

    Raises:
        ValueError: the file or function of `sharding_rules` is not one, or describes none.
    """
    strategy = _strategy_within_stages(config, model)
    return strategy.in_stages() if config.pipeline_parallel_size > 1 else strategy


def _strategy_within_stages(config: EngineConfig, model: "ModelConfig") -> Strategy:
    rules = config.sharding_rules
    if rules is None:
        name = strategy_name(config.sharding_strategy, expert_parallel=config.enable_expert_parallel)
        if name == "expert" and model.experts is None:
            raise ValueError(
                f"enable_expert_parallel=True, or sharding_strategy='expert', is for mixtures of experts, and "
                f"{model.architecture} has none; leave it out"
            )
        return STRATEGIES[name]
    if Path(rules).suffix == ".toml" or Path(rules).is_file():
        return read_strategy(Path(rules))
    tensor_size, pipeline_size = config.parallel_sizes
    return _called(rules, model, tensor_size * pipeline_size)


def read_strategy(path: Path) -> Strategy:
    """The strategy that a TOML file describes; ValueError, which names the file, when it describes none."""
    try:
        contents = tomllib.loads(path.read_text())
        if unknown := sorted(contents.keys() - set(_KEYS)):
            raise ValueError(f"{unknown[0]!r} is no key of a strategy; those are {', '.join(_KEYS)}")
        return Strategy(
            name=_of_type(contents, "name", str, path.stem),
            weights=_table(contents, "weights"),
            activations=_table(contents, "activations"),
            mesh=_names("mesh", contents.get("mesh", ["tensor"])),
            gathers=_names("gathers", contents.get("gathers", [])),
            page_rule=_of_type(contents, "page_rule", str, PAGE_RULES[0]),
        )
    except (OSError, ValueError) as error:  # tomllib's own errors are ValueErrors
        raise ValueError(f"sharding_rules={str(path)!r}: {error}") from error


def _called(rules: str, model: "ModelConfig", num_devices: int) -> Strategy:
    module, _, name = rules.partition(":")
    try:
        function = vars(importlib.import_module(module))[name]
    except (ImportError, KeyError, ValueError) as error:
        raise ValueError(
            f"sharding_rules={rules!r} is no file, and names nothing that can be imported ({error}); give a .toml "
            "file, or module:function with the module on Python's path (PYTHONPATH)"
        ) from error
    strategy = function(model, num_devices)
    if not isinstance(strategy, Strategy):
        raise ValueError(
            f"sharding_rules={rules!r} returned {strategy!r}, which is no jax_engine.sharding.strategies.Strategy"
        )
    return strategy


def _table(contents: Mapping[str, Any], key: str) -> Axes:
    table = _of_type(contents, key, dict, {})
    return {logical: _names(f"{key}.{logical}", axes) for logical, axes in table.items()}


def _names(where: str, value: object) -> tuple[str, ...]:
    """The name of one axis, or a list of them."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f'{where}={value!r} must be the name of an axis, or a list of them, such as ["data", "tensor"]'
        )
    return tuple(names)


def _of_type(contents: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = contents.get(key, default)
    if not isinstance(value, kind):
        raise ValueError(f"{key}={value!r} must be of type {kind.__name__}")
    return value
