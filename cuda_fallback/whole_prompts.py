"""Attention of prompts that begin in this step, over their own keys and values, as plain dense attention.

That is what a library's flash attention computes: no pages, no cached tokens before the range. cuDNN's is asked through
`jax.nn.dot_product_attention`; XLA's, through the same function, is for tests. Ranges are padded to one of two lengths,
and their real lengths given, which cuDNN stops at.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_engine.cuda_fallback.searching import rows_of

Implementation = Literal["cudnn", "xla"]

SHORT_TOKENS, SHORT_AT_ONCE = 512, 8  # ranges of up to so many tokens go so many at once; longer ones alone
MOST_HEAD_DIM = 256  # on Hopper and newer; 128 before
DTYPES = (jnp.bfloat16, jnp.float16)


def check_cudnn_allowed(platform: str, *, deterministic: bool) -> None:
    """Raise a ValueError where cuDNN may not be asked for."""
    if platform != "gpu":
        raise ValueError(
            f"attention_backend='cudnn' needs an NVIDIA GPU and this machine's platform is {platform!r}; use auto"
        )
    if deterministic:
        raise ValueError(
            "attention_backend='cudnn' computes a whole prompt otherwise than its parts, and deterministic=True "
            "promises the same numbers; use attention_backend='xla'"
        )


def check_cudnn(
    head_dim: int, dtype: jnp.dtype, pages_dtype: jnp.dtype, *, soft_cap: float | None, has_sinks: bool
) -> None:
    """Raise a ValueError where cuDNN's flash attention has no place for something."""
    why = None
    if dtype not in DTYPES:
        why = f"takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    elif pages_dtype != dtype:
        why = f"cannot see what is stored in pages of {jnp.dtype(pages_dtype).name}"
    elif head_dim % 8 or head_dim > MOST_HEAD_DIM:
        why = f"takes a head_dim that is a multiple of 8, {MOST_HEAD_DIM} at most, not {head_dim}"
    elif soft_cap is not None or has_sinks:
        why = "has no soft cap and no sinks"
    if why is not None:
        raise ValueError(f"attention_backend='cudnn' {why}; use attention_backend='xla'")


def begins_here(
    query_starts: Int[Array, " boundaries"], kv_lengths: Int[Array, " B"], num_decodes: Int[Array, ""]
) -> Bool[Array, " B"]:
    """Which ranges of several tokens are the beginning of their sequence."""
    lengths = query_starts[1:] - query_starts[:-1]
    return (jnp.arange(lengths.shape[0]) >= num_decodes) & (lengths > 0) & (lengths == kv_lengths)


def attend_whole(
    out: Float[Array, "T N H"],
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    query_starts: Int[Array, " boundaries"],
    chosen: Bool[Array, " B"],
    *,
    scale: float,
    window: int | None,
    implementation: Implementation,
) -> Float[Array, "T N H"]:
    """`out` with the rows of the `chosen` ranges filled in; they see nothing but each other."""
    lengths, short = query_starts[1:] - query_starts[:-1], min(SHORT_TOKENS, queries.shape[0])
    kinds = [(chosen & (lengths <= short), short, max(1, min(SHORT_AT_ONCE, queries.shape[0] // 2)))]
    if queries.shape[0] > short:
        kinds.append((chosen & (lengths > short), queries.shape[0], 1))
    attend = partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    for own, size, at_once in kinds:
        out = _attend_some(out, (queries, keys, values), query_starts, own, attend, size=size, at_once=at_once)
    return out


def _attend_some(
    out: Float[Array, "T N H"],
    arrays: tuple[Array, Array, Array],
    query_starts: Int[Array, " boundaries"],
    own: Bool[Array, " B"],
    attend: Callable[..., Array],
    *,
    size: int,
    at_once: int,
) -> Float[Array, "T N H"]:
    """`out` with the rows of `own` ranges, each of `size` tokens at most, so many of them in a trip."""
    ends, lengths = jnp.cumsum(own), query_starts[1:] - query_starts[:-1]

    def trip(index: Int[Array, ""], out: Float[Array, "T N H"]) -> Float[Array, "T N H"]:
        number = index * at_once + jnp.arange(at_once)
        sequences = jnp.minimum(rows_of(number, ends), lengths.shape[0] - 1)
        real = jnp.where(number < ends[-1], lengths[sequences], 0)
        starts = jnp.minimum(query_starts[sequences], out.shape[0] - 1)[:, None]
        mine = jnp.arange(size) < real[:, None]
        rows = jnp.where(mine, starts + jnp.arange(size), starts)
        # A softmax over nothing would be no number: of no range there is one row, which is dropped.
        counts = jnp.maximum(real, 1)
        queries, keys, values = (array[rows] for array in arrays)
        found = attend(queries, keys, values, query_seq_lengths=counts, key_value_seq_lengths=counts)
        return out.at[jnp.where(mine, rows, out.shape[0])].set(found, mode="drop")

    return lax.fori_loop(0, (ends[-1] + at_once - 1) // at_once, trip, out)
