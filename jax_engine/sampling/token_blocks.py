"""Rows over the vocabulary in blocks of tokens: what is found of each block first, and then within one, costs one pass
over the rows and no second array of their size.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_TOKENS = 512  # that are summed, or compared, before blocks are
SMALLEST_BLOCK = 64  # a vocabulary that larger ones do not divide is padded


def in_blocks(rows: Float[Array, "B V"], padding: float) -> Float[Array, "B N S"]:
    """Each row in blocks of as many tokens as divide it, up to `BLOCK_TOKENS`; of so many, with `padding` behind it,
    where that would be fewer than `SMALLEST_BLOCK`.
    """
    size = math.gcd(rows.shape[1], BLOCK_TOKENS)
    if size < SMALLEST_BLOCK <= rows.shape[1]:
        rows, size = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK_TOKENS)), constant_values=padding), BLOCK_TOKENS
    return rows.reshape(rows.shape[0], -1, size)


def within_block(
    blocks: Float[Array, "B N S"], block: Int[Array, " B"], choose: Callable[[Float[Array, "B S"]], Int[Array, " B"]]
) -> Int[Array, " B"]:
    """The token that is chosen in one block of each row."""
    return block * blocks.shape[2] + choose(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0])
