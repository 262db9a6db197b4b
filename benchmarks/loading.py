"""How long weights take from files onto devices: a converted checkpoint beside the safetensors that it was made from.

    python benchmarks/loading.py [--gigabytes 1.2] [--devices 1 8] [--repeats 5] [--folder DIR] [--json FILE]

Makes a random checkpoint in Llama's layout (or takes one, `--model`), converts it by `jax-engine convert`, and loads
both in turn, each time in a new process, onto one device and several that the CPU pretends to be. `warm`: the files
are in the page cache, and are read once before to be sure; `cold`: they are dropped from it just before
(POSIX_FADV_DONTNEED), and what the process has then read from the disk is shown. Seconds are those of `load_leaves`,
from the folder to arrays on the devices; a process has imported everything before. Leaves are compared by a checksum,
beside the clock.
"""

import argparse
import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jax_engine.server.bench.figures import format_table, write_json

FORMATS = ("safetensors", "orbax")
CACHES = ("warm", "cold")
# (hidden_size, intermediate_size, attention heads, key and value heads, vocabulary); the first is for dry runs.
SHAPES = ((256, 512, 8, 8, 512), (2048, 5632, 32, 8, 32_000), (4096, 14_336, 32, 8, 128_256))
FILE_BYTES = 2**30  # of a safetensors file


def write_checkpoint(folder: Path, num_bytes: float) -> None:
    """Random bfloat16 weights of about that size: as many layers as fit, of the widest shape that has eight."""
    shape = next((s for s in reversed(SHAPES) if 8 * layer_bytes(s) + table_bytes(s) <= num_bytes), SHAPES[0])
    num_layers = max(2, round((num_bytes - table_bytes(shape)) / layer_bytes(shape)))
    hidden, intermediate, heads, kv_heads, vocabulary = shape
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_random(folder, num_layers, shape)


def layer_bytes(shape: tuple[int, ...]) -> int:
    """Of a layer, in bfloat16."""
    return sum(2 * math.prod(size) for size in layer_shapes(shape).values())


def table_bytes(shape: tuple[int, ...]) -> int:
    """Of embedding and head."""
    return 2 * 2 * shape[4] * shape[0]


def layer_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """A layer's tensors, as a checkpoint has them."""
    hidden, intermediate, heads, kv_heads, _ = shape
    kv_size = hidden // heads * kv_heads
    rows = {"q_proj": hidden, "k_proj": kv_size, "v_proj": kv_size, "o_proj": hidden}
    return {
        **{f"self_attn.{name}.weight": (size, hidden) for name, size in rows.items()},
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def save_random(folder: Path, num_layers: int, shape: tuple[int, ...]) -> None:
    """Write the tensors, in files of at most `FILE_BYTES` and a tensor, with an index."""
    import ml_dtypes
    from safetensors.numpy import save_file

    hidden, vocabulary = shape[0], shape[4]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(num_layers):
        shapes |= {f"model.layers.{layer}.{name}": size for name, size in layer_shapes(shape).items()}
    shapes["lm_head.weight"] = (vocabulary, hidden)
    generator = np.random.default_rng(0)
    files: dict[str, str] = {}
    held: dict[str, Any] = {}
    for name, size in shapes.items():
        # Any sign and fraction, and an exponent that leaves values small.
        bits = generator.integers(0, 2**16, size, dtype=np.uint16) & 0x807F | 0x3C00
        held[name] = bits.view(ml_dtypes.bfloat16)
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES or name == "lm_head.weight":
            file = f"model-{len(set(files.values())) + 1:05}.safetensors"
            save_file(held, folder / file)
            files |= dict.fromkeys(held, file)
            held = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def convert(source: Path, folder: Path) -> float:
    """Seconds that the command takes."""
    command = [sys.executable, "-P", "-m", "jax_engine.server.cli", "convert", str(source), str(folder)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def load_once(folder: Path, num_devices: int, cache: str) -> dict[str, Any]:
    """One load in this process: seconds, bytes, memory and a checksum of the leaves."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    from jax_engine.compilation.blueprint import Blueprint
    from jax_engine.config import EngineConfig
    from jax_engine.loading.loader import load_leaves

    config = EngineConfig(
        model=str(folder), dtype="bfloat16", tensor_parallel_size=num_devices, max_model_len=256, max_num_seqs=4
    )
    placed = Blueprint.of(config, jax.devices()).placed
    jax.device_put(np.zeros(8)).block_until_ready()
    for file in weight_files(folder):
        (read_through if cache == "warm" else drop_from_cache)(file)
    gc.collect()
    before, from_disk = peak_bytes(), disk_bytes()
    start, processor = time.perf_counter(), time.process_time()
    leaves = load_leaves(placed.structure, folder, sharding_of=placed.sharding_of, progress=False)
    jax.block_until_ready(leaves)
    seconds = time.perf_counter() - start
    figures = {
        "seconds": seconds,
        "processor_seconds": time.process_time() - processor,
        "bytes": placed.structure.num_bytes,
        "peak_rss_bytes": peak_bytes(),
        "added_rss_bytes": peak_bytes() - before,
        "disk_bytes": disk_bytes() - from_disk,
    }
    digest = xxhash.xxh3_64()
    for leaf in leaves:
        digest.update(np.asarray(leaf).view(np.uint16).data)
    return figures | {"checksum": digest.hexdigest()}


def weight_files(folder: Path) -> Iterator[Path]:
    """What holds the weights, and all else in the folder."""
    return (file for file in sorted(folder.rglob("*")) if file.is_file())


def read_through(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        memory = bytearray(2**20)
        while opened.readinto(memory):
            pass


def drop_from_cache(file: Path) -> None:
    """Linux alone does so, and only with what the disk has."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def peak_bytes() -> int:
    """The most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def disk_bytes() -> int:
    """What this process has had read from disks."""
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes: ")[2].split()[0])


def load_in_child(folder: Path, num_devices: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(folder), str(num_devices), cache]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def measure(folders: dict[str, Path], devices: list[int], caches: list[str], repeats: int) -> list[dict[str, Any]]:
    """Every load, the formats in turn, so that both see the same neighbours."""
    runs = []
    for num_devices in devices:
        for repeat in range(repeats):
            for cache in caches:
                for name in FORMATS if repeat % 2 else reversed(FORMATS):
                    found = load_in_child(folders[name], num_devices, cache)
                    runs.append({"format": name, "devices": num_devices, "cache": cache} | found)
    checksums = {run["checksum"] for run in runs}
    if len(checksums) != 1:
        raise RuntimeError(f"the loads differ: {len(checksums)} checksums of the same weights")
    return runs


def rows(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Medians for each number of devices and state of the cache, and what the ratio of two neighbouring loads is."""
    for devices, cache in dict.fromkeys((run["devices"], run["cache"]) for run in runs):
        row: dict[str, Any] = {"devices": devices, "cache": cache}
        of_format = {
            name: [r for r in runs if (r["devices"], r["cache"], r["format"]) == (devices, cache, name)]
            for name in FORMATS
        }
        for name, found in of_format.items():
            seconds = statistics.median(run["seconds"] for run in found)
            row[name] = {"seconds": seconds, "gigabytes_per_second": found[0]["bytes"] / 1e9 / seconds} | {
                key: statistics.median(run[key] for run in found)
                for key in ("processor_seconds", "peak_rss_bytes", "added_rss_bytes", "disk_bytes")
            }
        pairs = zip(*of_format.values(), strict=True)
        ratios = sorted(plain["seconds"] / converted["seconds"] for plain, converted in pairs)
        yield row | {"ratios": ratios, "ratio": statistics.median(ratios)}


def table(found: list[dict[str, Any]]) -> str:
    header = ["devices", "cache", "format", "seconds", "GB/s", "processor s", "peak RSS, GB", "from disk, GB"]
    header += ["times as fast (all)"]
    lines = []
    for row in found:
        spread = f"{row['ratio']:.2f} ({row['ratios'][0]:.2f} to {row['ratios'][-1]:.2f})"
        for name in FORMATS:
            figures = row[name]
            sizes = (figures[key] / 1e9 for key in ("peak_rss_bytes", "disk_bytes"))
            speeds = figures["seconds"], figures["gigabytes_per_second"], figures["processor_seconds"]
            lines.append([row["devices"], row["cache"], name, *speeds, *sizes, spread if name == "orbax" else ""])
    return format_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a folder of bfloat16 weights, in place of random ones"
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--cache", choices=CACHES, nargs="+", default=list(CACHES), help="default: both")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where files go, on the disk to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, num_devices, cache = options.child
        print(json.dumps(load_once(Path(folder), int(num_devices), cache)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        source = options.model or Path(work) / "safetensors"
        if options.model is None:
            write_checkpoint(source, options.gigabytes * 1e9)
        folders = {"safetensors": source, "orbax": Path(work) / "orbax"}
        seconds = convert(source, folders["orbax"])
        runs = measure(folders, options.devices, options.cache, options.repeats)
    found = list(rows(runs))
    size = runs[0]["bytes"] / 1e9
    print(
        f"{size:.2f} GB of weights; jax-engine convert took {seconds:.1f} s; {os.cpu_count()} cores\n\n{table(found)}"
    )
    if options.json:
        report = {"bytes": runs[0]["bytes"], "convert_seconds": seconds, "rows": found, "runs": runs}
        write_json(options.json, report)


if __name__ == "__main__":
    main()
