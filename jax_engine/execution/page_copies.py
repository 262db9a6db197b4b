"""Whole pages of the device's cache: read out, written, sent to host memory and back."""

import time
from collections.abc import Mapping
from functools import cached_property, partial
from math import prod
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Int

from jax_engine.kv_cache.host_pool import PageCopies
from jax_engine.models.kv_pages import KVPages

HOST_MEMORY = "pinned_host"
STAGED_PAGES = 16  # on their way at once in one launch; see `staging_pages`
TIMED_PAGES = 4
READ_PAGE, WRITE_PAGE = "read a page", "write a page"

AnySharding = TypeVar("AnySharding", bound=Sharding | None)
Page = tuple[jax.Array, ...]  # of all layers: one array for each leaf of the cache


def staging_pages(*, host: bool) -> int:
    """Pages' worth of device memory that copies may take beside the cache: those of two launches, since the host is one
    step ahead.
    """
    return 2 * STAGED_PAGES if host else STAGED_PAGES


class PageCopier:
    """Two small programs, compiled at start, that read and write one page of all layers; and the pages in host memory.

    Everything is asynchronous. Programs run in the order in which they are launched, so a page is read before a later
    program overwrites it; a transfer to or from the host runs beside them, and only who needs its result waits for it.
    Mutable; owned by the runner.
    """

    def __init__(self, cache: KVPages, programs: Mapping[str, jax.stages.Compiled] | None = None) -> None:
        """`programs` are those of `lower_page_programs`, if they are compiled already."""
        leaves = jax.tree.leaves(cache)
        self._on_device = tuple(_page_sharding(leaf.sharding, leaf.ndim) for leaf in leaves)
        if programs is None:
            programs = {name: lowered.compile() for name, lowered in lower_page_programs(cache).items()}
        self._read, self._write = programs[READ_PAGE], programs[WRITE_PAGE]
        self._host_pages: dict[int, Page] = {}
        self._sending: list[Page] = []  # to host memory, begun by the latest launch that had copies
        self._sent_before: list[Page] = []  # and by the one before it
        self._num_staged = 0

    def run(self, cache: KVPages, copies: PageCopies) -> KVPages:
        """Launch a step's copies; returns the cache (donated) that the step has to use."""
        jax.block_until_ready(self._sent_before)  # done by now, unless the link falls behind
        self._sent_before, self._sending = self._sending, []
        self._num_staged = 0
        for page, host_page in copies.saves:
            self._stage(cache)
            self._host_pages[host_page] = self._save(cache, page)
        for source, target in copies.copies:
            self._stage(cache)
            cache = self._write(cache, np.int32(target), self._read(cache, np.int32(source)))
        for host_page, page in copies.loads:
            self._stage(cache)
            cache = self._load(cache, self._host_pages[host_page], page)
        return cache

    def forget(self) -> None:
        """Let go of all pages in host memory, once none is on its way."""
        jax.block_until_ready((self._sent_before, self._sending))
        self._sent_before, self._sending = [], []
        self._host_pages.clear()

    def seconds_per_load(self, cache: KVPages) -> tuple[float, KVPages]:
        """How long a page takes from host memory into the cache (donated), measured; and the cache, unchanged."""
        content = self._save(cache, 0)
        seconds = []
        for _ in range(3):
            jax.block_until_ready((content, cache))
            start = time.perf_counter()
            for _ in range(TIMED_PAGES):
                cache = self._load(cache, content, 0)
            jax.block_until_ready(cache)
            seconds.append((time.perf_counter() - start) / TIMED_PAGES)
        return min(seconds), cache

    @cached_property
    def _in_host(self) -> tuple[Sharding, ...]:
        return tuple(sharding.with_memory_kind(HOST_MEMORY) for sharding in self._on_device)

    def _save(self, cache: KVPages, page: int) -> Page:
        sent: Page = jax.device_put(self._read(cache, np.int32(page)), self._in_host)
        self._sending.append(sent)
        return sent

    def _load(self, cache: KVPages, content: Page, page: int) -> KVPages:
        return self._write(cache, np.int32(page), jax.device_put(content, self._on_device))

    def _stage(self, cache: KVPages) -> None:
        """Make room for one more page on its way, if need be by waiting for those before it."""
        if self._num_staged == STAGED_PAGES:
            jax.block_until_ready((cache, self._sending))
            self._num_staged = 0
        self._num_staged += 1


def lower_page_programs(cache: KVPages) -> dict[str, jax.stages.Lowered]:
    """The programs that read and write a page, traced, by name; `cache` may be of `jax.ShapeDtypeStruct`s."""
    leaves = jax.tree.leaves(cache)
    shardings = tuple(_page_sharding(leaf.sharding, leaf.ndim) for leaf in leaves)
    page = tuple(
        jax.ShapeDtypeStruct((leaf.shape[0], *leaf.shape[2:]), leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, shardings, strict=True)
    )
    index = np.int32(0)
    is_placed = leaves[0].sharding is not None  # else on the first device, and its shapes say nothing
    whole = jax.tree.map(lambda leaf: leaf.sharding, cache) if is_placed else None
    parts = _num_partitions(leaves[0].sharding)
    read = jax.jit(partial(read_page, num_partitions=parts), out_shardings=shardings if is_placed else None)
    write = jax.jit(partial(write_page, num_partitions=parts), donate_argnums=0, out_shardings=whole)
    return {READ_PAGE: read.lower(cache, index), WRITE_PAGE: write.lower(cache, index, page)}


def read_page(cache: KVPages, page: Int[Array, ""], *, num_partitions: int = 1) -> Page:
    """One page of all layers: each leaf `[L, P, ...]` of the cache without its axis of pages.

    Of a cache in partitions, each on a device of its own, every device reads one of its pages, and one page travels.
    """

    def read(leaf: jax.Array) -> jax.Array:
        parts, number, is_there = _partitioned(leaf, page, num_partitions)
        found = lax.dynamic_index_in_dim(parts, number, 2, keepdims=False)
        return found[:, 0] if num_partitions == 1 else jnp.sum(jnp.where(is_there, found, 0), axis=1, dtype=leaf.dtype)

    return tuple(map(read, jax.tree.leaves(cache)))


def write_page(cache: KVPages, page: Int[Array, ""], content: Page, *, num_partitions: int = 1) -> KVPages:
    """`cache` with one page of all layers replaced by what `read_page` gave."""

    def write(leaf: jax.Array, new: jax.Array) -> jax.Array:
        parts, number, is_there = _partitioned(leaf, page, num_partitions)
        row = new[:, None]
        if num_partitions > 1:
            row = jnp.where(is_there, row, lax.dynamic_index_in_dim(parts, number, 2, keepdims=False))
        return lax.dynamic_update_index_in_dim(parts, row, number, 2).reshape(leaf.shape)

    leaves, structure = jax.tree.flatten(cache)
    return jax.tree.unflatten(structure, list(map(write, leaves, content)))


def _partitioned(
    leaf: jax.Array, page: Int[Array, ""], count: int
) -> tuple[jax.Array, Int[Array, ""], Bool[Array, "parts ..."]]:
    """`leaf` as `[L, partitions, pages of one, ...]`, a page's number in its partition, and which that is."""
    parts = leaf.reshape(leaf.shape[0], count, -1, *leaf.shape[2:])
    size = parts.shape[2]
    return parts, page % size, jnp.arange(count).reshape(-1, *[1] * (leaf.ndim - 2)) == page // size


def check_host_memory(device: jax.Device) -> None:
    """Raise a ValueError unless JAX can keep arrays in this platform's host memory."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST_MEMORY not in kinds:
        raise ValueError(
            f"kv_offloading_size needs memory of the kind {HOST_MEMORY!r}, and {device.device_kind} has "
            f"{', '.join(kinds)}; leave it (and swap_space) out"
        )


def _num_partitions(sharding: Sharding | None) -> int:
    """How many devices, or groups of them, the pages of a cache that lies so are divided between."""
    if not isinstance(sharding, NamedSharding):
        return 1
    axes = (*sharding.spec, None, None)[1] or ()
    return prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _page_sharding(sharding: AnySharding, ndim: int) -> AnySharding | NamedSharding:
    """Where a page lies whose cache lies as `sharding` says."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = list(sharding.spec) + [None] * (ndim - len(sharding.spec))
    return NamedSharding(sharding.mesh, PartitionSpec(axes[0], *axes[2:]))
