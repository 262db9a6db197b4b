"""The specification of the kernels, in plain jnp and float32. Every implementation is tested against this file.

Arrays (the calling convention that all implementations share; T token rows, B sequences, M pages a sequence at most):

    queries          [T, N, H]             keys, values  [T, K, H], the step's own tokens, not yet in the cache
    pages            [L, P, 2, K, S, H]    K at index 0, V at index 1; all layers. An implementation may arrange a page
                                           of its own accord; its module's `page_shape` says how
    block_tables     [B, M] int32          page of each S-token part of a sequence; entries past its length are ignored
    query_starts     [B + 1] int32         first token row of each sequence; the last entry is the number of real tokens
    kv_lengths       [B] int32             cached tokens of the sequence, this step's included; 0 for padding
    num_decodes      [] int32              that many leading sequences have a range of exactly one token
    token_sequences  [T] int32             sequence of each token row, B for padding rows
    positions        [T] int32             position of each token in its sequence

Options, by keyword; `layer` and `scale` must be given:

    layer            int or [] int32       whose pages; may be traced
    scale            float                 of the products of queries and keys
    window           int or None           tokens that a query sees, its own included
    soft_cap         float or None         scores become `soft_cap * tanh(scores / soft_cap)` (arXiv 2408.00118)
    sinks            [N] or None           a score per head that takes part in the softmax and has no value
                                           (arXiv 2309.17453, in the form of gpt-oss)
    kv_scales        [2, K] or None        what the layer's stored keys and values are to be multiplied by (8-bit pages)

Returned: the attention output [T, N, H], zero in padding rows, and the pages with the step's keys and values written.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num


def to_storage(rows: Float[Array, "T K H"], dtype: jnp.dtype, scales: Float[Array, " K"] | None) -> Num[Array, "T K H"]:
    """Keys or values as pages hold them: divided by their heads' scales; 8-bit types are clipped to their range, and
    integers rounded to the nearest.
    """
    if scales is not None:
        rows = rows.astype(jnp.float32) / scales[:, None]
    if jnp.issubdtype(dtype, jnp.integer):
        limits = jnp.iinfo(dtype)
        return jnp.clip(jnp.round(rows), limits.min, limits.max).astype(dtype)
    if jnp.dtype(dtype).itemsize == 1:
        rows = jnp.clip(rows, float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max))
    return rows.astype(dtype)


def ragged_paged_attention(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    pages: Num[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    layer: int | Int[Array, ""],
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
) -> tuple[Float[Array, "T N H"], Num[Array, "L P 2 K S H"]]:
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
    key_scales, value_scales = (None, None) if kv_scales is None else kv_scales
    new = jnp.stack([to_storage(keys, pages.dtype, key_scales), to_storage(values, pages.dtype, value_scales)], axis=1)
    pages = pages.at[layer, page, :, :, positions % page_size].set(new, mode="drop")

    context = pages[layer, block_tables].astype(jnp.float32)  # [B, M, 2, K, S, H]
    if kv_scales is not None:
        context = context * kv_scales[None, None, :, :, None, None]
    context = context.transpose(0, 2, 1, 4, 3, 5).reshape(
        num_sequences, 2, max_pages * page_size, num_kv_heads, head_dim
    )
    grouped = queries.astype(jnp.float32).reshape(queries.shape[0], num_kv_heads, -1, head_dim)
    scores = jnp.einsum("tkgh,tskh->tkgs", grouped, context[owner, 0], precision="highest") * scale
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    distance = positions[:, None] - jnp.arange(max_pages * page_size)[None, :]
    visible = (distance >= 0) & real[:, None]
    if window is not None:
        visible &= distance < window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : visible.shape[1]]
    weights = jnp.where(visible[:, None, None], weights, 0)
    # Pages past a sequence's end may hold anything, NaN included: a zero weight must not multiply them.
    seen = jnp.where(visible[:, :, None, None], context[owner, 1], 0)
    out = jnp.einsum("tkgs,tskh->tkgh", weights, seen, precision="highest")
    return out.reshape(queries.shape).astype(queries.dtype), pages


def expert_feed_forward(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T C"],
    shares: Float[Array, "T C"],
    gate: Float[Array, "L E D F"],
    up: Float[Array, "L E D F"],
    down: Float[Array, "L E F D"],
    *,
    layer: int | Int[Array, ""],
    activation: Callable[[Array], Array],
) -> Float[Array, "T D"]:
    """The gated feed-forward (arXiv 2002.05202) of the C experts that each row chose, in float32, added up by its
    shares of them.

    `chosen` counts from 0; any other number than of one of the E experts adds nothing. The weights are those of all L
    layers. A row chooses an expert at most once.
    """
    wide = x.astype(jnp.float32)
    weights = [array[layer].astype(jnp.float32) for array in (gate, up, down)]
    inner = activation(jnp.einsum("td,edf->etf", wide, weights[0])) * jnp.einsum("td,edf->etf", wide, weights[1])
    each = jnp.einsum("etf,efd->etd", inner, weights[2])
    is_chosen = chosen[:, :, None] == jnp.arange(gate.shape[1])
    share = jnp.sum(jnp.where(is_chosen, shares[:, :, None], 0), axis=1)
    return jnp.einsum("te,etd->td", share, each)


def quantized_product(
    x: Float[Array, "T ..."], weight: Num[Array, "..."], scale: Float[Array, "..."], *, quantizes_rows: bool = False
) -> Float[Array, "T ..."]:
    """A product with a weight of 8 bits, in float32: x [T, *I], weight [*I, *O] -> [T, *O].

    What the weight holds is to be multiplied by `scale`: [*O], one for each output, or [*I', *O], where I' is I with
    fewer entries in its last dimension, each for as many neighbours. With `quantizes_rows`, rows are brought to the
    weight's type first, each by a scale of its own: what is largest in it becomes the type's largest number.
    """
    num_in, wide = x.ndim - 1, x.astype(jnp.float32)
    if quantizes_rows:
        axes = tuple(range(1, x.ndim))
        top = float(jnp.iinfo(weight.dtype).max if weight.dtype == jnp.int8 else jnp.finfo(weight.dtype).max)
        most = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
        row_scale = jnp.where(most == 0, 1, most / top)
        stored = wide / row_scale
        stored = jnp.round(stored) if weight.dtype == jnp.int8 else stored
        wide = stored.astype(weight.dtype).astype(jnp.float32) * row_scale
    if scale.ndim == weight.ndim:
        scale = jnp.repeat(scale, weight.shape[num_in - 1] // scale.shape[num_in - 1], axis=num_in - 1)
    return jnp.tensordot(wide, weight.astype(jnp.float32) * scale, axes=num_in)
