"""Block sizes are searched among those that can run, and kept where the kernel finds them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from jax_engine.pallas_kernels import tpu
from tpu_tune import Bench, Load, variants, write


@pytest.fixture
def bench() -> Bench:
    geometry = tpu.Geometry(2, 2, 128, 64, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.bfloat16))
    decode, prefill = Load(2, 1, 200), Load(1, 40, 100)
    return Bench(geometry, "TPU v6 lite", decode, prefill, calls=1, repeats=1, interpret=True)


def test_tuning_times_a_kernel(bench: Bench) -> None:
    blocks = tpu.Blocks(block=256, chunk=256, tail=128, query=16, prefill_chunk=128, strip=64)
    assert bench.seconds(bench.decode, blocks) > 0


@pytest.mark.parametrize("name", ["block", "chunk", "tail", "query", "prefill_chunk"])
def test_tuning_only_tries_sizes_that_can_run(bench: Bench, name: str) -> None:
    first = tpu.block_sizes(bench.geometry, bench.device_kind)
    tried = list(variants(first, name, replace(bench, interpret=False)))
    assert tried[0] == first
    assert len(set(tried)) == len(tried) > 1
    for blocks in tried:
        assert blocks.block % blocks.chunk == blocks.chunk % blocks.tail == blocks.block % blocks.prefill_chunk == 0
        assert blocks.tail % bench.geometry.page_size == 0


def test_tuned_sizes_are_kept_by_chip_and_heads(bench: Bench, tmp_path: Path) -> None:
    table = tmp_path / "sizes.json"
    table.write_text('{"chips": {}, "tuned": {}}')
    best = tpu.block_sizes(bench.geometry, bench.device_kind)
    write(table, bench, best)
    assert json.loads(table.read_text())["tuned"] == {"TPU v6 lite": {"bfloat16-2-2-128-64": asdict(best)}}
