"""Attention without a cache, over whole documents; differentiable."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_engine.models.kv_pages import KVPages, SequenceTable


def dense_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    cache: KVPages | None,
    sequences: SequenceTable | Int[Array, " T"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    window: int | None,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> tuple[Float[Array, "T N H"], KVPages | None]:
    """Causal attention among the rows that share a segment id; `cache`, `layer` and `kv_scales` are not used and the
    cache is passed through.
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
