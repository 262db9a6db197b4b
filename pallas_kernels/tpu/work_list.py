"""The kernel's work, as flat lists of int32 that are the same for every layer of a step."""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_engine.pallas_kernels.tpu.blocks import Blocks
from jax_engine.pallas_kernels.tpu.page_stream import View


@dataclass(frozen=True)
class WorkLayout:
    """Where each list lies in the packed vector, for static sizes."""

    num_sequences: int
    num_segments: int
    num_strips: int
    num_cores: int

    @classmethod
    def of(cls, num_tokens: int, num_sequences: int, blocks: Blocks, *, num_cores: int) -> "WorkLayout":
        """The longest that the lists can be for these shapes."""
        sequences = min(num_sequences, num_tokens)
        if num_tokens == 1:
            return cls(num_sequences, sequences, 0, num_cores)
        num_segments = 2 * sequences + -(-num_tokens // blocks.query)
        return cls(num_sequences, num_segments, num_tokens // blocks.strip + 2 * sequences, num_cores)

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size). A segment is a decoding sequence, or a query block and a sequence in it."""
        per_segment = ("sequences", "firsts", "lasts", "blocks", "starts", "stops")
        per_strip = ("rows", "counts", "offsets", "page_numbers")
        offset = self.num_cores * NUM_COUNTERS
        fields = {"counters": (0, offset)}
        for names, size in ((per_segment, self.num_segments), (per_strip, self.num_strips)):
            for name in names:
                fields[name] = (offset, size)
                offset += size
        return fields

    def views(self, ref: jax.Ref) -> dict[str, View]:
        """The lists in the packed ref."""
        return {name: View(ref, *place) for name, place in self.fields.items()}


# Entries of `counters`, for each core: its segments of decode and of longer ranges, first and one past the last, and
# how many page blocks they take; and the strips, all of which each core writes (see `ragged_paged_attention`).
FIRST_DECODE, STOP_DECODE, DECODE_ITEMS, FIRST_SEGMENT, STOP_SEGMENT, PREFILL_ITEMS, NUM_STRIPS = range(7)
NUM_COUNTERS = 7


def build_work(
    layout: WorkLayout,
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    blocks: Blocks,
    page_size: int,
    window: int | None,
) -> Int[Array, " work"]:
    """Pack the work of one step.

    Decoding sequences are segments `0..num_decodes - 1`. The segments of longer ranges follow, in the order of their
    token rows.
    """
    index = jnp.arange(layout.num_segments)
    is_decode = index < num_decodes
    own = jnp.minimum(index, kv_lengths.shape[0] - 1)
    last = jnp.maximum(kv_lengths[own] - 1, 0)
    segments = {"sequences": own, "firsts": last, "lasts": last, "blocks": 0 * own, "starts": own, "stops": own + 1}
    num_segments = num_decodes
    strips: dict[str, Array] = {}
    num_strips = jnp.zeros((), jnp.int32)
    if layout.num_strips:
        longer = (token_sequences >= num_decodes) & (token_sequences < kv_lengths.shape[0])
        begins = longer & jnp.concatenate([jnp.ones(1, bool), token_sequences[1:] != token_sequences[:-1]])
        rows = _Rows(longer, begins, token_sequences, positions, query_starts[1:])
        others, count = rows.segments(layout.num_segments, blocks.query)
        place = jnp.maximum(index - num_decodes, 0)  # behind the decodes
        segments = {name: jnp.where(is_decode, segments[name], others[name][place]) for name in segments}
        num_segments = num_decodes + count
        strips, num_strips = rows.strips(layout.num_strips, blocks.strip, page_size, block_tables)
    # A window is counted from a segment's first row, which sees furthest back.
    firsts = 0 * own if window is None else jnp.maximum(segments["firsts"] - window + 1, 0)
    segments["firsts"] = firsts
    items = segments["lasts"] // blocks.block - firsts // blocks.block + 1
    # A query block's segments stay together.
    opens = jnp.concatenate([jnp.ones(1, bool), segments["blocks"][1:] != segments["blocks"][:-1]]) | is_decode
    decode = _share(items, opens, jnp.zeros((), jnp.int32), num_decodes, layout.num_cores)
    prefill = _share(items, opens | (index == num_decodes), num_decodes, num_segments, layout.num_cores)
    counters = [jnp.stack([*decode[core], *prefill[core], num_strips]) for core in range(layout.num_cores)]
    lists = {"counters": jnp.concatenate(counters), **segments, **strips}
    return jnp.concatenate([lists[name].astype(jnp.int32) for name, (_, size) in layout.fields.items() if size])


@dataclass(frozen=True)
class _Rows:
    """The token rows of a step, to be cut where sequences begin and at fixed intervals."""

    longer: Bool[Array, " T"]  # rows of ranges longer than one token
    begins: Bool[Array, " T"]  # those of them that begin their sequence's range
    sequences: Int[Array, " T"]
    positions: Int[Array, " T"]
    ends: Int[Array, " B"]  # one past each sequence's last row

    def segments(self, size: int, query_block: int) -> tuple[dict[str, Int[Array, " X"]], Int[Array, ""]]:
        """One begins at every row that begins a sequence or a query block; `firsts` is its first row's position."""
        marks = self.begins | (self.longer & (jnp.arange(self.longer.shape[0]) % query_block == 0))
        starts, count = _marked(marks, size)
        sequences = jnp.minimum(self.sequences[starts], self.ends.shape[0] - 1)
        stops = jnp.minimum((starts // query_block + 1) * query_block, self.ends[sequences])
        return {
            "sequences": sequences,
            "firsts": self.positions[starts],
            "lasts": self.positions[jnp.maximum(stops - 1, 0)],
            "blocks": starts // query_block,
            "starts": starts,
            "stops": stops,
        }, count

    def strips(
        self, size: int, strip: int, page_size: int, block_tables: Int[Array, "B M"]
    ) -> tuple[dict[str, Int[Array, " U"]], Int[Array, ""]]:
        """One begins at every row that begins a sequence or a multiple of `strip` positions."""
        marks = self.begins | (self.longer & (self.positions % strip == 0))
        starts, count = _marked(marks, size)
        sequences = jnp.minimum(self.sequences[starts], self.ends.shape[0] - 1)
        place = self.positions[starts]
        return {
            "rows": starts,
            "counts": jnp.minimum(strip - place % strip, self.ends[sequences] - starts),
            "offsets": place % page_size,
            "page_numbers": block_tables[sequences, place // page_size],
        }, count


def _share(
    items: Int[Array, " X"], opens: Bool[Array, " X"], first: Int[Array, ""], stop: Int[Array, ""], num_cores: int
) -> list[tuple[Array, Array, Array]]:
    """Segments `first..stop - 1` in about equal shares, cut where `opens` allows: each one's first, stop and number of
    page blocks.
    """
    index = jnp.arange(items.shape[0])
    ends = jnp.cumsum(jnp.where((index >= first) & (index < stop), items, 0))
    total = ends[-1]

    def cut(core: int) -> Array:
        behind = (ends - items >= total * core // num_cores) & opens & (index >= first)
        return jnp.min(jnp.where(behind, jnp.minimum(index, stop), stop))

    cuts = [first, *(cut(core) for core in range(1, num_cores)), stop]
    before = jnp.concatenate([jnp.zeros(1, ends.dtype), ends])  # items of the segments before each
    return [(low, high, before[high] - before[low]) for low, high in pairwise(cuts)]


def _marked(marks: Bool[Array, " T"], size: int) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    """The rows that are marked, padded with row 0, and how many they are."""
    return jnp.nonzero(marks, size=size, fill_value=0)[0], jnp.sum(marks)
