"""Attention kernels: each against the float32 specification on fresh random data, and each against the ceilings."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from gpu_ahead import Ahead
from gpu_cases import FP8, Ranges, Shape, attention_case, options_of
from gpu_jobs import Report, Skipped
from gpu_timing import Ceilings, Chain, compiled, compiled_as_steps, time_calls
from jax_engine.cuda_fallback import paged_attention as xla
from jax_engine.cuda_fallback.whole_prompts import check_cudnn, check_cudnn_allowed
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.ops import select_ops
from jax_engine.models.partition import ONE_DEVICE
from jax_engine.pallas_kernels import reference

# Of results in a type: (norm of the difference over the norm of the specification's, largest difference over its
# largest number). XLA may round float32 factors to TF32 on a GPU.
TOLERANCES = {"bfloat16": (1e-2, 3e-2), "float16": (2e-3, 1e-2), "float32": (1e-3, 5e-3)}
LLAMA_8B, QWEN_06B, LLAMA_1B = Shape(), Shape(num_heads=16), Shape(head_dim=64)
LEAST_BYTES = 2**30  # that a timed program reads, so that no cache holds them
MAX_LAYERS = 64

Attention = Callable[..., tuple[Array, Array]]


@dataclass(frozen=True)
class Kernel:
    """An implementation by the calling convention of `pallas_kernels.reference`."""

    backend: str  # as `attention_backend` names it
    load: Callable[[], Attention]  # imports it
    why_not: Callable[[Shape], str | None]  # why it does not do a shape; None if it does


def _load_xla() -> Attention:
    return partial(xla.ragged_paged_attention, sizes=xla.sizes_for(jax.default_backend()))


def _load_cudnn() -> Attention:
    return partial(xla.ragged_paged_attention, sizes=xla.GPU_SIZES, whole_prompts="cudnn")


def _why_not_cudnn(shape: Shape) -> str | None:
    types = jnp.dtype(shape.dtype), jnp.dtype(shape.stored_dtype)
    try:
        check_cudnn_allowed(jax.default_backend(), deterministic=False)
        check_cudnn(shape.head_dim, *types, soft_cap=shape.soft_cap, has_sinks=shape.with_sinks)
    except ValueError as error:
        return str(error)
    return None


def _load_pallas(backend: str) -> Attention:
    # Imported when chosen: a version of JAX whose Mosaic GPU is another costs this kernel alone.
    from jax_engine.models.gpu_attention import GpuAttention

    return GpuAttention.of(backend, ONE_DEVICE)


def _why_not_pallas(backend: str, shape: Shape) -> str | None:
    from jax_engine.models.gpu_attention import check_device
    from jax_engine.pallas_kernels import gpu

    try:
        check_device(backend, platform=jax.default_backend(), partition=ONE_DEVICE)
    except ValueError as error:
        return str(error)
    heads: dict[str, Any] = {
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
    }
    types: dict[str, Any] = {"dtype": shape.dtype, "stored": shape.stored_dtype}
    return gpu.why_not_pages(page_size=shape.page_size, head_dim=shape.head_dim) or gpu.why_not(**heads, **types)


def _pallas(backend: str) -> Kernel:
    return Kernel(backend, partial(_load_pallas, backend), partial(_why_not_pallas, backend))


KERNELS = {
    "pallas_gpu": _pallas("pallas_gpu"),
    "pallas_gpu_interpret": _pallas("pallas_gpu_interpret"),
    "cudnn": Kernel("cudnn", _load_cudnn, _why_not_cudnn),
    "xla": Kernel("xla", _load_xla, lambda _: None),
}


def backends(platform: str) -> list[str]:
    """What is checked and timed on a platform unless asked otherwise, the one made for it first."""
    return ["pallas_gpu", "xla"] if platform == "gpu" else ["xla"]


def measure(
    report: Report,
    *,
    backend: str,
    sections: Sequence[str],
    seed: int,
    tiny: bool,
    ceilings: Mapping[str, float | None],
) -> None:
    """The job: a backend's checks, then its timings."""
    if "checks" in sections:
        check_all(report, backend, seed=seed, tiny=tiny)
    if "kernels" in sections:
        time_all(report, backend, seed=seed, tiny=tiny, ceilings=Ceilings.of(ceilings))


def checked_shapes(*, tiny: bool) -> list[Shape]:
    """Each kind of what kernels differ by, one at a time."""
    if tiny:
        return [Shape(4, 2, 64, 16, window=24, stored=FP8)]
    kinds: list[dict[str, Any]] = [
        {},
        {"head_dim": 64},
        {"head_dim": 256, "num_heads": 8, "num_kv_heads": 4},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"page_size": 16},
        {"page_size": 128},
        {"num_heads": 16, "num_kv_heads": 16},
        {"window": 100},
        {"soft_cap": 30.0},
        {"with_sinks": True},
        {"stored": FP8},
    ]
    return [Shape(**kind) for kind in kinds]


def checked_ranges(*, tiny: bool) -> dict[str, Ranges]:
    """Decodes alone, prompts alone, and a step with all kinds of ranges."""
    if tiny:
        return {"mixed": [(1, 70), (1, 3), (1, 0), (9, 30), (20, 0)]}
    return {
        "decode": [(1, count) for count in (0, 1, 63, 64, 500, 1023, 2048, 4095)],
        "prefill": [(200, 0), (64, 0), (3, 0), (130, 0)],
        "mixed": [*((1, 37 * count) for count in range(16)), (1, 1500), (100, 300), (17, 0), (2, 640), (128, 0)],
    }


@dataclass(frozen=True)
class Check:
    """A case with what runs it, compiled."""

    case: dict[str, Array]
    run: Callable[..., tuple[Array, Array]]
    specified: Callable[..., tuple[Array, Array]]


def check_all(report: Report, backend: str, *, seed: int, tiny: bool) -> None:
    """Every shape on a mixed step; the first two of them on decodes and on prompts alone as well."""
    kernel, makers, shapes = KERNELS[backend], {}, {}
    for number, shape in enumerate(checked_shapes(tiny=tiny)):
        for kind, ranges in checked_ranges(tiny=tiny).items():
            name = f"{backend}, {kind}, {shape}"
            if (kind == "mixed" or number < 2) and report.wants(name):
                makers[name] = partial(prepare_check, kernel, ranges, shape, seed=seed + number)
                shapes[name] = shape
    with Ahead(makers, one_by_one=report.is_resumed) as ahead:
        for name, shape in shapes.items():
            with report.case(name, section="checks"):
                check(report, name, ahead.take(name), shape)


def prepare_check(kernel: Kernel, ranges: Ranges, shape: Shape, *, seed: int) -> Check:
    """Data and programs of a case; nothing of the kernel runs.

    Raises:
        Skipped: the kernel does not do the shape.
    """
    if reason := kernel.why_not(shape):
        raise Skipped(reason)
    case = attention_case(ranges, shape, seed=seed, num_layers=2, padding=5)
    options = options_of(shape, seed=seed)
    run = compiled_as_steps(partial(kernel.load(), layer=1, **options))
    specified = jax.jit(partial(reference.ragged_paged_attention, layer=1, **options))
    wide = case | {"queries": case["queries"].astype(jnp.float32)}
    return Check(case, compiled(run, **case), compiled(specified, **wide))


def check(report: Report, name: str, given: Check, shape: Shape) -> None:
    """One case: results, padding rows and the pages with what was written to them."""
    case = given.case
    real = int(case["query_starts"][-1])
    out, pages = jax.block_until_ready(given.run(**case))
    expected, expected_pages = given.specified(**case | {"queries": case["queries"].astype(jnp.float32)})
    found, wanted = (np.asarray(array, np.float32)[:real] for array in (out, expected))
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    worst = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    norm_limit, worst_limit = TOLERANCES[shape.dtype]
    problems = []
    if not (error <= norm_limit and worst <= worst_limit):  # NaN is no pass
        problems.append("wrong results")
    if np.asarray(out, np.float32)[real:].any():
        problems.append("padding rows are not zero")
    if different := int(jnp.sum(~same(pages, expected_pages))):
        problems.append(f"{different} numbers of the cache differ")
    limits = f"limits {norm_limit:g} and {worst_limit:g}"
    report.add(
        name,
        section="checks",
        status="failed" if problems else "passed",
        value=error,
        unit="of the norm",
        note=f"{'; '.join(problems)}; largest {worst:.2g}, {limits}" if problems else f"largest {worst:.2g}, {limits}",
        figures={"norm_error": error, "largest_error": worst},
    )


@jax.jit
def same(pages: Array, others: Array) -> Array:
    """Where two caches hold the same, NaN included."""
    one, other = pages.astype(jnp.float32), others.astype(jnp.float32)
    return (one == other) | (jnp.isnan(one) & jnp.isnan(other))


@dataclass(frozen=True)
class Load:
    """A step to time."""

    name: str
    shape: Shape
    ranges: Ranges
    num_layers: int

    @property
    def num_bytes(self) -> int:
        """That attention must move at least: keys and values read once, queries read and results written."""
        rows = sum(new for new, _ in self.ranges)
        ends = 2 * rows * self.shape.num_heads * self.shape.head_dim * jnp.dtype(self.shape.dtype).itemsize
        return self.num_layers * (sum(new + old for new, old in self.ranges) * self.shape.token_bytes + ends)

    @property
    def flops(self) -> float:
        """Of two products with every position that a token sees."""
        pairs = sum(new * old + new * (new + 1) / 2 for new, old in self.ranges)
        return self.num_layers * 4 * self.shape.num_heads * self.shape.head_dim * pairs


def loads(*, tiny: bool) -> Iterator[Load]:
    """Steps of the models' shapes; as many layers as no cache holds, each with keys and values of its own."""
    if tiny:
        shape = Shape(num_heads=4, num_kv_heads=2, head_dim=64, page_size=16)
        yield Load("mixed, 2 decodes at 64 and 32 of a prompt", shape, [(1, 63), (1, 63), (32, 0)], 2)
        return
    for name, shape in (("Llama-3-8B", LLAMA_8B), ("Qwen3-0.6B", QWEN_06B), ("Llama-3.2-1B", LLAMA_1B)):
        for count, context in ((64, 4096), (1, 4096), (256, 256), (1, 32768)):
            if name != "Llama-3-8B" and (count, context) != (64, 4096):
                continue
            layers = math.ceil(LEAST_BYTES / (count * context * shape.token_bytes))
            yield Load(
                f"decode, {count} x {context} tokens, {name}",
                shape,
                [(1, context - 1)] * count,
                min(MAX_LAYERS, max(2, layers)),
            )
        prompts: dict[str, Ranges] = {
            "prefill, 1 x 4096 tokens": [(4096, 0)],
            "prefill, 8 x 512 tokens": [(512, 0)] * 8,
            "chunk of 2048 after 6144 tokens": [(2048, 6144)],
            "mixed, 192 decodes at 1024 and 1856 of a prompt": [*[(1, 1023)] * 192, (1856, 0)],
        }
        for kind, ranges in prompts.items():
            if name == "Llama-3-8B" or kind == "prefill, 1 x 4096 tokens":
                yield Load(f"{kind}, {name}", shape, ranges, 2)


def time_all(report: Report, backend: str, *, seed: int, tiny: bool, ceilings: Ceilings) -> None:
    """Every load, as a step of the engine runs it: a work list once, then layer after layer."""
    if backend.endswith("interpret"):
        report.add(backend, section="kernels", status="skipped", note="what is interpreted is not timed")
        return
    wanted = {name: load for load in loads(tiny=tiny) if report.wants(name := f"{backend}, {load.name}")}
    makers = {name: partial(prepare_timing, load, backend) for name, load in wanted.items()}
    with Ahead(makers, one_by_one=report.is_resumed) as ahead:
        with report.case(name := f"{backend}, programs", section="kernels"):
            begin = time.perf_counter()
            count = ahead.wait()  # compiling must not take the host's time from what is timed
            report.add(name, section="kernels", value=time.perf_counter() - begin, unit=f"s to compile {count}")
        for name, load in wanted.items():
            with report.case(name, section="kernels"):
                time_load(report, name, load, ahead.take(name), seed=seed, ceilings=ceilings)


def prepare_timing(load: Load, backend: str) -> Callable[..., Array]:
    """The program of a load, compiled; it takes over the pages.

    Raises:
        Skipped: the kernel does not do the shape.
    """
    if reason := KERNELS[backend].why_not(load.shape):
        raise Skipped(reason)
    make = partial(attention_case, load.ranges, load.shape, seed=0, num_layers=load.num_layers, poisoned=False)
    run = compiled_as_steps(partial(step, load=load, backend=backend), donate_argnames="pages")
    return compiled(run, **jax.eval_shape(make))


def time_load(
    report: Report, name: str, load: Load, run: Callable[..., Array], *, seed: int, ceilings: Ceilings
) -> None:
    case = attention_case(load.ranges, load.shape, seed=seed, num_layers=load.num_layers, poisoned=False)
    others = {key: value for key, value in case.items() if key != "pages"}
    timing = time_calls(Chain(partial(again, run, others), case.pop("pages")))
    seconds = timing.seconds
    report.add(
        name,
        section="kernels",
        value=1e6 * seconds / load.num_layers,
        unit="us a layer",
        **ceilings.shares(seconds, num_bytes=load.num_bytes, flops=load.flops),
        figures={
            **timing.figures,
            "layers": load.num_layers,
            "bytes_per_second": load.num_bytes / seconds,
            "flops_per_second": load.flops / seconds,
        },
    )


def again(run: Callable[..., Array], others: Mapping[str, Array], pages: Array) -> Array:
    """A step over pages that another step has left."""
    return run(pages=pages, **others)


def step(
    queries: Array,
    keys: Array,
    values: Array,
    pages: Array,
    *,
    block_tables: Array,
    load: Load,
    backend: str,
    **tables: Any,
) -> Array:
    """Attention of every layer, each with the results of the one before as its queries; returns the pages."""
    ops, _ = select_ops(backend, platform=jax.default_backend())
    shape, cache = load.shape, KVPages(pages)
    sequences = ops.prepare(
        SequenceTable(block_tables=block_tables[None], **tables),
        cache,
        windows=(shape.window or 0,),
        num_heads=shape.num_heads,
        head_dim=shape.head_dim,
        dtype=jnp.dtype(shape.dtype),
    ).of_group(0)

    def attend(layer: Array, carry: tuple[Array, KVPages]) -> tuple[Array, KVPages]:
        queries, cache = carry
        options: dict[str, Any] = {"layer": layer, "scale": shape.head_dim**-0.5, "window": shape.window}
        out, written = ops.attention(queries, keys, values, cache, sequences, **options)
        assert written is not None
        return out, written

    # A loop: compiled one after the other, dozens of layers would take longer than the case may.
    queries, cache = lax.fori_loop(0, load.num_layers, attend, (queries, cache))
    # What the last layer made is used, too: no part of it may be left out.
    return cache.data.at[0, 0, 0, 0, 0, 0].add((0 * queries[0, 0, 0]).astype(cache.data.dtype))
