"""Attention over a cache whose pages are divided between devices; see `device_tables.py` for how."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from jax_engine.cuda_fallback.paged_attention import Partial, Stripe
from jax_engine.models.device_tables import merge_partial, owned_tables, put_rows, striped_tables, take_rows
from jax_engine.models.kv_pages import ATTENTION_SCOPE, PAGE_AXES, DeviceTables, KVPages, SequenceTable
from jax_engine.models.partition import Partition

# An attention kernel, by the calling convention of `pallas_kernels.reference`.
Kernel = Callable[..., tuple[Array, Array]]
# One by that of `striped_paged_attention`.
Striped = Callable[..., tuple[Partial, Array]]


@dataclass(frozen=True)
class DividedAttention:
    """Attention where devices of some mesh axes divide the pages of a cache, and those of others its heads."""

    kernel: Kernel
    partition: Partition
    axes: tuple[str, ...]  # of the mesh, that pages are divided over
    # Parts that they are divided into; asked of `partition` outside of the `shard_map`s, within which an axis is one.
    count: int
    striped: Striped | None  # what attends over a part of a sequence's pages

    @classmethod
    def of(
        cls, kernel: Kernel, partition: Partition, backend: str, *, striped: Striped | None, deterministic: bool
    ) -> "DividedAttention":
        """With the kernel of an attention backend, as `partition` splits `pages`.

        Raises:
            ValueError: the backend needs all pages of a sequence, and they are striped; or numbers are to be the same
                whatever shares a step.
        """
        if striped is None and not partition.owned_pages:
            raise ValueError(
                f"attention_backend={backend!r} cannot attend over a part of a sequence's pages, and the sharding "
                "strategy spreads them over devices (page_rule 'striped'); use attention_backend='xla', or a strategy "
                "that keeps a sequence's pages together, such as data_attention"
            )
        if deterministic:
            raise ValueError(
                "deterministic=True is for caches that every device has all pages of, and the sharding strategy "
                "divides them between devices; use sharding_strategy='tensor'"
            )
        return cls(kernel, partition, partition.mesh_axes("pages"), partition.num_parts("pages"), striped)

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
        """The table with each device's own (see `ops.PrepareOp`)."""
        num_pages = cache.num_pages // self.count

        def own(sequences: SequenceTable) -> DeviceTables:
            tables = self._tables(sequences, num_pages=num_pages, page_size=cache.page_size)
            return jax.tree.map(lambda leaf: leaf[None], tables)

        split = jax.shard_map(
            own,
            mesh=self.partition.mesh,
            in_specs=P(),
            out_specs=P(self.axes),
            check_vma=False,
        )
        return replace(sequences, on_devices=split(replace(sequences, adapters=None)))

    def __call__(
        self,
        queries: Float[Array, "T N H"],
        keys: Float[Array, "T K H"],
        values: Float[Array, "T K H"],
        cache: KVPages | None,
        sequences: SequenceTable | Int[Array, " T"],
        *,
        layer: int | Int[Array, ""],
        scale: float,
        window: int | None,
        kv_scales: Float[Array, "2 K"] | None = None,
    ) -> tuple[Float[Array, "T N H"], KVPages | None]:
        """See `ops.AttentionOp`; what is not split over heads comes and goes whole."""
        assert isinstance(cache, KVPages) and isinstance(sequences, SequenceTable) and sequences.on_devices is not None
        partition = self.partition
        options: dict[str, Any] = {"scale": scale, "window": window}
        if cache.bits_of is not None:
            options["bits_of"] = cache.bits_of
        scales = {} if kv_scales is None else {"kv_scales": kv_scales}

        def attend(layer: Array, tables: DeviceTables, scales: dict[str, Array], *arrays: Array) -> tuple[Array, Array]:
            tables = jax.tree.map(lambda leaf: leaf[0], tables)
            return self._attend(tables, options | scales | {"layer": layer}, *arrays)

        heads, kv_heads = partition.spec((None, "heads")), partition.spec((None, "kv_heads"))
        pages = partition.spec(PAGE_AXES)
        split = jax.shard_map(
            attend,
            mesh=partition.mesh,
            in_specs=(P(), P(self.axes), kv_heads, heads, kv_heads, kv_heads, pages),
            out_specs=(heads, pages),
            check_vma=False,  # loops over as many rows as a device happens to have
        )
        with jax.named_scope(ATTENTION_SCOPE):
            given = queries, keys, values, cache.data
            out, data = split(jnp.asarray(layer, jnp.int32), sequences.on_devices, scales, *given)
        return out, replace(cache, data=data)

    def _tables(self, sequences: SequenceTable, *, num_pages: int, page_size: int) -> DeviceTables:
        """The tables of a device, which has `num_pages` pages."""
        rank = lax.axis_index(self.axes)
        if self.partition.owned_pages:
            return owned_tables(sequences, rank, num_pages=num_pages, page_size=page_size)
        return striped_tables(sequences, rank, num_devices=self.count, num_pages=num_pages)

    def _attend(
        self,
        tables: DeviceTables,
        options: dict[str, Any],
        queries: Float[Array, "T N H"],
        keys: Float[Array, "T K H"],
        values: Float[Array, "T K H"],
        pages: Num[Array, "L P *page"],
    ) -> tuple[Float[Array, "T N H"], Num[Array, "L P *page"]]:
        """A step's attention, all of it on every device, and the device's pages.

        Of owned pages by `kernel`, with one sum over devices; of striped ones by `striped`, with a maximum and a sum.
        """
        if self.partition.owned_pages:
            rows = (take_rows(array, tables) for array in (queries, keys, values))
            out, pages = self.kernel(*rows, pages, *tables.convention, **options)
            return lax.psum(put_rows(out, tables), self.axes), pages
        assert self.striped is not None
        stripe = Stripe(lax.axis_index(self.axes), self.count)
        part, pages = self.striped(queries, keys, values, pages, *tables.convention, stripe=stripe, **options)
        return merge_partial(part, self.axes).astype(queries.dtype), pages
