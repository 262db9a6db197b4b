"""The model in training: a pure function of named parameters, its loss, and its export in Hugging Face's layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jax_engine.models.config import ModelConfig
from jax_engine.models.demo.chat_template import BEGIN, END, PAD
from jax_engine.models.demo.packing import Block
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.ops import dense_ops
from jax_engine.models.weights import layout_of

Parameters = dict[str, jax.Array]

Rows = dict[str, np.ndarray[Any, Any]]
"""Packed rows as `jax.jit` takes them: `ids`, `positions`, `segments`, int32 [R, T]; `chosen`, `wanted`, int32 [C]."""


def hf_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` of the demo model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id(BEGIN),
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }


class Trainee:
    """The model as a pure function of named float32 parameters; names are Hugging Face's."""

    def __init__(self, config: ModelConfig, *, seed: int):
        model = LlamaForCausalLM(config, ops=dense_ops(), dtype=jnp.float32, rngs=nnx.Rngs(seed))
        self._graph, state = nnx.split(model)
        paths, self._structure = jax.tree.flatten_with_path(state)
        names = [".".join(part for part in map(_key_text, path) if part != "value") for path, _ in paths]
        self.initial: Parameters = {name: leaf for name, (_, leaf) in zip(names, paths, strict=True)}

    def logits(self, parameters: Parameters, rows: Rows, chosen: jax.Array) -> jax.Array:
        """Float32 logits [C, V] at the flat places `chosen` [C] of packed rows [R, T]."""
        leaves = [parameters[name] for name in self.initial]
        model = nnx.merge(self._graph, jax.tree.unflatten(self._structure, leaves))
        hidden = jax.vmap(lambda ids, positions, segments: model(ids, positions, None, segments)[0])(
            rows["ids"], rows["positions"], rows["segments"]
        )
        return model.compute_logits(hidden.reshape(-1, hidden.shape[-1])[chosen])

    def loss(self, parameters: Parameters, batch: Sequence[Rows], dtype: str) -> tuple[jax.Array, jax.Array]:
        """Mean cross-entropy over all that is learned in the batch, and the share of right first guesses.

        The forward pass runs in `dtype`; parameters, logits and losses are float32.
        """
        cast = {name: value.astype(dtype) for name, value in parameters.items()}
        total = count = right = jnp.float32(0)
        for rows in batch:
            logits, wanted = self.logits(cast, rows, jnp.asarray(rows["chosen"])), jnp.asarray(rows["wanted"])
            valid = wanted >= 0
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(wanted, 0))
            total += jnp.sum(losses * valid)
            right += jnp.sum((jnp.argmax(logits, -1) == wanted) & valid)
            count += jnp.sum(valid)
        return total / count, right / count


def _key_text(key: Any) -> str:
    match key:
        case jax.tree_util.DictKey(key=name) | jax.tree_util.FlattenedIndexKey(key=name):
            return str(name)
        case jax.tree_util.GetAttrKey(name=name):
            return str(name)
        case jax.tree_util.SequenceKey(idx=index):
            return str(index)
    raise TypeError(f"unknown key {key!r} in the model's state")


def as_rows(block: Block) -> Rows:
    """A block with the places where something is learned listed, so that logits are computed only there.

    `chosen` has a fixed size, 5/8 of all places, which answers hardly ever fill; what is beyond is not learned. It is
    padded with place 0, where `wanted` is -1.
    """
    targets = block.targets.reshape(-1)
    size = targets.size * 5 // 8
    places = np.flatnonzero(targets >= 0)[:size]
    chosen, wanted = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    chosen[: len(places)], wanted[: len(places)] = places, targets[places]
    return {
        "ids": block.ids,
        "positions": block.positions,
        "segments": block.segments,
        "chosen": chosen,
        "wanted": wanted,
    }


def export(parameters: Parameters, config: dict[str, Any], folder: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json, in Hugging Face's names and layouts."""
    tensors = {}
    for name, value in parameters.items():
        groups = layout_of(name, value.ndim, LlamaForCausalLM.HF_WEIGHTS).groups
        order = [dimension for group in groups for dimension in group]
        shape = [int(np.prod([value.shape[dimension] for dimension in group])) for group in groups]
        tensors[name] = np.ascontiguousarray(np.asarray(value, np.float32).transpose(order).reshape(shape))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} | {"do_sample": False}
    for file_name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
