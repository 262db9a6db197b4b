"""The Mosaic GPU kernel as an attention implementation: where it runs, and what a step does around it.

Keys and values are written by a scatter before the kernel, one launch more a layer, in place in donated pages. In the
kernel they would have to be written, and seen by every program that reads them, before the first page is read: a grid
of programs that start in no order has no barrier for that. Of decodes alone the one program that reads a sequence's
last page could write it, but with a sequence cut into parts it would be a third way to write, for a launch that takes
about a microsecond within a command buffer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jax_engine.cuda_fallback.paged_attention import Partial, Stripe, write_pages
from jax_engine.models.kv_pages import KVPages, PageShape, SequenceTable, split_page_shape
from jax_engine.models.partition import Partition
from jax_engine.pallas_kernels import gpu

INTERPRETED_MULTIPROCESSORS = 2


def check_device(backend: str, *, platform: str, partition: Partition) -> None:
    """Refuse where the kernel cannot run.

    Raises:
        ValueError: another platform, or another generation of GPUs.
    """
    if backend == "pallas_gpu_interpret":
        return
    if platform != "gpu":
        raise ValueError(
            f"attention_backend='pallas_gpu' needs an NVIDIA GPU and this machine's platform is {platform!r}; use auto "
            "or xla (for tests of the kernel itself, pallas_gpu_interpret)"
        )
    capability = str(_device(partition).compute_capability)
    if not capability.startswith("9."):
        raise ValueError(
            "attention_backend='pallas_gpu' needs a GPU of the Hopper generation (compute capability 9.0), whose "
            "matrix instructions (wgmma) older and newer chips do not have, and this one's compute capability is "
            f"{capability}; use attention_backend='xla'"
        )


def _device(partition: Partition) -> Any:
    """A device that the engine runs on, which need not be one of this machine's."""
    return jax.local_devices()[0] if partition.mesh is None else partition.mesh.devices.flat[0]


@dataclass(frozen=True)
class GpuAttention:
    """The kernel, chosen for an engine's devices. Hashable."""

    backend: str
    partition: Partition
    multiprocessors: int
    interpret: bool
    deterministic: bool

    @classmethod
    def of(cls, backend: str, partition: Partition, *, deterministic: bool = False) -> "GpuAttention":
        """For the devices of `partition`; `check_device` has not refused them."""
        if backend == "pallas_gpu_interpret":
            return cls(backend, partition, INTERPRETED_MULTIPROCESSORS, interpret=True, deterministic=deterministic)
        count = int(_device(partition).core_count)
        return cls(backend, partition, count, interpret=False, deterministic=deterministic)

    def page_shape(self, num_kv_heads: int, page_size: int, head_dim: int) -> PageShape:
        """A page of one layer.

        Raises:
            ValueError: the kernel does not do pages or heads of this size.
        """
        self._refuse(gpu.why_not_pages(page_size=page_size, head_dim=head_dim))
        return split_page_shape(num_kv_heads, page_size, head_dim)

    def prepare(
        self,
        sequences: SequenceTable,
        cache: KVPages,
        *,
        windows: Sequence[int],
        num_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
    ) -> SequenceTable:
        """The table with the kernel's work list for each cache group (see `ops.PrepareOp`).

        Raises:
            ValueError: the kernel does not do attention of this shape or in these number types.
        """
        heads, kv_heads = num_heads // self.partition.num_parts("heads"), cache.num_heads
        kv_heads //= self.partition.num_parts("kv_heads")
        self._check(heads, kv_heads, head_dim, dtype, cache.data.dtype)
        rows = sequences.query_starts, sequences.token_sequences, sequences.positions
        sizes: dict[str, Any] = {"heads": (heads, kv_heads), "room": sequences.block_tables.shape[-1] * cache.page_size}
        work = [self._work(*rows, **sizes, window=window or None) for window in windows]
        return replace(sequences, work=jax.tree.map(lambda *groups: jnp.stack(groups), *work))

    def __call__(
        self,
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
        work: gpu.Work | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
        sinks: Float[Array, " N"] | None = None,
        kv_scales: Float[Array, "2 K"] | None = None,
    ) -> tuple[Float[Array, "T N H"], Num[Array, "L P 2 K S H"]]:
        """Write, then attend. Specified by `pallas_kernels.reference`; `work` is of `prepare`, or built here, as where
        devices have pages of their own.

        Raises:
            ValueError: the kernel does not do attention of this shape or in these number types.
        """
        if work is None:
            self._check(queries.shape[1], keys.shape[1], queries.shape[2], queries.dtype, pages.dtype)
            sizes: dict[str, Any] = {"heads": (queries.shape[1], keys.shape[1])}
            sizes["room"] = block_tables.shape[1] * pages.shape[4]
            work = self._work(query_starts, token_sequences, positions, **sizes, window=window)
        if kv_scales is not None:
            keys, values = keys / kv_scales[0, :, None], values / kv_scales[1, :, None]
        pages = write_pages(keys, values, pages, block_tables, token_sequences, positions, layer)
        out = gpu.attend(
            queries,
            pages,
            block_tables,
            work,
            layer=layer,
            scale=scale,
            window=window,
            soft_cap=soft_cap,
            sinks=sinks,
            kv_scales=kv_scales,
            multiprocessors=self.multiprocessors,
            deterministic=self.deterministic,
            interpret=gpu.interpreter() if self.interpret else None,
        )
        return out, pages

    def striped(
        self,
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
        stripe: Stripe,
        window: int | None = None,
        soft_cap: float | None = None,
        kv_scales: Float[Array, "2 K"] | None = None,
    ) -> tuple[Partial, Num[Array, "L P 2 K S H"]]:
        """The same where only a stripe of every sequence's pages is here (`striped_paged_attention`)."""
        self._check(queries.shape[1], keys.shape[1], queries.shape[2], queries.dtype, pages.dtype)
        here = gpu.Stripe(stripe.rank, stripe.num, page_size=pages.shape[4])
        shared: dict[str, Any] = {"window": window, "multiprocessors": self.multiprocessors}
        heads: dict[str, Any] = {"num_heads": queries.shape[1], "num_kv_heads": keys.shape[1]}
        work = gpu.step_work(query_starts, token_sequences, positions, stripe=here, **heads, **shared)
        if kv_scales is not None:
            keys, values = keys / kv_scales[0, :, None], values / kv_scales[1, :, None]
        pages = write_pages(keys, values, pages, block_tables, token_sequences, positions, layer, stripe)
        options: dict[str, Any] = {
            "layer": layer,
            "scale": scale,
            "soft_cap": soft_cap,
            "kv_scales": kv_scales,
            **shared,
        }
        options["interpret"] = gpu.interpreter() if self.interpret else None
        return Partial(*gpu.attend_stripe(queries, pages, block_tables, work, here, **options)), pages

    def _work(
        self,
        query_starts: Int[Array, " boundaries"],
        token_sequences: Int[Array, " T"],
        positions: Int[Array, " T"],
        *,
        heads: tuple[int, int],
        room: int,
        window: int | None,
    ) -> gpu.Work:
        """`room` is that of a block table, in tokens."""
        sizes: dict[str, Any] = {
            "num_heads": heads[0],
            "num_kv_heads": heads[1],
            "multiprocessors": self.multiprocessors,
        }
        fixed = room if self.deterministic else None
        return gpu.step_work(query_starts, token_sequences, positions, window=window, fixed_tokens=fixed, **sizes)

    def _check(self, heads: int, kv_heads: int, head_dim: int, dtype: jnp.dtype, stored: jnp.dtype) -> None:
        types: dict[str, Any] = {"dtype": str(dtype), "stored": str(stored), "deterministic": self.deterministic}
        self._refuse(gpu.why_not(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, **types))

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(
                f"attention_backend={self.backend!r} does not run this model: {reason}; use attention_backend='xla'"
            )
