"""Tiny random adapters in PEFT's layout, and their base models with an adapter merged into the weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import random_tensors, write
from safetensors.numpy import load_file, save_file
from tiny_engine import TINY

from jax_engine.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jax_engine.models.adapters import ADAPTED_MODULES

# A model to adapt; at this scale a random adapter changes most greedy tokens.
ADAPTABLE: dict[str, Any] = TINY | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}  # with biases


def write_base(folder: Path, hf: dict[str, Any] = ADAPTABLE) -> Path:
    """A random checkpoint whose activations keep their scale."""
    tensors = random_tensors(hf)
    return write(folder, {name: value * 0.25 if value.ndim > 1 else value for name, value in tensors.items()}, hf)


def write_adapter(
    folder: Path,
    *,
    rank: int,
    seed: int,
    alpha: float = 16.0,
    targets: tuple[str, ...] = ADAPTED_MODULES,
    layers: tuple[int, ...] = (0, 1),
    hf: dict[str, Any] = ADAPTABLE,
    **config: Any,
) -> str:
    """A random adapter of these layers' projections; returns its path."""
    rng, tensors = np.random.default_rng(seed), {}
    shapes = {name: value.shape for name, value in random_tensors(hf).items()}
    for name, shape in shapes.items():
        parts = name.split(".")
        if len(parts) < 3 or parts[-1] != "weight" or parts[-2] not in targets or int(parts[2]) not in layers:
            continue
        module = name.removesuffix(".weight")
        for factor, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            values = rng.normal(size=size).astype(np.float32) * 0.12
            tensors[f"base_model.model.{module}.lora_{factor}.weight"] = values
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_NAME)
    given = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(targets), "bias": "none"}
    (folder / CONFIG_NAME).write_text(json.dumps(given | config))
    return str(folder)


def write_merged(folder: Path, base: Path, adapter: str) -> Path:
    """The base model with an adapter in its weights, as `merge_and_unload` of PEFT makes it: W + scale * B @ A."""
    config = json.loads((Path(adapter) / CONFIG_NAME).read_text())
    tensors, factors = load_file(base / "model.safetensors"), load_file(Path(adapter) / WEIGHTS_NAME)
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    for name, a in factors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = factors[name.replace("lora_A", "lora_B")].astype(np.float64)
            tensors[f"{module}.weight"] = (tensors[f"{module}.weight"] + scale * b @ a).astype(np.float32)
    return write(folder, tensors, json.loads((base / "config.json").read_text()))
