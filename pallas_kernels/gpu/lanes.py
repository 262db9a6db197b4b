"""The few operations that a kernel asks of a warpgroup's registers, on the chip and in interpret mode.

The interpreter knows neither register layouts nor products with an operand in registers; there the same values are
computed by plain jnp, and copies, barriers and races remain its own.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_engine.pallas_kernels.gpu.work_list import ALIGNMENT

Ref = Any  # a `jax.Ref`, which Pallas's own signatures call otherwise


COLUMNS = 64  # that are swizzled together in shared memory
NOWHERE = 2**30  # a row past the end of all


@dataclass(frozen=True)
class Lanes:
    """One warpgroup's arithmetic on tiles in the layout of its matrix unit."""

    interpreted: bool

    def aligned(self, row: jax.Array) -> jax.Array:
        """The first row of a copy of queries. The interpreter would copy from anywhere; the chip does not, and so what
        such a copy brings there is no number here.
        """
        return jnp.where(lax.rem(row, ALIGNMENT) == 0, row, NOWHERE) if self.interpreted else row

    def rows(self, num_rows: int, value: float) -> jax.Array:
        """A float32 number for each row of a tile."""
        full = jnp.full((num_rows,), value, jnp.float32)
        return full if self.interpreted else plgpu.layout_cast(full, plgpu.Layout.WGMMA.reduce(1))

    def tile(self, num_rows: int, num_columns: int) -> jax.Array:
        """A float32 tile of zeros."""
        return self.laid_out(jnp.zeros((num_rows, num_columns), jnp.float32))

    def laid_out(self, tile: jax.Array) -> jax.Array:
        """A tile in the layout of the matrix unit's results."""
        return tile if self.interpreted else plgpu.layout_cast(tile, plgpu.Layout.WGMMA)

    def iota(self, shape: tuple[int, ...], axis: int) -> jax.Array:
        """The index of each element along an axis."""
        if self.interpreted:
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def widen(self, source: Ref, target: Ref) -> None:
        """Copy 8-bit numbers in shared memory to a tile of the target's type, which the matrix unit is to read."""
        if self.interpreted:
            target[...] = source[...].astype(target.dtype)
        else:
            for first in range(0, source.shape[1], COLUMNS):  # few registers at a time
                columns = slice(None), pl.ds(first, COLUMNS)
                narrow = plgpu.layout_cast(source[columns], plgpu.Layout.WGMMA_UPCAST_2X)
                target[columns] = narrow.astype(jnp.float32).astype(target.dtype)
        plgpu.commit_smem()

    def scores(self, queries: Ref, keys: Ref) -> jax.Array:
        """`queries @ keys.T` of tiles in shared memory, in float32."""
        if self.interpreted:
            return jnp.dot(queries[...].astype(jnp.float32), keys[...].astype(jnp.float32).T)

        def multiply(out: Ref) -> jax.Array:
            plgpu.wgmma(out, queries, keys.transpose((1, 0)))
            return out[...]

        return pl.run_scoped(multiply, plgpu.ACC((queries.shape[0], keys.shape[0]), jnp.float32))  # type: ignore[attr-defined]

    def add_product(self, total: jax.Array, weights: jax.Array, values: Ref) -> jax.Array:
        """`total + weights @ values` in float32, the values in shared memory and of the weights' type."""
        if self.interpreted:
            return total + jnp.dot(weights.astype(jnp.float32), values[...].astype(jnp.float32))

        def multiply(out: Ref) -> None:
            plgpu.wgmma(out, weights, values)

        return pl.run_state(multiply)(plgpu.ACC.init(total))  # type: ignore[attr-defined]


def across(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, at every column."""
    return lax.broadcast_in_dim(rows, shape, [0])
