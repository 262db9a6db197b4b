"""Keys and values as pages hold them: divided by scales, in 8 bits, or as the bits of 8-bit floats.

On a CPU, XLA widens whatever it gathers from an array of 8-bit floats or scatters into it as a whole: the whole cache,
in every layer. So there pages are bytes (uint8), and what a step reads and writes of them is converted by itself.
"""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num


def divided_by_scales(
    queries: Float[Array, "T N H"],
    keys: Float[Array, "T K H"],
    values: Float[Array, "T K H"],
    kv_scales: Float[Array, "2 K"] | None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T K H"], Float[Array, "T K H"]]:
    """Keys and values divided by their scales, and queries times that of their keys."""
    if kv_scales is None:
        return queries, keys, values
    return scale_heads(queries, kv_scales[0]), keys / kv_scales[0, :, None], values / kv_scales[1, :, None]


def scale_heads(rows: Float[Array, "T N H"], scales: Float[Array, " K"]) -> Float[Array, "T N H"]:
    """Each query head's rows times the scale of its kv head."""
    by_head = jnp.repeat(scales, rows.shape[1] // scales.shape[0])[:, None]
    return (rows * by_head).astype(rows.dtype)


def narrow(rows: Float[Array, "..."], dtype: DTypeLike, bits_of: DTypeLike | None = None) -> Num[Array, "..."]:
    """Rows in the type of pages, clipped to the range of 8 bits; as the bits of `bits_of`, if pages hold those."""
    stored = jnp.dtype(dtype if bits_of is None else bits_of)
    if jnp.issubdtype(stored, jnp.integer):
        rows = jnp.round(rows)
    if stored.itemsize == 1:
        limits = jnp.iinfo(stored) if jnp.issubdtype(stored, jnp.integer) else jnp.finfo(stored)
        rows = jnp.clip(rows.astype(jnp.float32), float(limits.min), float(limits.max))
    rows = rows.astype(stored)
    return rows if bits_of is None else lax.bitcast_convert_type(rows, jnp.dtype(dtype))


def widened(stored: Num[Array, "..."], dtype: DTypeLike, bits_of: DTypeLike | None = None) -> Num[Array, "..."]:
    """What was read from pages of 8 bits in a type to compute in; other types as they are."""
    if bits_of is not None:
        stored = lax.bitcast_convert_type(stored, jnp.dtype(bits_of))
    return stored.astype(dtype) if stored.dtype.itemsize == 1 else stored
