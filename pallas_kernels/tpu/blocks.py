"""Block sizes: from a model of the memory they take on each chip, or tuned ones from `block_sizes.json`."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import gcd
from typing import Any

from jax_engine.pallas_kernels.tpu.geometry import LANES, SUBLANES, Geometry, round_up

MOST_BLOCK_TOKENS = 4096
MOST_CHUNK_TOKENS = 1024
MOST_BLOCK_BYTES = 16 * 2**20
MOST_STRIP_BYTES = 2**19
RING = 4  # decode's results and tiles on their way out
UNITS_A_TRIP = 2  # of prefill's main loop
ROWS_AT_ONCE = 256  # rows of a prefill unit; fewer would load keys into the matrix unit more often
PREFILL_ROWS = 512  # query rows of a prefill block: tokens times query heads of a kv head
COMPILER_BYTES = 2 * 2**20  # what the compiler keeps for itself beside the buffers


@dataclass(frozen=True)
class Chip:
    """What the kernel needs to know of a chip."""

    device_kind: str
    vmem_bytes: int  # of one TensorCore
    eight_bit: bool  # whether it computes with 8-bit numbers
    pass_values: int  # of one kv head's keys in a pass of decode's main loop; more would not fit its registers


@dataclass(frozen=True)
class Blocks:
    """Sizes in tokens, each a power of two; all but `query` and `strip` are whole pages, and passes at least 128."""

    block: int  # pages copied at once
    chunk: int  # one pass of decode's main loop
    tail: int  # one pass over decode's masked tokens; divides `chunk`
    query: int  # query tokens of a prefill block
    prefill_chunk: int  # cached tokens of one pass of prefill
    strip: int  # tokens of one cache write of a longer range; divides the page size

    def rows_at_once(self, geometry: Geometry) -> int:
        """Query rows of a unit of prefill's work, which is one head's and one `prefill_chunk`."""
        return gcd(ROWS_AT_ONCE, self.query * geometry.queries_per_head)

    def vmem_bytes(self, geometry: Geometry) -> int:
        """What the kernel takes: its page buffers, and the buffers of the phase that needs most."""
        phases = self._write_bytes(geometry), self._decode_bytes(geometry), self._prefill_bytes(geometry)
        rows = round_up(geometry.page_size, geometry.native_rows)  # as a page lies in VMEM
        return 2 * self.block * geometry.token_bytes * rows // geometry.page_size + max(phases) + COMPILER_BYTES

    def _write_bytes(self, geometry: Geometry) -> int:
        rows = round_up(self.strip, geometry.native_rows) * geometry.token_bytes
        return 2 * (self.strip + SUBLANES) * geometry.planes * geometry.num_kv_heads * geometry.width * 4 + 2 * rows

    def _decode_bytes(self, geometry: Geometry) -> int:
        rows = geometry.num_groups * round_up(geometry.group_rows, 2 * SUBLANES)
        in_and_out = (2 + RING) * rows * geometry.width * geometry.compute_dtype.itemsize
        state = rows * (geometry.width + 3 * LANES) * 4  # the third: sinks
        new = 2 * geometry.planes * round_up(geometry.num_kv_heads, SUBLANES) * geometry.width * 4
        return in_and_out + state + new + RING * geometry.native_rows * geometry.token_bytes

    def _prefill_bytes(self, geometry: Geometry) -> int:
        rows, itemsize = self.query * geometry.queries_per_head, geometry.compute_dtype.itemsize
        per_row = 4 * geometry.width * itemsize + (geometry.width + 3 * LANES) * 4
        per_unit_row = self.prefill_chunk * (4 + itemsize) + LANES * 4
        return (
            geometry.num_kv_heads * rows * per_row
            + UNITS_A_TRIP * self.rows_at_once(geometry) * per_unit_row
            + 3 * rows * LANES * 4
        )


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files(__package__).joinpath("block_sizes.json").read_text())
    return table


def chips() -> tuple[Chip, ...]:
    """The chips that block sizes are known for."""
    return tuple(Chip(kind, **entry) for kind, entry in _table()["chips"].items())


def find_chip(device_kind: str) -> Chip:
    """The chip that JAX calls `device_kind`.

    Raises:
        ValueError: no entry in `block_sizes.json`; names those there are.
    """
    for chip in chips():
        if chip.device_kind == device_kind:
            return chip
    known = ", ".join(chip.device_kind for chip in chips())
    raise ValueError(
        f"device_kind {device_kind!r} is unknown to the TPU kernel, which knows {known}; "
        "add a line to pallas_kernels/tpu/block_sizes.json, or use attention_backend='xla'"
    )


def tuning_key(geometry: Geometry) -> str:
    """The key of a tuned entry: what the best sizes depend on beside the chip."""
    sizes = (geometry.num_kv_heads, geometry.queries_per_head, geometry.head_dim, geometry.page_size)
    return "-".join((geometry.cache_dtype.name, *map(str, sizes)))


def block_sizes(geometry: Geometry, device_kind: str) -> Blocks:
    """Tuned sizes if there are any for this chip and geometry, else the largest that fit its VMEM.

    Raises:
        ValueError: the chip is unknown, has no arithmetic for the cache's type, or not even the smallest sizes fit.
    """
    chip = find_chip(device_kind)
    if geometry.cache_dtype.itemsize == 1 and not chip.eight_bit:
        raise ValueError(
            f"a cache of {geometry.cache_dtype.name} is not served on {device_kind}, which has no 8-bit arithmetic: "
            "it would be about ten times slower than bfloat16; use a bfloat16 cache (kv_cache_dtype='bfloat16')"
        )
    tuned = _table()["tuned"].get(device_kind, {}).get(tuning_key(geometry))
    if tuned is not None:
        return Blocks(**tuned)
    candidates = candidate_blocks(geometry, chip)
    for blocks in candidates:
        if blocks.vmem_bytes(geometry) <= vmem_budget(chip):
            return blocks
    needed = candidates[-1].vmem_bytes(geometry)
    raise ValueError(
        f"num_key_value_heads={geometry.num_kv_heads} x head_dim={geometry.head_dim} with block_size="
        f"{geometry.page_size} need {needed / 2**20:.1f} MiB of VMEM, and {device_kind} has "
        f"{vmem_budget(chip) / 2**20:.1f} to give; lower block_size, or shard the heads over more chips"
    )


def candidate_blocks(geometry: Geometry, chip: Chip) -> list[Blocks]:
    """Sizes to choose from, the preferred ones first. Page blocks give way before query blocks down to 512 tokens,
    and query blocks before them from there on.
    """
    page, wide = geometry.page_size, geometry.compute_dtype.itemsize == 4
    # Six passes of bfloat16 make a float32 product: long chunks would only make a long program.
    chunk = 256 if wide else min(MOST_CHUNK_TOKENS, chip.pass_values // geometry.width)
    prefill_chunk = 256 if wide else min(512 * LANES // geometry.width, chunk // 2)
    block = MOST_BLOCK_TOKENS
    while block > LANES and block * geometry.token_bytes > MOST_BLOCK_BYTES:
        block //= 2
    fewest = max(SUBLANES, 2 * SUBLANES // geometry.queries_per_head)  # rows that a copy can take
    query = max(fewest, _power_below(PREFILL_ROWS // geometry.queries_per_head))
    strip = max(SUBLANES, _power_below(MOST_STRIP_BYTES // geometry.token_bytes))
    smallest = max(page, LANES)
    candidates = []
    while True:
        candidates.append(
            Blocks(
                block=max(block, smallest),
                chunk=max(min(chunk, block), smallest),
                tail=max(min(256, block), smallest),
                query=query,
                prefill_chunk=max(min(prefill_chunk, block), smallest),
                strip=min(64, strip, page),
            )
        )
        if block > 512 or (query <= fewest and block > smallest):
            block //= 2
        elif query > fewest:
            query //= 2
        else:
            return candidates


def _power_below(value: int) -> int:
    """The largest power of two that is at most `value`, and at least 1."""
    return 1 << (max(value, 1).bit_length() - 1)


def vmem_budget(chip: Chip) -> int:
    """Bytes of VMEM that the kernel may take; the rest is XLA's."""
    return chip.vmem_bytes * 7 // 8
