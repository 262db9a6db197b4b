"""Adapters on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`. Needs no JAX.

What an adapter asks for beyond the two factors of its projections changes answers, so it is refused by name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from jax_engine.models.demo import DEMO_DIR

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
BUILT_IN_PREFIX = "demo:"
# What PEFT can do and this engine cannot, with the values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "bias": ("none",),
        "modules_to_save": ([],),
        "use_dora": (False,),
        "use_qalora": (False,),
        "lora_bias": (False,),
        "fan_in_fan_out": (False,),
        "alpha_pattern": ({},),
        "layer_replication": ([],),
        "trainable_token_indices": ([],),
        "target_parameters": ([],),
        "alora_invocation_tokens": ([],),
        "arrow_config": (),
        "corda_config": (),
        "loftq_config": ({},),
        # The others change the base model's weights too.
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    }
)
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
_NUM_LISTED = 5


class AdapterError(ValueError):
    """An adapter cannot be used; the message names the file, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class ModuleFactors:
    """The factors of one projection in float32, as stored: `a` [rank, in] and `b` [out, rank], the scale in `b`."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]


def adapter_folder(path: str) -> Path:
    """The folder that `path` names; AdapterError when it is none."""
    folder = Path(path).expanduser()
    if path.startswith(BUILT_IN_PREFIX):
        folder = DEMO_DIR / "adapters" / path.removeprefix(BUILT_IN_PREFIX)
    if not folder.is_dir():
        raise AdapterError(
            f"lora_path={path!r} is not a folder of this machine; give one with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    return folder


def read_adapter(path: str, *, max_rank: int) -> dict[str, ModuleFactors]:
    """An adapter's factors, by the checkpoint's name of the projection: `model.layers.0.self_attn.q_proj`.

    Raises:
        AdapterError: a file is missing or broken, something is not supported, or the rank is above `max_rank`.
    """
    folder = adapter_folder(path)
    config = _read_config(folder / CONFIG_NAME)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise AdapterError(f"{folder / CONFIG_NAME}: r={rank!r} and lora_alpha={alpha!r} must be numbers, r at least 1")
    has_other_ranks = bool(config.get("rank_pattern"))
    modules = {}
    for module, (a, b) in _read_factors(folder / WEIGHTS_NAME).items():
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(f"{folder / WEIGHTS_NAME}: the factors of {module} are {a.shape} and {b.shape}")
        own = a.shape[0]
        if own != rank and not has_other_ranks:
            raise AdapterError(f"{folder / WEIGHTS_NAME}: {module} has rank {own}, {CONFIG_NAME} says r={rank}")
        if own > max_rank:
            raise AdapterError(
                f"{folder}: the rank of {module} is {own}, more than max_lora_rank={max_rank}; start the engine with "
                f"max_lora_rank={own} or more"
            )
        scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
        modules[module] = ModuleFactors(a, b * np.float32(scale))
    return modules


def _read_config(file: Path) -> dict[str, Any]:
    """The configuration, once nothing in it is left that is not supported."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{file.parent} has no {file.name}; an adapter's folder in PEFT's layout is needed"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read ({error}); save the adapter again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} holds a {type(config).__name__}; it must hold a JSON object")
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterError(f"{file}: peft_type={config['peft_type']!r} is not supported; only LORA is")
    for name, neutral in UNSUPPORTED.items():
        value = config.get(name)
        if value is not None and not any(type(value) is type(item) and value == item for item in neutral):
            allowed = " or ".join(["null", *map(json.dumps, neutral)])
            raise AdapterError(
                f"{file}: {name}={json.dumps(value)} is not supported ({allowed} is); merge the adapter into its "
                "model, or train it without"
            )
    return config


def _read_factors(file: Path) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    if not file.exists():
        raise AdapterError(f"{file.parent} has no {file.name}; save the adapter with safe_serialization=True")
    factors: dict[str, dict[str, NDArray[np.float32]]] = {}
    strangers = []
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is not a dictionary
                if (match := _TENSOR.fullmatch(name)) is None:
                    strangers.append(name)
                    continue
                if tensors.get_slice(name).get_dtype() not in _FLOATS:
                    raise AdapterError(f"{file}: {name} is no {', '.join(_FLOATS)}; save the adapter unquantized")
                factors.setdefault(match["module"], {})[match["factor"]] = tensors.get_tensor(name).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} is not a whole safetensors file ({error}); copy it again") from error
    strangers += [module for module, given in factors.items() if len(given) < 2]
    if strangers or not factors:
        listed = ", ".join(sorted(strangers)[:_NUM_LISTED]) or "nothing"
        raise AdapterError(
            f"{file} holds {listed}, which is not supported; each tensor must be lora_A.weight or lora_B.weight of a "
            "projection that has both: train the adapter on those alone"
        )
    return {module: (given["A"], given["B"]) for module, given in factors.items()}
