"""Small checkpoints, and what comes of loading them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jax_engine.loading.loader import load_config, load_leaves, load_model
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.config import ModelConfig
from jax_engine.models.ops import dense_ops
from jax_engine.models.registry import resolve_model
from jax_engine.sharding.widening import Widening

HF: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
# Few distinct shapes: each is a program to compile.
SQUARE = HF | {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 8, "head_dim": 6}
SHARED = HF | {"num_key_value_heads": 2}
EXPERTS = HF | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [0],
}
UP_PROJ = "model.layers.1.mlp.up_proj.weight"

Leaves = tuple[jax.Array, ...]


def structure_of(hf: dict[str, Any], **options: Any) -> ModelStructure:
    config = ModelConfig.from_hf(hf)
    return ModelStructure.of(resolve_model(config.architecture), config, ops=dense_ops(), dtype=jnp.float32, **options)


def random_tensors(hf: dict[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by name, in the layout of the checkpoint."""
    generator = np.random.default_rng(0)
    return {
        tensor.name: generator.normal(size=tensor.layout.stored_shape(tensor.shape)).astype(np.float32)
        for parameter in structure_of(hf).parameters
        for tensor in parameter.tensors
    }


def write(folder: Path, tensors: dict[str, np.ndarray], hf: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder: Path, **options: Any) -> tuple[ModelStructure, Leaves]:
    config, model_class = load_config(folder)
    settings = {"model_class": model_class, "ops": dense_ops(), "dtype": jnp.float32} | options
    return load_model(folder, config, **settings)


def load_copies(folder: Path, count: int, **options: Any) -> tuple[ModelStructure, Leaves]:
    """With each key and value head `count` times."""
    config, model_class = load_config(folder)
    structure = ModelStructure.of(model_class, config, ops=dense_ops(), dtype=jnp.float32, widening=Widening(count))
    return structure, load_leaves(structure, folder, **options)


def dummy(seed: int, hf: dict[str, Any] = SQUARE, **options: Any) -> tuple[ModelStructure, Leaves]:
    config = ModelConfig.from_hf(hf)
    settings = {"ops": dense_ops(), "dtype": jnp.float32, "load_format": "dummy", "seed": seed}
    return load_model(None, config, model_class=resolve_model(config.architecture), **settings, **options)
