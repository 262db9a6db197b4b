"""The operations a model is built from, and the choice of their implementations.

A model receives an immutable `Ops` and never asks what platform it runs on. An engine picks one `Ops` at start, logs
the choice with its reason, and keeps it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_engine.cuda_fallback import paged_attention as xla
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.pallas_kernels import reference

ATTENTION_BACKENDS = ("auto", "xla", "reference")


class AttentionOp(Protocol):
    """Write each token's key and value to the cache, then attend causally over its own sequence."""

    def __call__(
        self,
        queries: Float[Array, "T N H"],
        keys: Float[Array, "T K H"],
        values: Float[Array, "T K H"],
        cache: KVPages | None,
        sequences: SequenceTable | Int[Array, " T"],
        *,
        layer: int,
        scale: float,
        window: int | None,
    ) -> tuple[Float[Array, "T N H"], KVPages | None]: ...


@dataclass(frozen=True)
class Ops:
    """The implementations that one engine's models use; hashable, so that it can be a static part of a model."""

    attention: AttentionOp
    attention_name: str


def select_ops(backend: str, *, platform: str) -> tuple[Ops, str]:
    """The implementations for `attention_backend` on `platform` ("cpu", "gpu", "tpu"), and the reason for the choice
    in one sentence.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(
            f"attention_backend={backend!r} is unknown; allowed are {', '.join(ATTENTION_BACKENDS)} "
            "(auto chooses by platform)"
        )
    if backend == "reference":
        return Ops(
            partial(_paged_attention, reference.ragged_paged_attention), "reference"
        ), "asked for: the float32 specification, slow"
    reason = "asked for" if backend == "xla" else f"the only implementation for platform {platform!r} so far"
    return Ops(partial(_paged_attention, xla.ragged_paged_attention), "xla"), reason


def dense_ops() -> Ops:
    """Operations without a cache, for training and for plain logits of whole documents; differentiable."""
    return Ops(_dense_attention, "dense")


def _paged_attention(
    implementation: Callable[..., tuple[Array, Array]],
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    cache: KVPages | None,
    sequences: SequenceTable | Int[Array, " T"],
    *,
    layer: int,
    scale: float,
    window: int | None,
) -> tuple[Float[Array, "T N H"], KVPages | None]:
    """Unwrap the typed tables into the kernels' plain arrays (see `pallas_kernels.reference` for their meaning)."""
    assert isinstance(cache, KVPages) and isinstance(sequences, SequenceTable)
    if queries.shape[1] % cache.num_heads:
        raise ValueError(f"query heads ({queries.shape[1]}) must be a multiple of kv heads ({cache.num_heads})")
    out, pages = implementation(
        queries,
        keys,
        values,
        cache.data,
        sequences.block_tables,
        sequences.query_starts,
        sequences.kv_lengths,
        sequences.num_decodes,
        sequences.token_sequences,
        sequences.positions,
        layer=layer,
        scale=scale,
        window=window,
    )
    return out, KVPages(pages)


def _dense_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    cache: KVPages | None,
    sequences: SequenceTable | Int[Array, " T"],
    *,
    layer: int,
    scale: float,
    window: int | None,
) -> tuple[Float[Array, "T N H"], KVPages | None]:
    """Causal attention among the rows that share a segment id; `cache` and `layer` are not used and the cache is
    passed through.
    """
    assert not isinstance(sequences, SequenceTable)
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    grouped = queries.reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum("tkgh,skh->kgts", grouped, keys, preferred_element_type=jnp.float32) * scale
    rows = jnp.arange(num_tokens)
    distance = rows[:, None] - rows[None, :]
    visible = (distance >= 0) & (sequences[:, None] == sequences[None, :])
    if window is not None:
        visible &= distance < window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skh->tkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return out.reshape(num_tokens, num_heads, head_dim).astype(queries.dtype), cache
