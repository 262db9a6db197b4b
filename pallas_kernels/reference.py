"""The specification of the kernels, in plain jnp and float32. Every implementation is tested against this file.

Arrays (the calling convention that all implementations share; T token rows, B sequences, M pages a sequence at most):

    queries          [T, N, H]             keys, values  [T, K, H], the step's own tokens, not yet in the cache
    pages            [L, P, 2, K, S, H]    K at index 0, V at index 1; all layers
    block_tables     [B, M] int32          page of each S-token part of a sequence; entries past its length are ignored
    query_starts     [B + 1] int32         first token row of each sequence; the last entry is the number of real tokens
    kv_lengths       [B] int32             cached tokens of the sequence, this step's included; 0 for padding
    num_decodes      [] int32              that many leading sequences have a range of exactly one token
    token_sequences  [T] int32             sequence of each token row, B for padding rows
    positions        [T] int32             position of each token in its sequence

Returned: the attention output [T, N, H], zero in padding rows, and the pages with the step's keys and values written.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ragged_paged_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Float[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    layer: int,
    scale: float,
    window: int | None = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "L P 2 K S H"]]:
    """Causal grouped-query attention of each new token over its own sequence's pages, after writing the new keys and
    values.

    A token at position p sees positions `max(0, p - window + 1) .. p`. Arithmetic is float32 whatever the storage
    types. The paging is that of vLLM (Kwon et al. 2023, arXiv 2309.06180).
    """
    num_sequences, max_pages = block_tables.shape
    num_pages, _, num_kv_heads, page_size, head_dim = pages.shape[1:]
    real = token_sequences < num_sequences
    owner = jnp.minimum(token_sequences, num_sequences - 1)
    page = jnp.where(real, block_tables[owner, positions // page_size], num_pages)  # num_pages is out of range: dropped
    new = jnp.stack([keys, values], axis=1).astype(pages.dtype)
    pages = pages.at[layer, page, :, :, positions % page_size].set(new, mode="drop")

    context = pages[layer, block_tables].astype(jnp.float32)  # [B, M, 2, K, S, H]
    context = context.transpose(0, 2, 1, 4, 3, 5).reshape(
        num_sequences, 2, max_pages * page_size, num_kv_heads, head_dim
    )
    grouped = queries.astype(jnp.float32).reshape(queries.shape[0], num_kv_heads, -1, head_dim)
    scores = jnp.einsum("tkgh,tskh->tkgs", grouped, context[owner, 0], precision="highest") * scale
    distance = positions[:, None] - jnp.arange(max_pages * page_size)[None, :]
    visible = (distance >= 0) & real[:, None]
    if window is not None:
        visible &= distance < window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(scores, axis=-1), 0)
    # Pages past a sequence's end may hold anything, NaN included: a zero weight must not multiply them.
    seen = jnp.where(visible[:, :, None, None], context[owner, 1], 0)
    out = jnp.einsum("tkgs,tskh->tkgh", weights, seen, precision="highest")
    return out.reshape(queries.shape).astype(queries.dtype), pages
