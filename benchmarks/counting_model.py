"""A model whose step costs next to nothing and whose answers are known: it counts through the printable tokens.

Its hidden states are points on a circle, one a token; the head turns them by one place, and nothing else happens: the
one layer's matrices are zero, and its window of one token makes a step's cost independent of the context. What is left
of a step is the engine's own work. The engine loads it as any other checkpoint.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path

PROJECTIONS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
NORMS = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")


@dataclass(frozen=True)
class CountingModel:
    """A checkpoint's folder, and the cycle of tokens that it counts through."""

    folder: Path
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]  # of each token

    @classmethod
    def write(cls, folder: Path, *, max_model_len: int) -> "CountingModel":
        """Make the checkpoint, with the built-in model's tokenizer."""
        demo = resolve_model_path("demo")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / name, folder)
        tokenizer = load_tokenizer(demo)
        texts = {token: tokenizer.decode([token]) for token in range(tokenizer.num_ids)}
        printable = [token for token, text in texts.items() if token not in tokenizer.special_ids and text.isascii()]
        (folder / "config.json").write_text(json.dumps(_config(tokenizer.num_ids, max_model_len)))
        save_file(_tensors(tokenizer.num_ids, printable), folder / "model.safetensors")
        return cls(folder, tuple(printable), tuple(texts[token] for token in printable))

    def prompt(self, length: int) -> list[int]:
        """The first `length` tokens of the count."""
        return [self.token_ids[position % len(self.token_ids)] for position in range(length)]

    def answer(self, prompt_length: int, length: int) -> str:
        """The text of the `length` tokens that follow a `prompt`."""
        return "".join(
            self.texts[position % len(self.texts)] for position in range(prompt_length, prompt_length + length)
        )


def _config(vocab_size: int, max_model_len: int) -> dict[str, object]:
    sizes = ("hidden_size", "intermediate_size", "head_dim")
    counts = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "sliding_window")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": vocab_size,
        "max_position_embeddings": max_model_len,
        "dtype": "float32",
        **dict.fromkeys(sizes, 2),
        **dict.fromkeys(counts, 1),
    }


def _tensors(vocab_size: int, cycle: Sequence[int]) -> dict[str, np.ndarray]:
    angles = np.arange(len(cycle)) * 2 * np.pi / len(cycle)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    embedding, head = (np.zeros((vocab_size, 2), np.float32) for _ in range(2))
    embedding[:] = points[0]  # tokens outside the cycle enter it
    embedding[list(cycle)] = points
    head[np.roll(cycle, -1)] = points  # a token's row is the point of the token before it
    tensors: dict[str, np.ndarray] = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    tensors |= {f"{name}.weight": np.ones(2, np.float32) for name in NORMS}
    tensors |= {f"model.layers.0.{name}_proj.weight": np.zeros((2, 2), np.float32) for name in PROJECTIONS}
    return tensors
