"""Random ragged batches for attention: what a step asks for, with NaN wherever no token may look."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class Shape:
    """Of the heads and pages, with the options of the kernels' calling convention."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"
    stored: str | None = None  # of the pages; None: as the queries
    window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False

    @property
    def stored_dtype(self) -> str:
        return self.stored or self.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token's key and value in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.stored_dtype).itemsize

    def __str__(self) -> str:
        parts = [f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}", f"pages of {self.page_size}"]
        parts.append(self.dtype if self.stored is None else f"{self.dtype} over {self.stored}")
        parts += [f"window {self.window}"] if self.window else []
        parts += [f"soft cap {self.soft_cap:g}"] if self.soft_cap else []
        parts += ["sinks"] if self.with_sinks else []
        return ", ".join(parts)


Ranges = Sequence[tuple[int, int]]  # new tokens, and those cached before, of each sequence; ranges of one come first


def attention_case(
    ranges: Ranges, shape: Shape, *, seed: int, num_layers: int = 1, poisoned: bool = True, padding: int = 0
) -> dict[str, Array]:
    """The arguments of `ragged_paged_attention` by position in its calling convention, `padding` token rows and one
    sequence more than there are. What no token sees is NaN if `poisoned`.
    """
    ranges = sorted(ranges, key=lambda entry: entry[0] != 1)
    new = np.array([count for count, _ in ranges])
    lengths = np.array([sum(entry) for entry in ranges])
    size, num_sequences = shape.page_size, len(ranges) + 1
    pages_of = -(-lengths // size)
    num_pages = int(pages_of.sum()) + 3
    order = np.random.default_rng(seed).permutation(num_pages)
    tables = np.zeros((num_sequences, int(pages_of.max()) + 1), np.int32)
    ends = np.cumsum(pages_of)
    starts = np.concatenate([[0], np.cumsum(new), [new.sum()]]).astype(np.int32)
    num_tokens = int(new.sum()) + padding
    owners = np.full(num_tokens, num_sequences, np.int32)
    positions = np.zeros(num_tokens, np.int32)
    is_seen = np.zeros((num_pages, size), bool)
    for row, (count, length) in enumerate(zip(new, lengths, strict=True)):
        pages = order[ends[row] - pages_of[row] : ends[row]]
        tables[row, : len(pages)] = pages
        owners[starts[row] : starts[row + 1]] = row
        positions[starts[row] : starts[row + 1]] = np.arange(length - count, length)
        first = max(0, length - count - shape.window + 1) if shape.window else 0
        places = np.arange(first, length)
        is_seen[pages[places // size], places % size] = True
    seen = jnp.asarray(is_seen) if poisoned else None
    sizes = {"num_tokens": num_tokens, "num_layers": num_layers, "num_pages": num_pages}
    return {
        **_arrays(jax.random.key(seed, impl="rbg"), seen, shape, **sizes),
        "block_tables": jnp.asarray(tables),
        "query_starts": jnp.asarray(starts),
        "kv_lengths": jnp.asarray(np.append(lengths, 0).astype(np.int32)),
        "num_decodes": jnp.asarray(int((new == 1).sum()), jnp.int32),
        "token_sequences": jnp.asarray(owners),
        "positions": jnp.asarray(positions),
    }


@partial(jax.jit, static_argnames=("shape", "num_tokens", "num_layers", "num_pages"))
def _arrays(
    key: Array, is_seen: Array | None, shape: Shape, *, num_tokens: int, num_layers: int, num_pages: int
) -> dict[str, Array]:
    """Queries, keys, values and pages, normally distributed; pages are NaN but where `is_seen` [pages, page_size]."""
    keys, (heads, size) = jax.random.split(key, 4), (shape.num_kv_heads, shape.head_dim)

    def normal(key: Array, *sizes: int) -> Array:
        return jax.random.normal(key, sizes, jnp.float32).astype(shape.dtype)

    pages = jax.random.normal(keys[3], (num_layers, num_pages, 2, heads, shape.page_size, size), jnp.float32)
    if is_seen is not None:
        pages = jnp.where(is_seen[None, :, None, None, :, None], pages, jnp.nan)
    return {
        "queries": normal(keys[0], num_tokens, shape.num_heads, size),
        "keys": normal(keys[1], num_tokens, heads, size),
        "values": normal(keys[2], num_tokens, heads, size),
        "pages": pages.astype(shape.stored_dtype),
    }


def options_of(shape: Shape, *, seed: int) -> dict[str, Any]:
    """The keyword arguments beside `layer`."""
    options: dict[str, Any] = {"scale": shape.head_dim**-0.5, "window": shape.window, "soft_cap": shape.soft_cap}
    if shape.with_sinks:
        options["sinks"] = jax.random.normal(jax.random.key(seed + 1), (shape.num_heads,))
    if jnp.dtype(shape.stored_dtype).itemsize == 1:
        size = (2, shape.num_kv_heads)
        options["kv_scales"] = jax.random.uniform(jax.random.key(seed + 2), size, minval=0.5, maxval=2.0)
    return options
