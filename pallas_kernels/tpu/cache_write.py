"""The cache write of ranges longer than one token: strips of tokens, moved from their rows to their places in pages."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jax_engine.pallas_kernels.tpu.geometry import LANES, SUBLANES, Geometry
from jax_engine.pallas_kernels.tpu.page_stream import Copy, Scalar, View


@dataclass(frozen=True)
class CacheWrite:
    """Strips of `strip` positions, at a multiple of it, each of one page. A strip takes `counts` new tokens, from token
    row `rows` on; the others keep what the page holds.

    New keys and values come in float32 and in columns of 128 lanes, of which any rows can be read, and have `strip`
    rows of padding before and after them.
    """

    geometry: Geometry
    strip: int
    layer: Scalar
    rows: View  # [U] SMEM
    counts: View  # [U] SMEM
    offsets: View  # [U] SMEM: the first new token's place in its page
    page_numbers: View  # [U] SMEM
    new: jax.Ref  # [planes * W / 128, K, strip + T + strip, 128] HBM, float32
    pages: jax.Ref  # [L, P, planes, K, S, W] HBM
    new_buffer: jax.Ref  # [2, planes * W / 128, K, strip + 8, 128] float32
    strip_buffer: jax.Ref  # [2, planes, K, strip, W]
    new_semaphores: jax.Ref  # [2]
    old_semaphores: jax.Ref  # [2]
    out_semaphores: jax.Ref  # [2]

    def run(self, num_strips: Scalar) -> None:
        """Write all strips; returns when they are in HBM."""

        @pl.when(num_strips > 0)
        def _() -> None:
            self._start(jnp.int32(0))

        def step(index: Scalar, carry: None) -> None:
            @pl.when(index >= 1)
            def _() -> None:
                self._out_copy(index - 1).wait()

            @pl.when(index + 1 < num_strips)
            def _() -> None:
                self._start(index + 1)

            self._new_copy(index).wait()

            @pl.when(self.counts[index] < self.strip)
            def _() -> None:
                self._old_copy(index).wait()

            self._merge(index)
            self._out_copy(index).start()

        lax.fori_loop(0, num_strips, step, None)

        @pl.when(num_strips > 0)
        def _() -> None:
            self._out_copy(num_strips - 1).wait()

    def _start(self, index: Scalar) -> None:
        self._new_copy(index).start()

        @pl.when(self.counts[index] < self.strip)
        def _() -> None:
            self._old_copy(index).start()

    def _window(self, index: Scalar) -> tuple[Scalar, Scalar]:
        """The row of `new` that belongs to the strip's first position, as a multiple of 8 and the rest."""
        row = self.strip + self.rows[index] - lax.rem(self.offsets[index], self.strip)
        rest = lax.rem(row, SUBLANES)
        return row - rest, rest

    def _new_copy(self, index: Scalar) -> Copy:
        slot = lax.rem(index, 2)
        first = pl.multiple_of(self._window(index)[0], SUBLANES)
        return pltpu.make_async_copy(
            self.new.at[:, :, pl.ds(first, self.strip + SUBLANES), :],
            self.new_buffer.at[slot],
            self.new_semaphores.at[slot],
        )

    def _place(self, index: Scalar) -> jax.Ref:
        first = pl.multiple_of(self.offsets[index] // self.strip * self.strip, self.strip)
        return self.pages.at[self.layer, self.page_numbers[index], :, :, pl.ds(first, self.strip), :]

    def _old_copy(self, index: Scalar) -> Copy:
        slot = lax.rem(index, 2)
        return pltpu.make_async_copy(self._place(index), self.strip_buffer.at[slot], self.old_semaphores.at[slot])

    def _out_copy(self, index: Scalar) -> Copy:
        slot = lax.rem(index, 2)
        return pltpu.make_async_copy(self.strip_buffer.at[slot], self._place(index), self.out_semaphores.at[slot])

    def _merge(self, index: Scalar) -> None:
        geometry, slot = self.geometry, lax.rem(index, 2)
        rest = self._window(index)[1]
        begin = lax.rem(self.offsets[index], self.strip)
        place = lax.broadcasted_iota(jnp.int32, (self.strip, LANES), 0)
        is_new = (place >= begin) & (place < begin + self.counts[index])

        def merge(head: Scalar, _: None) -> None:
            for column in range(self.new.shape[0]):
                plane, part = divmod(column, geometry.width // LANES)
                lanes = pl.ds(part * LANES, LANES)
                new = self.new_buffer[slot, column, head, pl.ds(rest, self.strip), :]
                old = self.strip_buffer[slot, plane, head, :, lanes]
                merged = jnp.where(is_new, new, old.astype(jnp.float32)).astype(old.dtype)
                self.strip_buffer[slot, plane, head, :, lanes] = merged

        lax.fori_loop(0, geometry.num_kv_heads, merge, None)
