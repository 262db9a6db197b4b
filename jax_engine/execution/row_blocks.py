"""Rows of a step in blocks of one fixed size, run by one loop: what makes a row's numbers independent of its step.

A matrix product sums in an order that its shapes decide, so a row padded to 8 rows and the same row among 512 may end
in different bits. Cut into blocks, every row of every step goes through the same machine code, on the same shapes, and
a step costs as many blocks as it has rows for.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

Carry = TypeVar("Carry")
Rows = TypeVar("Rows")  # an array, or a pytree of arrays, with one entry for each row

CPU_ROWS = 32  # 62 GFLOP/s of the 71 that 512 rows reach on 2 cores, in a product of [rows, 160] and [160, 448]
ACCELERATOR_ROWS = 128  # as many as a matrix unit has


def row_block(platform: str) -> int:
    """How many rows go through a model at a time on "cpu", "gpu" or "tpu"."""
    return CPU_ROWS if platform == "cpu" else ACCELERATOR_ROWS


def whole_blocks(num_rows: int, size: int) -> int:
    """`num_rows`, rounded up to blocks of `size`."""
    return -(-num_rows // size) * size


def by_blocks(
    run: Callable[[Int[Array, ""], Carry], tuple[Carry, Rows]],
    carry: Carry,
    *,
    num_rows: int,
    size: int,
    used: Int[Array, ""],
) -> tuple[Carry, Rows]:
    """The last carry, and the rows of every block that holds one of the first `used` rows; zeros after them.

    `run` takes a block's first row and what the block before carried, and gives the results of its `size` rows, of
    which `num_rows` are a multiple.
    """
    assert num_rows % size == 0

    def body(index: Int[Array, ""], state: tuple[Carry, Rows]) -> tuple[Carry, Rows]:
        carry, out = state
        carry, block = run(index * size, carry)

        def put(rows: Array, some: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(rows, some, index * size, axis=0)

        return carry, jax.tree.map(put, out, block)

    shapes = jax.eval_shape(lambda carry: run(jnp.int32(0), carry)[1], carry)
    zeros: Rows = jax.tree.map(lambda leaf: jnp.zeros((num_rows, *leaf.shape[1:]), leaf.dtype), shapes)
    out: tuple[Carry, Rows] = lax.fori_loop(0, (used + size - 1) // size, body, (carry, zeros))
    return out
