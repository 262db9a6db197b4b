"""Ragged paged attention on NVIDIA GPUs of the Hopper generation (Mosaic GPU): decode, prefill and mixed steps in one
launch a layer, over pages that hold the step's own keys and values already.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_engine.pallas_kernels.gpu.kernel import LOG2_E, LOWEST, NUM_GROUPS, Call, attend_items
from jax_engine.pallas_kernels.gpu.work_list import (
    CHUNK,
    GROUP_ROWS,
    ROWS,
    Stripe,
    Work,
    WorkShape,
    build_work,
    rows_a_token,
)

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
DTYPES = ("bfloat16", "float16")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)
SHARED_BYTES = 227 * 1024  # that a block may have


def why_not_pages(*, page_size: int, head_dim: int) -> str | None:
    """Why the kernel does not do pages of this shape, in one clause; None if it does."""
    if head_dim not in HEAD_DIMS:
        return f"its head sizes are {', '.join(map(str, HEAD_DIMS))}, and here it is {head_dim}"
    if page_size not in PAGE_SIZES:
        return f"its page sizes (block_size) are {', '.join(map(str, PAGE_SIZES))}, and here it is {page_size}"
    return None


def why_not(
    *, num_heads: int, num_kv_heads: int, head_dim: int, dtype: str, stored: str, deterministic: bool = False
) -> str | None:
    """Why the kernel does not do attention of this shape, in one clause; None if it does. Heads are those of one
    device; `dtype` is the queries', `stored` the pages'.
    """
    if dtype not in DTYPES or stored not in (dtype, *EIGHT_BITS):
        return (
            f"its queries are {' or '.join(DTYPES)} and its pages like them or {' or '.join(EIGHT_BITS)}, and here "
            f"they are {dtype} and {stored}"
        )
    if stored in EIGHT_BITS and head_dim > 128:
        return f"it has too few registers for pages of 8 bits with head sizes over 128, and here it is {head_dim}"
    most = GROUP_ROWS if deterministic else ROWS
    if num_heads // num_kv_heads > most:
        how = " with deterministic=True" if deterministic else ""
        return f"it has room for {most} query heads a key and value head{how}, and here are {num_heads // num_kv_heads}"
    return None


def interpreter(*, detect_races: bool = False) -> Any:
    """What makes `attend` run on a CPU, slowly, with copies and barriers as on the chip."""
    # Not public in JAX yet; for tests only.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    # Queries are fetched in whole tiles, past the last row too.
    return InterpretGPUParams(detect_races=detect_races, out_of_bounds_reads="uninitialized")


def step_work(
    query_starts: Int[Array, " boundaries"],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    num_heads: int,
    num_kv_heads: int,
    window: int | None = None,
    multiprocessors: int = MULTIPROCESSORS,
    fixed_tokens: int | None = None,
    stripe: Stripe | None = None,
) -> Work:
    """What a step has to do, the same in all its layers of one window; with a `stripe`, over the pages of that alone.

    With `fixed_tokens`, the room of a block table, a row's result does not depend, bit for bit, on the other rows of
    its step.
    """
    sizes = token_sequences.shape[0], query_starts.shape[0] - 1, num_heads, num_kv_heads, multiprocessors, fixed_tokens
    return build_work(
        query_starts, token_sequences, positions, shape=WorkShape.of(*sizes), window=window, stripe=stripe
    )


def attend(
    queries: Float[Array, "T N H"],
    pages: Float[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    work: Work,
    *,
    layer: int | Int[Array, ""],
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    stages: int | None = None,
    multiprocessors: int = MULTIPROCESSORS,
    deterministic: bool = False,
    interpret: Any = None,
) -> Float[Array, "T N H"]:
    """The attention of `pallas_kernels.reference.ragged_paged_attention`, after its write of keys and values.

    `work` is of `step_work`, with the same window and the same number of multiprocessors, and with `fixed_tokens` if
    `deterministic`. `stages` chunks of keys and values are in shared memory at a time (None: as many as fit, four at
    most).

    Raises:
        ValueError: the cache has more rows than a bulk tensor copy can name.
    """
    num_kv_heads, page_size = pages.shape[3:5]
    if kv_scales is not None:
        queries = _scaled(queries, kv_scales[0])
    fixed_tokens = block_tables.shape[1] * page_size if deterministic else None
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "interpret": interpret}
    options |= {"stages": stages, "multiprocessors": multiprocessors, "fixed_tokens": fixed_tokens}
    values, highest, total = _sums(queries, pages, block_tables, work, (layer, 0), **options)
    if sinks is not None:
        total += jnp.exp2(sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1) * LOG2_E - highest)
    out = (values / jnp.maximum(total, 1e-30)[..., None]).astype(queries.dtype).reshape(queries.shape)
    return out if kv_scales is None else _scaled(out, kv_scales[1])


def attend_stripe(
    queries: Float[Array, "T N H"],
    pages: Float[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    work: Work,
    stripe: Stripe,
    *,
    layer: int | Int[Array, ""],
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    kv_scales: Float[Array, "2 K"] | None = None,
    multiprocessors: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> tuple[Float[Array, "T N H"], Float[Array, "T N"], Float[Array, "T N"]]:
    """Attention over a stripe of every sequence's pages, whose numbers `block_tables` hold side by side, in float32:
    of softmax weights `exp(score - maximum)`, the sum of the values times them, the maximum, and the weights' own sum.

    The maximum is that of the logarithms of what the row's parts add up to, no score. `work` is of `step_work` with
    this stripe. A row that sees nothing here has a maximum of -1e30, and zeros.
    """
    num_tokens, num_heads, _ = queries.shape
    if kv_scales is not None:
        queries = _scaled(queries, kv_scales[0])
    options: dict[str, Any] = {"scale": scale, "window": window, "soft_cap": soft_cap, "interpret": interpret}
    options |= {"multiprocessors": multiprocessors, "num_stripes": stripe.num}
    values, highest, total = _sums(queries, pages, block_tables, work, (layer, stripe.rank), **options)
    sees = highest > LOWEST
    maximum, total = jnp.where(sees, highest / LOG2_E, -1e30), jnp.where(sees, total, 0)
    values = values.reshape(queries.shape)
    values = values if kv_scales is None else _scaled(values, kv_scales[1])
    return values, maximum.reshape(num_tokens, num_heads), total.reshape(num_tokens, num_heads)


def _sums(
    queries: Float[Array, "T N H"],
    pages: Float[Array, "L P 2 K S H"],
    block_tables: Int[Array, "B M"],
    work: Work,
    place: tuple[int | Int[Array, ""], int | Int[Array, ""]],
    *,
    multiprocessors: int,
    stages: int | None = None,
    fixed_tokens: int | None = None,
    **options: Any,
) -> tuple[Float[Array, "T K G H"], Float[Array, "T K G"], Float[Array, "T K G"]]:
    """Of softmax weights to the base 2: the values times them, the highest exponent, and their own sum. `place` is the
    layer and the stripe of the pages that are here.
    """
    num_tokens, num_heads, head_dim = queries.shape
    num_pages, _, num_kv_heads, page_size, _ = pages.shape[1:]
    _check_rows(pages)
    sizes = num_tokens, block_tables.shape[0], num_heads, num_kv_heads, multiprocessors, fixed_tokens
    shape = WorkShape.of(*sizes)
    call = Call(
        num_tokens=-(-num_tokens // shape.aligned_tokens) * shape.aligned_tokens,
        num_kv_heads=num_kv_heads,
        rows_a_token=rows_a_token(num_heads // num_kv_heads),
        head_dim=head_dim,
        page_size=page_size,
        num_pages=num_pages,
        num_items=work.items.shape[0],
        dtype=queries.dtype,
        stored=pages.dtype,
        stages=stages or num_stages(head_dim, pages.dtype.itemsize),
        num_programs=multiprocessors,
        **options,
    )
    rows = _rows_by_head(queries, call)
    here = jnp.stack([jnp.asarray(number, jnp.int32) for number in place])
    inputs = rows, pages.reshape(-1, head_dim), block_tables, work.items, work.num_items, here
    tiles, sums = attend_items(*inputs, call)
    return _merge(tiles, sums, work, num_kv_heads, num_heads // num_kv_heads, shape.max_parts)


def _rows_by_head(queries: Float[Array, "T N H"], call: Call) -> Float[Array, "R H"]:
    """The query rows of one kv head after the other, with zeros where the kernel reads further."""
    num_tokens, num_heads, head_dim = queries.shape
    by_head = queries.reshape(num_tokens, call.num_kv_heads, -1, head_dim).swapaxes(0, 1)
    heads_a_group = num_heads // call.num_kv_heads
    padding = (0, 0), (0, call.num_tokens - num_tokens), (0, call.rows_a_token - heads_a_group), (0, 0)
    rows = jnp.pad(by_head, padding).reshape(-1, head_dim)
    return jnp.pad(rows, ((0, ROWS), (0, 0)))  # a tile may reach past the last row


def _check_rows(pages: Float[Array, "L P 2 K S H"]) -> None:
    num_rows = pages.size // pages.shape[-1]
    if num_rows >= 2**31:
        raise ValueError(
            f"pages of shape {pages.shape} have {num_rows} rows of {pages.shape[-1]}, and the GPU kernel can name "
            f"{2**31 - 1}; lower kv_cache_memory_bytes"
        )


def _scaled(rows: Float[Array, "T N H"], scales: Float[Array, " K"]) -> Float[Array, "T N H"]:
    """Each query head's rows times the scale of its kv head."""
    by_head = jnp.repeat(scales, rows.shape[1] // scales.shape[0])[:, None]
    return (rows.astype(jnp.float32) * by_head).astype(rows.dtype)


def num_stages(head_dim: int, stored_bytes: int) -> int:
    """Chunks of keys and values that fit beside the rest in shared memory, four at most."""
    left = SHARED_BYTES - shared_bytes(head_dim, stored_bytes, stages=0) - 4096  # alignment, sums and barriers
    return min(4, left // (2 * CHUNK * head_dim * stored_bytes))


def shared_bytes(head_dim: int, stored_bytes: int, *, stages: int) -> int:
    """Of shared memory, that two warpgroups' tiles, what they widen of 8 bits, and the ring of chunks take."""
    tiles = (ROWS + (NUM_GROUPS * CHUNK if stored_bytes == 1 else 0)) * 2 * head_dim
    return tiles + stages * 2 * CHUNK * head_dim * stored_bytes


def _merge(
    tiles: Float[Array, "items R H"],
    sums: Float[Array, "items R"],
    work: Work,
    num_kv_heads: int,
    heads_a_group: int,
    max_parts: int,
) -> tuple[Float[Array, "T K G H"], Float[Array, "T K G"], Float[Array, "T K G"]]:
    """Each token row's parts: their results, weighted by their sums over the highest of these, that, and the weights'
    own sum. Zeros in padding rows, but for `LOWEST`.

    A part of a narrow tile has two results, of a warpgroup each.
    """
    head = jnp.arange(num_kv_heads)[None, :, None]
    rows_each = rows_a_token(heads_a_group)
    rows = (work.places[:, None] * rows_each + jnp.arange(heads_a_group))[:, None, :]  # [T, 1, G]
    is_narrow = work.num_tokens * rows_each <= GROUP_ROWS

    def results(part: int) -> tuple[Array, Array, Array]:
        """The tiles that have a part's results, the rows within them, and whose there are."""
        number, of_second = divmod(part, NUM_GROUPS)
        own = work.first_items + jnp.minimum(number, jnp.maximum(work.num_parts - 1, 0))
        there = (number < work.num_parts) & (is_narrow if of_second else True)
        return own[:, None, None] * num_kv_heads + head, (rows + of_second * GROUP_ROWS) % ROWS, there[:, None, None]

    parts = [results(part) for part in range(NUM_GROUPS * max_parts)]
    found = [jnp.where(there, _taken(sums, tile, row), -jnp.inf) for tile, row, there in parts]
    highest = jnp.maximum(jnp.max(jnp.stack(found), axis=0), LOWEST)
    weights = [jnp.exp2(one - highest) for one in found]
    values = jnp.zeros((*highest.shape, tiles.shape[-1]), jnp.float32)
    for (tile, row, there), weight in zip(parts, weights, strict=True):
        # Where there is no such part, there is garbage.
        values += jnp.where(there[..., None], weight[..., None] * _taken(tiles, tile, row).astype(jnp.float32), 0)
    return values, highest, sum(weights, start=jnp.zeros_like(highest))


def _taken(array: Array, tile: Int[Array, "T K 1"], row: Int[Array, "T 1 G"]) -> Array:
    return array.at[tile, row].get(mode="promise_in_bounds")
