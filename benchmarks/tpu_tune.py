"""Measure block sizes of the TPU kernel on the TPU at hand, and keep the best ones.

    python benchmarks/tpu_tune.py --num-heads 32 --num-kv-heads 8 --head-dim 128 --page-size 64
    python benchmarks/tpu_tune.py --num-heads 8 --num-kv-heads 1 --head-dim 128 --dtype float8_e4m3fn --write

Heads are those of one device: a model's, divided by tensor_parallel_size. Sizes are searched one after the other, from
the defaults on: page blocks and chunks by decode (many sequences, one token each), query blocks and chunks by prefill
(one long continued prompt). Each figure is the median of several runs of a loop of calls within one program. `--write`
adds the result to `pallas_kernels/tpu/block_sizes.json`, from where the kernel takes it. `--interpret` does all of it
on a CPU at toy sizes, to show that it works; its times mean nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from jax_engine.models.kv_pages import SequenceTable
from jax_engine.pallas_kernels import tpu
from jax_engine.pallas_kernels.tpu.blocks import tuning_key, vmem_budget
from jax_engine.server.bench.figures import format_table

SIZES_FILE = Path(__file__).parents[1] / "pallas_kernels" / "tpu" / "block_sizes.json"
INTERPRETED = "TPU v6 lite"


@dataclass(frozen=True)
class Load:
    """A step: so many sequences with so many new tokens each, and so many already cached."""

    num_sequences: int
    new_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Bench:
    """What is measured, and how long."""

    geometry: tpu.Geometry
    device_kind: str
    decode: Load
    prefill: Load
    calls: int  # within one program
    repeats: int
    interpret: bool

    def seconds(self, load: Load, blocks: tpu.Blocks) -> float:
        """Of one call, at these sizes."""
        queries, keys, values, table = self._arguments(load)

        @jax.jit
        def run(pages: jax.Array) -> jax.Array:
            def call(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                queries, pages = carry
                # A call's output is the next one's queries, so that none can be left out.
                return tpu.ragged_paged_attention(
                    queries,
                    keys,
                    values,
                    pages,
                    table.block_tables,
                    table.query_starts,
                    table.kv_lengths,
                    table.num_decodes,
                    table.token_sequences,
                    table.positions,
                    layer=0,
                    scale=self.geometry.head_dim**-0.5,
                    device_kind=self.device_kind,
                    blocks=blocks,
                    interpret=self.interpret,
                )

            return jax.lax.fori_loop(0, self.calls, call, (queries, pages))[0]

        pages = jnp.zeros((1, self._num_pages(load), *self._page_shape), self.geometry.cache_dtype)
        run(pages).block_until_ready()
        times = []
        for _ in range(self.repeats):
            start = time.perf_counter()
            run(pages).block_until_ready()
            times.append((time.perf_counter() - start) / self.calls)
        return median(times)

    @property
    def _page_shape(self) -> tuple[int, int, int, int]:
        geometry = self.geometry
        return tpu.page_shape(geometry.num_kv_heads, geometry.page_size, geometry.head_dim)

    def _pages_of(self, load: Load) -> int:
        return -(-(load.new_tokens + load.cached_tokens) // self.geometry.page_size)

    def _num_pages(self, load: Load) -> int:
        return load.num_sequences * self._pages_of(load)

    def _arguments(self, load: Load) -> tuple[jax.Array, jax.Array, jax.Array, SequenceTable]:
        """Queries, keys, values, and which sequence and page each belongs to."""
        geometry, rng = self.geometry, np.random.default_rng(0)
        tables = rng.permutation(self._num_pages(load)).reshape(load.num_sequences, -1)
        tokens = load.num_sequences * load.new_tokens
        sequences = SequenceTable.build(
            jnp.asarray(tables, jnp.int32),
            jnp.arange(load.num_sequences + 1, dtype=jnp.int32) * load.new_tokens,
            jnp.full(load.num_sequences, load.new_tokens + load.cached_tokens, jnp.int32),
            jnp.int32(load.num_sequences if load.new_tokens == 1 else 0),
            num_tokens=tokens,
        )
        heads = geometry.num_kv_heads
        queries, keys, values = (
            jnp.asarray(rng.standard_normal((tokens, count, geometry.head_dim)), geometry.compute_dtype)
            for count in (heads * geometry.queries_per_head, heads, heads)
        )
        return queries, keys, values, sequences


def main() -> None:
    options = parse_arguments()
    device = jax.devices()[0]
    if device.platform != "tpu" and not options.interpret:
        sys.exit(f"tuning needs a TPU and this machine's platform is {device.platform!r}; --interpret tries it out")
    bench = make_bench(options, INTERPRETED if options.interpret else device.device_kind)
    best, rows = tune(bench)
    print(format_table(["searched", "value", "microseconds", "of the first"], rows), end="\n\n")
    print(f"{bench.device_kind}, {tuning_key(bench.geometry)}: {best}")
    if options.write:
        write(SIZES_FILE, bench, best)
        print(f"written to {SIZES_FILE}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-heads", type=int, default=32, help="query heads of one device (default: %(default)s)")
    parser.add_argument("--num-kv-heads", type=int, default=8, help="kv heads of one device (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--page-size", type=int, default=64, help="block_size of the engine (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", help="of the cache (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each program (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the result for this chip and these heads")
    parser.add_argument("--interpret", action="store_true", help="toy sizes on a CPU; shows that the command works")
    options = parser.parse_args()
    if options.num_heads % options.num_kv_heads:
        parser.error(f"--num-heads {options.num_heads} must be a multiple of --num-kv-heads {options.num_kv_heads}")
    if options.write and options.interpret:
        parser.error("--write would keep interpreted times, which mean nothing; leave out one of --write, --interpret")
    return options


def make_bench(options: argparse.Namespace, device_kind: str) -> Bench:
    """The loads that stand for a server's: decode of many sequences, and a chunk of a long prompt."""
    cache = jnp.dtype(options.dtype)
    compute = jnp.dtype(jnp.float32 if cache == jnp.float32 else jnp.bfloat16)
    geometry = tpu.Geometry(
        options.num_kv_heads,
        options.num_heads // options.num_kv_heads,
        options.head_dim,
        options.page_size,
        cache,
        compute,
    )
    if options.interpret:
        return Bench(geometry, device_kind, Load(2, 1, 200), Load(1, 40, 100), calls=1, repeats=1, interpret=True)
    decode, prefill = Load(64, 1, 4000), Load(1, 2048, 4096)
    return Bench(geometry, device_kind, decode, prefill, calls=32, repeats=options.repeats, interpret=False)


def tune(bench: Bench) -> tuple[tpu.Blocks, list[list[object]]]:
    """The best sizes, one after the other, and the rows of the table."""
    best = tpu.block_sizes(bench.geometry, bench.device_kind)
    rows: list[list[object]] = []
    for load, names in ((bench.decode, ("block", "chunk", "tail")), (bench.prefill, ("query", "prefill_chunk"))):
        for name in names:
            timed: list[tuple[float, tpu.Blocks]] = []
            for blocks in variants(best, name, bench):
                timed.append((bench.seconds(load, blocks), blocks))
                seconds, first = timed[-1][0], timed[0][0]
                rows.append([name, getattr(blocks, name), round(seconds * 1e6, 1), round(seconds / first, 3)])
            best = min(timed, key=lambda entry: entry[0])[1]
    return best, rows


def variants(best: tpu.Blocks, name: str, bench: Bench) -> Iterator[tpu.Blocks]:
    """`best` first, then with `name` halved, quartered and doubled, as far as the sizes allow and fit."""
    geometry, smallest = bench.geometry, max(bench.geometry.page_size, 128)
    valid: dict[str, Callable[[tpu.Blocks], bool]] = {
        "block": lambda blocks: blocks.block >= max(blocks.chunk, blocks.prefill_chunk),
        "chunk": lambda blocks: blocks.tail <= blocks.chunk <= blocks.block,
        "tail": lambda blocks: smallest <= blocks.tail <= blocks.chunk,
        "query": lambda blocks: blocks.query * geometry.queries_per_head >= 16 and blocks.query >= 8,
        "prefill_chunk": lambda blocks: smallest <= blocks.prefill_chunk <= blocks.block,
    }
    yield best
    size, budget = getattr(best, name), vmem_budget(tpu.find_chip(bench.device_kind))
    for other in () if bench.interpret and name != "tail" else (size // 2, size // 4, size * 2):
        blocks = replace(best, **{name: other})
        if valid[name](blocks) and blocks.vmem_bytes(geometry) <= budget:
            yield blocks


def write(path: Path, bench: Bench, best: tpu.Blocks) -> None:
    """Add the sizes to the table of tuned ones."""
    table = json.loads(path.read_text())
    table["tuned"].setdefault(bench.device_kind, {})[tuning_key(bench.geometry)] = asdict(best)
    path.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
