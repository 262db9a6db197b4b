"""Random ragged batches for the attention operations."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def build_ragged_case(
    ranges: list[tuple[int, int]],
    *,
    seed: int,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    num_layers: int = 2,
    num_tokens: int = 0,
    num_sequences: int = 0,
    num_pages: int = 0,
    max_pages: int = 0,
    dtype: jnp.dtype = jnp.float32,
) -> dict[str, Array]:
    """The arguments of `ragged_paged_attention` for sequences of `(new tokens, cached tokens)`; ranges of one come
    first, as in a step.

    `num_tokens` and the other sizes pad the arrays to at least that, so that many cases share one program.
    """
    rng = np.random.default_rng(seed)
    ranges = sorted(ranges, key=lambda entry: entry[0] != 1)
    lengths = [new for new, _ in ranges]
    num_tokens = max(num_tokens, sum(lengths))
    num_sequences = max(num_sequences, len(ranges))
    pages_of = [-(-(new + cached) // page_size) for new, cached in ranges]
    max_pages = max(max_pages, max(pages_of, default=1) + 1)
    num_pages = max(num_pages, sum(pages_of) + 3)
    order = iter(rng.permutation(num_pages))
    tables = np.zeros((num_sequences, max_pages), np.int32)
    for row, count in enumerate(pages_of):
        tables[row, :count] = [next(order) for _ in range(count)]
    kv_lengths = np.zeros(num_sequences, np.int32)
    kv_lengths[: len(ranges)] = [new + cached for new, cached in ranges]
    starts = np.concatenate([[0], np.cumsum(lengths + [0] * (num_sequences - len(ranges)))]).astype(np.int32)
    token_sequences = np.full(num_tokens, num_sequences, np.int32)
    positions = np.zeros(num_tokens, np.int32)
    for row, (new, cached) in enumerate(ranges):
        token_sequences[starts[row] : starts[row + 1]] = row
        positions[starts[row] : starts[row + 1]] = np.arange(cached, cached + new)

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "queries": normal(num_tokens, num_heads, head_dim),
        "keys": normal(num_tokens, num_kv_heads, head_dim),
        "values": normal(num_tokens, num_kv_heads, head_dim),
        "pages": normal(num_layers, num_pages, 2, num_kv_heads, page_size, head_dim),
        "block_tables": jnp.asarray(tables),
        "query_starts": jnp.asarray(starts),
        "kv_lengths": jnp.asarray(kv_lengths),
        "num_decodes": jnp.asarray(sum(length == 1 for length in lengths), jnp.int32),
        "token_sequences": jnp.asarray(token_sequences),
        "positions": jnp.asarray(positions),
    }
