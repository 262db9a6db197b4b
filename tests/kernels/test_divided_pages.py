"""Attention whose pages lie on several devices gives what it gives on one. Devices are a mapped axis here."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.cuda_fallback import paged_attention as xla
from jax_engine.models.device_tables import merge_partial, owned_tables, put_rows, striped_tables, take_rows
from jax_engine.models.kv_pages import SequenceTable
from jax_engine.pallas_kernels import reference

RANGES = {
    "decodes": [(1, n) for n in (0, 3, 15, 16, 17, 40, 64, 130, 31, 32, 7, 8, 90, 1, 2, 48, 55, 100, 5)],
    "mixed": [(1, 33), (64, 0), (1, 5), (5, 130), (17, 16)],
    "a prompt": [(200, 64)],
    "nothing": [],
}
SIZES = {"num_tokens": 270, "num_sequences": 20, "num_pages": 240, "max_pages": 21}


def divided(case, count, partition_of):
    """The case with its pages moved to where `partition_of(sequence, index)` wants them."""
    tables, pages = np.asarray(case["block_tables"]), np.asarray(case["pages"])
    size = pages.shape[1] // count
    free = [list(range(number * size, (number + 1) * size)) for number in range(count)]
    moved, moved_tables = np.full_like(pages, np.nan), np.full_like(tables, 10**6)
    for row, kv_length in enumerate(case["kv_lengths"]):
        for index in range(-(-int(kv_length) // pages.shape[4])):
            moved_tables[row, index] = free[partition_of(row, index)].pop()
            moved[:, moved_tables[row, index]] = pages[:, tables[row, index]]
    return dict(case, pages=jnp.asarray(moved), block_tables=jnp.asarray(moved_tables))


def table_of(case):
    fields = (case[name] for name in ("block_tables", "query_starts", "kv_lengths", "num_decodes"))
    return SequenceTable.build(*fields, num_tokens=case["queries"].shape[0])


ITEMS = xla.Sizes(xla.Tiles(3, 8), xla.Tiles(3, 2), chunk_tokens=32, decode_rows=None)  # the way of a GPU


def stripe_of(case, rank, pages, *, count, window, sizes=xla.CPU_SIZES):
    """One device's part in attention over striped pages, merged."""
    tables = striped_tables(table_of(case), rank, num_devices=count, num_pages=pages.shape[1])
    rows = (case[name] for name in ("queries", "keys", "values"))
    stripe = xla.Stripe(rank, count)
    part, pages = xla.striped_paged_attention(
        *rows, pages, *tables.convention, layer=1, scale=0.3, stripe=stripe, window=window, sizes=sizes
    )
    return merge_partial(part, "data"), pages


STRIPE_BY_ITEMS = partial(stripe_of, sizes=ITEMS)


def own_of(case, rank, pages, *, count, window):
    """One device's part in attention over pages that sequences own, with that of the others."""
    tables = owned_tables(table_of(case), rank, num_pages=pages.shape[1], page_size=pages.shape[4])
    rows = (take_rows(case[name], tables) for name in ("queries", "keys", "values"))
    out, pages = xla.ragged_paged_attention(*rows, pages, *tables.convention, layer=1, scale=0.3, window=window)
    return jax.lax.psum(put_rows(out, tables), "data"), pages


@lru_cache
def compiled(attend, count, window):
    attend = partial(attend, count=count, window=window)
    return jax.jit(jax.vmap(attend, in_axes=(None, 0, 0), axis_name="data"))


@lru_cache
def specification(window):
    return jax.jit(partial(reference.ragged_paged_attention, layer=1, scale=0.3, window=window))


@pytest.mark.parametrize(("count", "window"), [(2, 24), (4, None)])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("attend", [stripe_of, STRIPE_BY_ITEMS, own_of], ids=["stripes", "stripes by items", "own"])
def test_divided_pages_give_what_they_give_together(ragged_case, attend, ranges, count, window):
    """Partial softmaxes merged, and owners' results put together: the same on every device; entries of block tables
    that are to be ignored are out of range, pages that nobody holds are NaN.
    """
    of_owner, of_stripe = lambda row, index: row * 7 // 3 % count, lambda row, index: index % count
    case = divided(ragged_case(ranges, seed=0, **SIZES), count, of_owner if attend is own_of else of_stripe)
    pages = case["pages"]
    own = pages.reshape(pages.shape[0], count, -1, *pages.shape[2:]).swapaxes(0, 1)
    out, own = compiled(attend, count, window)(case, jnp.arange(count), own)
    tables = jnp.where(case["block_tables"] < pages.shape[1], case["block_tables"], 0)
    expected, expected_pages = specification(window)(**dict(case, block_tables=tables))
    for of_device in out:
        np.testing.assert_allclose(of_device, expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(own.swapaxes(0, 1).reshape(pages.shape), expected_pages)
