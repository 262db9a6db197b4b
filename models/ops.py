"""The operations a model is built from, and the choice of their implementations.

A model receives an immutable `Ops` and never asks what platform it runs on, nor over how many devices. An engine picks
one `Ops` at start, logs the choice with its reason, and keeps it. Every `shard_map` of a model is in this file, but for
those over the stages of a pipeline (`pipeline.py`), over devices that divide pages (`divided_attention.py`), and of a
mixture's experts (`experts.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_engine.cuda_fallback import paged_attention as xla
from jax_engine.cuda_fallback.cpu import attention as cpu
from jax_engine.cuda_fallback.experts import ragged_experts
from jax_engine.cuda_fallback.whole_prompts import check_cudnn_allowed
from jax_engine.models.dense_attention import dense_attention
from jax_engine.models.divided_attention import DividedAttention, Kernel, Striped
from jax_engine.models.experts import MixtureOfExperts, select_experts
from jax_engine.models.kv_pages import (
    ATTENTION_SCOPE,
    PAGE_AXES,
    CacheLayout,
    KVPages,
    PageShape,
    SequenceTable,
    split_page_shape,
)
from jax_engine.models.layers import Cache, DecoderLayer, LayerRun, Sequences, run_layers
from jax_engine.models.partition import ONE_DEVICE, Partition
from jax_engine.models.pipeline import Pipeline, microbatch_rows
from jax_engine.models.rope import Rotation
from jax_engine.pallas_kernels import reference

ATTENTION_BACKENDS = (
    "auto",
    "pallas_tpu",
    "pallas_tpu_interpret",
    "pallas_gpu",
    "pallas_gpu_interpret",
    "cudnn",
    "cpu",
    "xla",
    "reference",
)
# Why `auto` is what it is.
_BEST = {
    "tpu": ("pallas_tpu", "the best for platform 'tpu'"),
    "gpu": ("xla", "on platform 'gpu' pallas_gpu is to be asked for by name: it has never run on a GPU"),
}


class AttentionOp(Protocol):
    """Write each token's key and value to the cache, then attend causally over its own sequence."""

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
    ) -> tuple[Float[Array, "T N H"], KVPages | None]: ...


class RunLayers(Protocol):
    """Run a decoder's layers in order (`layers.run_layers`)."""

    def __call__(
        self,
        runs: Sequence[tuple[LayerRun, Sequence[DecoderLayer]]],
        hidden: Float[Array, "T D"],
        cache: Cache,
        rotate: Rotation,
        sequences: Sequences,
        layout: CacheLayout,
    ) -> tuple[Float[Array, "T D"], Cache]: ...


class PrepareOp(Protocol):
    """Called once a step, before its layers: adds to the table what attention would otherwise build in every layer.

    `windows` are those of the cache groups (0: none), `num_heads` and `head_dim` the queries', and `dtype` theirs.
    """

    def __call__(
        self,
        sequences: SequenceTable,
        cache: KVPages,
        *,
        windows: Sequence[int],
        num_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
    ) -> SequenceTable: ...


def _as_it_is(
    sequences: SequenceTable,
    cache: KVPages,
    *,
    windows: Sequence[int],
    num_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
) -> SequenceTable:
    """For kernels that need nothing beside the table."""
    return sequences


@dataclass(frozen=True)
class Ops:
    """The implementations that one engine's models use; hashable, so that it can be a static part of a model."""

    attention: AttentionOp
    attention_name: str
    experts: MixtureOfExperts
    page_shape: Callable[[int, int, int], PageShape] = split_page_shape  # of (num_kv_heads, page_size, head_dim)
    prepare: PrepareOp = _as_it_is
    partition: Partition = ONE_DEVICE  # where a step's arrays lie
    num_stages: int = 1
    run_layers: RunLayers = run_layers

    def in_stages(self, platform: str) -> "Ops":
        """The same for a pipeline, where devices hold some of the layers each; itself, if all hold all."""
        mesh = self.partition.mesh
        if mesh is None or self.partition.num_parts("cache_layers") == 1:
            return self
        pipeline = Pipeline(mesh, microbatch_rows(platform))
        prepare = self.prepare if self.prepare is _as_it_is else partial(pipeline.prepare, self.prepare)
        return replace(self, prepare=prepare, num_stages=pipeline.num_stages, run_layers=pipeline.run_layers)


class KernelShapes(NamedTuple):
    """What an attention kernel has to take: the types of queries and of pages, a head's size and a page's."""

    dtype: DTypeLike = jnp.float32
    page_dtype: DTypeLike = jnp.float32
    head_dim: int = 64
    page_size: int = 64


LIKELY_SHAPES = KernelShapes()


def select_ops(
    backend: str,
    *,
    platform: str,
    partition: Partition = ONE_DEVICE,
    deterministic: bool = False,
    shapes: KernelShapes = LIKELY_SHAPES,
) -> tuple[Ops, str]:
    """The implementations for `attention_backend` on `platform` ("cpu", "gpu", "tpu"), and the reason for the choice
    in one sentence.

    Heads are split as `partition` says, whose parts must divide both their numbers. Of `deterministic` ones,
    a row's result depends on its own query and on what its sequence has in the cache, bit for bit: not on the range
    that it came in, nor on the rows beside it. They take tables without decodes (`SequenceTable.block`). Not
    every kernel takes all `shapes`.
    """
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(
            f"attention_backend={backend!r} is unknown; allowed are {', '.join(ATTENTION_BACKENDS)} "
            "(auto chooses by platform)"
        )
    reason = "asked for"
    if backend == "auto":
        backend, reason = _best(platform, partition, shapes)
    if backend == "pallas_tpu" and platform != "tpu":
        raise ValueError(
            f"attention_backend='pallas_tpu' needs a TPU and this machine's platform is {platform!r}; use auto or xla "
            "(for tests of the kernel itself, pallas_tpu_interpret)"
        )
    if backend == "cudnn":
        check_cudnn_allowed(platform, deterministic=deterministic)
        reason += ": whole prompts by cuDNN, decodes and what follows cached tokens by XLA"
    if backend == "cpu":
        _check_cpu(platform, shapes)
    if backend == "pallas_tpu_interpret":
        reason += ": the TPU kernel, interpreted; very slow, for tests of the kernel only"
    if backend == "pallas_gpu_interpret":
        # Its interpreted warpgroups wait for each other in threads of XLA's.
        reason += ": the GPU kernel, interpreted; for tests of the kernel only, with NPROC=8 in the environment"
    if backend == "reference":
        reason += ": the float32 specification, slow"
    experts = select_experts(platform, partition, deterministic=deterministic)
    if backend in ("cpu", "cudnn", "xla", "reference"):
        kernel: Kernel = cpu.ragged_paged_attention if backend == "cpu" else reference.ragged_paged_attention
        if backend in ("cudnn", "xla"):
            kernel = partial(xla.ragged_paged_attention, sizes=xla.sizes_for(platform, deterministic=deterministic))
        if backend == "cudnn":
            kernel = partial(kernel, whole_prompts="cudnn")
        ops = Ops(_PagedAttention(kernel, partition), backend, experts, partition=partition)
    elif backend.startswith("pallas_gpu"):
        ops = _gpu_ops(backend, partition, experts, platform=platform, deterministic=deterministic)
    else:
        ops = _tpu_ops(backend, partition, experts, deterministic=deterministic)
    if partition.num_parts("pages") == 1:
        return ops, reason
    assert isinstance(ops.attention, _PagedAttention)
    kernel, striped = ops.attention.kernel, _striped(backend, ops.attention.kernel, platform=platform)
    attention = DividedAttention.of(kernel, partition, backend, striped=striped, deterministic=deterministic)
    return replace(ops, attention=attention, prepare=attention.prepare), reason


def _best(platform: str, partition: Partition, shapes: KernelShapes) -> tuple[str, str]:
    """What `auto` is, and why."""
    if platform != "cpu":
        return _BEST.get(platform, ("xla", f"the best for platform {platform!r}"))
    why_not = cpu.missing() or cpu.unsupported(*shapes)
    if partition.num_parts("pages") > 1 and not partition.owned_pages:
        why_not = "it needs all pages of a sequence, and they are striped over devices"
    if why_not is None:
        return "cpu", "the best for platform 'cpu'"
    return "xla", f"this CPU's own kernel is not for this engine: {why_not}"


def _check_cpu(platform: str, shapes: KernelShapes) -> None:
    """Raise a ValueError unless a CPU's own kernel can be used; else let XLA know it."""
    if platform != "cpu":
        raise ValueError(f"attention_backend='cpu' needs a CPU and this engine's platform is {platform!r}; use auto")
    if (why_not := cpu.missing() or cpu.unsupported(*shapes)) is not None:
        raise ValueError(f"attention_backend='cpu' is not for this engine: {why_not}; use attention_backend='xla'")
    cpu.register(jnp.dtype(shapes.dtype).name)


def dense_ops() -> Ops:
    """Operations without a cache, for training and for plain logits of whole documents; differentiable."""
    return Ops(dense_attention, "dense", MixtureOfExperts(ragged_experts, "ragged_dot", "differentiable"))


def _tpu_ops(backend: str, partition: Partition, experts: MixtureOfExperts, *, deterministic: bool) -> Ops:
    # Imported when chosen: it brings in the half of Pallas that only a TPU needs.
    from jax_engine.pallas_kernels import tpu

    target: dict[str, Any] = {"interpret": backend == "pallas_tpu_interpret"}
    if partition.mesh is not None and backend == "pallas_tpu":
        device = partition.mesh.devices.flat[0]  # which need not be one of this machine's
        target |= {"device_kind": device.device_kind, "num_cores": device.num_cores}

    def prepare(
        sequences: SequenceTable,
        cache: KVPages,
        *,
        windows: Sequence[int],
        num_heads: int,
        head_dim: int,
        dtype: jnp.dtype,
    ) -> SequenceTable:
        if deterministic and any(windows):
            # A range adds up its window's edges after what lies between them, a shorter one in the order of the tokens.
            raise ValueError(
                f"deterministic=True with attention_backend={backend!r} is for models without sliding windows, and "
                "this one has them; use attention_backend='xla'"
            )
        heads = num_heads // partition.num_parts("heads"), cache.num_heads // partition.num_parts("kv_heads")
        geometry = tpu.Geometry.of(*heads, head_dim, cache.page_size, cache.data.dtype, dtype)
        work = [
            tpu.step_work(*_tables(sequences.of_group(group)), geometry=geometry, window=window or None, **target)
            for group, window in enumerate(windows)
        ]
        return replace(sequences, work=jnp.stack(work))

    kernel = partial(tpu.ragged_paged_attention, **target)
    return Ops(_PagedAttention(kernel, partition), backend, experts, tpu.page_shape, prepare, partition)


def _gpu_ops(
    backend: str, partition: Partition, experts: MixtureOfExperts, *, platform: str, deterministic: bool
) -> Ops:
    # Imported when chosen, as for a TPU.
    from jax_engine.models.gpu_attention import GpuAttention, check_device

    check_device(backend, platform=platform, partition=partition)
    kernel = GpuAttention.of(backend, partition, deterministic=deterministic)
    return Ops(_PagedAttention(kernel, partition), backend, experts, kernel.page_shape, kernel.prepare, partition)


def _striped(backend: str, kernel: Kernel, *, platform: str) -> Striped | None:
    """What attends over a part of a sequence's pages; None where nothing of a backend does."""
    if backend == "xla":
        return partial(xla.striped_paged_attention, sizes=xla.sizes_for(platform))
    if not backend.startswith("pallas_gpu"):
        return None
    from jax_engine.models.gpu_attention import GpuAttention

    assert isinstance(kernel, GpuAttention)
    return kernel.striped


def _tables(sequences: SequenceTable) -> tuple[Array, ...]:
    """The tables in the order of the kernels' calling convention."""
    return (
        sequences.block_tables,
        sequences.query_starts,
        sequences.kv_lengths,
        sequences.num_decodes,
        sequences.token_sequences,
        sequences.positions,
    )


@dataclass(frozen=True)
class _PagedAttention:
    """An attention kernel behind the typed tables, on one device or on a mesh."""

    kernel: Kernel
    partition: Partition

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
        """Unwrap the typed tables into the kernels' plain arrays (see `pallas_kernels.reference` for their meaning)."""
        assert isinstance(cache, KVPages) and isinstance(sequences, SequenceTable)
        if queries.shape[1] % cache.num_heads:
            raise ValueError(f"query heads ({queries.shape[1]}) must be a multiple of kv heads ({cache.num_heads})")

        tables = _tables(sequences)
        given = {"work": sequences.work, "kv_scales": kv_scales}
        given = {name: value for name, value in given.items() if value is not None}
        options: dict[str, Any] = {} if cache.bits_of is None else {"bits_of": cache.bits_of}

        def attend(layer: int | Int[Array, ""], given: dict[str, Any], *arrays: Array) -> tuple[Array, Array]:
            return self.kernel(*arrays, layer=layer, scale=scale, window=window, **options, **given)

        if self.partition.mesh is not None:
            heads, kv_heads = self.partition.spec((None, "heads")), self.partition.spec((None, "kv_heads"))
            pages, spec_of = self.partition.spec(PAGE_AXES), {"kv_scales": self.partition.spec((None, "kv_heads"))}
            attend = jax.shard_map(
                attend,
                mesh=self.partition.current_mesh,
                axis_names=self.partition.free_axes,
                in_specs=(
                    P(),
                    {name: spec_of.get(name, P()) for name in given},
                    *(heads, kv_heads, kv_heads, pages),
                    *(P() for _ in tables),
                ),
                out_specs=(heads, pages),
                check_vma=False,  # kernels do not say which of their values differ between devices
            )
            layer = jnp.asarray(layer, jnp.int32)
        with jax.named_scope(ATTENTION_SCOPE):
            out, data = attend(layer, given, queries, keys, values, cache.data, *tables)
        return out, replace(cache, data=data)
