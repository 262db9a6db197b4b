"""The GPU kernel, interpreted, over pages that devices divide; for the processes of `test_gpu_attention.py`."""

import jax
import jax.numpy as jnp
from test_divided_pages import divided, table_of
from test_gpu_attention import LAYER, SCALE, case_of

from jax_engine.cuda_fallback.paged_attention import Stripe
from jax_engine.models.device_tables import owned_tables, put_rows, striped_tables, take_rows
from jax_engine.models.gpu_attention import GpuAttention
from jax_engine.models.partition import ONE_DEVICE
from jax_engine.pallas_kernels import reference

DIVIDED = [(1, 5), (1, 140), (9, 92), (20, 30), (1, 16)]


def error_of_owned_pages() -> float:
    """Of attention whose sequences' pages are on one of two devices each, each device's results put together."""
    case = case_of(DIVIDED, num_tokens=34, num_sequences=6, num_pages=40)
    expected, _ = reference.ragged_paged_attention(**case, layer=LAYER, scale=SCALE)
    moved = divided(case, 2, lambda row, _: row % 2)
    kernel, found = GpuAttention.of("pallas_gpu_interpret", ONE_DEVICE), []
    for rank in range(2):
        tables = owned_tables(table_of(moved), rank, num_pages=20, page_size=16)
        rows = [take_rows(case[name], tables) for name in ("queries", "keys", "values")]
        own = moved["pages"][:, 20 * rank : 20 * (rank + 1)]
        attend = jax.jit(lambda *given: kernel(*given, layer=LAYER, scale=SCALE)[0])
        found.append(put_rows(attend(*rows, own, *tables.convention), tables))
    return float(jnp.abs(sum(found) - expected).max())


def error_of_stripes() -> float:
    """Of what three devices' parts of each row's softmax, over a stripe of the pages each, are together."""
    case = case_of(DIVIDED, num_tokens=34, num_sequences=6, num_pages=60)
    expected, _ = reference.ragged_paged_attention(**case, layer=LAYER, scale=SCALE, window=100)
    moved = divided(case, 3, lambda _, index: index % 3)
    kernel, parts = GpuAttention.of("pallas_gpu_interpret", ONE_DEVICE), []
    for rank in range(3):
        tables = striped_tables(table_of(moved), rank, num_devices=3, num_pages=20)
        own = moved["pages"][:, 20 * rank : 20 * (rank + 1)]
        options = {"layer": LAYER, "scale": SCALE, "window": 100, "stripe": Stripe(rank, 3)}
        attend = jax.jit(lambda *given, options=options: kernel.striped(*given, **options)[0])
        parts.append(attend(*[case[name] for name in ("queries", "keys", "values")], own, *tables.convention))
    values, maxima, totals = (jnp.stack(column) for column in zip(*parts, strict=True))
    weights = jnp.exp(maxima - maxima.max(axis=0))
    out = (values * weights[..., None]).sum(axis=0) / jnp.maximum((totals * weights).sum(axis=0), 1e-30)[..., None]
    return float(jnp.abs(out - expected).max())
