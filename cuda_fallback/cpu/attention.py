"""A CPU's own attention as an operation of JAX: a foreign function that Numba compiles from `kernel.py`.

One call a layer: it writes the step's keys and values into their pages, in place, and attends over them. What XLA makes
of the same on a CPU is a gather of pages, a select and small products for each of many trips of a loop.
"""

import hashlib
import importlib.util
import threading
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

DTYPES = ("float32", "bfloat16")
_COMPILING = threading.Lock()


def missing() -> str | None:
    """Why this machine cannot run it, if it cannot."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    return None


def unsupported(dtype: DTypeLike, page_dtype: DTypeLike, head_dim: int, page_size: int) -> str | None:
    """Why it cannot attend over pages like these, if it cannot; `dtype` is that of queries."""
    names = jnp.dtype(dtype).name, jnp.dtype(page_dtype).name
    if names[0] not in DTYPES or names[0] != names[1]:
        return f"it takes float32 and bfloat16, and pages of the same type, not {names[0]} with pages of {names[1]}"
    if head_dim % 8 or page_size % 8:
        return f"it takes head sizes and pages of multiples of 8, not {head_dim} and {page_size}"
    return None


def ragged_paged_attention(
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
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> tuple[Float[Array, "T N H"], Num[Array, "L P 2 K S H"]]:
    """Specified by `pallas_kernels.reference`, in float32; for what `unsupported` lets pass.

    A row's result depends on its query and its sequence's cache alone, bit for bit, and `num_decodes` is of no account.
    """
    results = jax.ShapeDtypeStruct(queries.shape, queries.dtype), jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    call = jax.ffi.ffi_call(register(queries.dtype.name), results, input_output_aliases={3: 1})
    out, pages = call(
        queries,
        keys,
        values,
        pages,
        block_tables,
        query_starts,
        kv_lengths,
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.zeros(0, jnp.float32) if sinks is None else sinks.astype(jnp.float32),
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap or 0),
        window=np.int32(window or 0),
    )
    return out, pages


@cache
def register(dtype: str) -> str:
    """The name under which XLA knows the function for queries of a type; programs with it in them need that.

    The first time on a machine, Numba compiles it; the result is kept beside XLA's executables, where those are kept.
    """
    name = f"jax_engine_attention_{dtype}"
    with _COMPILING:
        # Imported when needed: it brings in Numba.
        from jax_engine.cuda_fallback.cpu.compiling import compile_handler

        handler = compile_handler(dtype, _cache_folder())
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.ctypes), platform="cpu", api_version=1)
    return name


def _cache_folder() -> Path | None:
    """Where Numba keeps what it compiled of this source; None: nowhere."""
    folder = jax.config.values.get("jax_compilation_cache_dir")
    if not folder:
        return None
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    return Path(folder) / f"numba-{digest.hexdigest()[:16]}"
