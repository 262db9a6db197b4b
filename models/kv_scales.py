"""Scales of 8-bit caches: parameters of the attention layers, and what tells how large they have to be.

A stored key or value is the real one divided by its head's scale. Pages outlive steps, and requests share them, so
scales are settled before the first page is written and are the same from then on.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.llama import Attention
from jax_engine.models.ops import AttentionOp

KV_SCALE_AXES = ("kv_planes", "kv_heads")  # keys and values of each head


def is_quantized(dtype: jnp.dtype) -> bool:
    """Whether pages of this type hold numbers that scales belong to."""
    return jnp.dtype(dtype).itemsize == 1


def add_kv_scales(model: nnx.Module) -> None:
    """Give every attention layer the scales of its cache, all one; those of stacked layers are stacked likewise."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            weight = module.k_proj.weight
            stacked = int(weight.logical_axes[0] == "layers")
            heads = weight[...].shape[weight.logical_axes.index("kv_heads")]
            value = jnp.ones((*weight[...].shape[:stacked], 2, heads), jnp.float32)
            axes = (*weight.logical_axes[:stacked], *KV_SCALE_AXES)
            module.kv_scales = nnx.Param(value, logical_axes=axes, init_mean=1.0, init_std=0.0, layers=weight.layers)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MeasuredPages(KVPages):
    """A cache that is not quantized, and how large the keys and values of sequences are: beside a sequence's first
    page, the largest absolute value of each head.
    """

    largest: Float[Array, "L P 2 K"] = field(kw_only=True)


@dataclass(frozen=True)
class MeasuringAttention:
    """Attention over `MeasuredPages`, which takes down what it writes."""

    attention: AttentionOp

    def __call__(
        self,
        queries: Float[Array, "T N H"],
        keys: Float[Array, "T K H"],
        values: Float[Array, "T K H"],
        cache: KVPages | None,
        sequences: SequenceTable | Int[Array, " T"],
        **options: Any,
    ) -> tuple[Float[Array, "T N H"], KVPages | None]:
        """See `ops.AttentionOp`; without scales, whatever the layer has for them."""
        assert isinstance(cache, MeasuredPages) and isinstance(sequences, SequenceTable)
        options["kv_scales"] = None
        out, written = self.attention(queries, keys, values, KVPages(cache.data), sequences, **options)
        assert written is not None
        num_sequences = sequences.kv_lengths.shape[0]
        real = sequences.token_sequences < num_sequences
        page = sequences.block_tables[jnp.minimum(sequences.token_sequences, num_sequences - 1), 0]
        page = jnp.where(real, page, cache.num_pages)  # which is out of range: dropped
        rows = jnp.max(jnp.abs(jnp.stack([keys, values], axis=1).astype(jnp.float32)), axis=-1)  # [T, 2, K]
        largest = cache.largest.at[options["layer"], page].max(rows, mode="drop")
        return out, MeasuredPages(written.data, largest=largest)
