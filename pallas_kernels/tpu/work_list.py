"""The kernel's work, as flat lists of int32 that are the same for every layer of a step."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class View:
    """A part of a one-dimensional ref, indexed from 0."""

    ref: jax.Ref
    offset: int
    size: int

    @property
    def shape(self) -> tuple[int]:
        return (self.size,)

    def __getitem__(self, index: jax.Array) -> jax.Array:
        return self.ref[self.offset + index]


@dataclass(frozen=True)
class WorkLayout:
    """Where each list lies in the packed vector, for static sizes."""

    num_sequences: int
    num_segments: int
    num_strips: int

    @classmethod
    def of(cls, *, num_tokens: int, num_sequences: int, query_block: int, strip: int) -> "WorkLayout":
        """The longest that the lists can be for these shapes."""
        decodes = min(num_sequences, num_tokens)
        if num_tokens == 1:
            return cls(num_sequences, decodes, 0)
        sequences = min(num_sequences, num_tokens)
        blocks = -(-num_tokens // query_block)
        return cls(num_sequences, decodes + blocks + sequences, num_tokens // strip + 2 * sequences)

    @property
    def fields(self) -> dict[str, tuple[int, int]]:
        """Name -> (offset, size). A segment is a decoding sequence, or a query block and a sequence in it."""
        per_segment = ("sequences", "firsts", "lasts", "blocks", "starts", "stops")
        per_strip = ("rows", "counts", "offsets", "page_numbers")
        fields, offset = {"counters": (0, NUM_COUNTERS)}, NUM_COUNTERS
        for names, size in ((per_segment, self.num_segments), (per_strip, self.num_strips)):
            for name in names:
                fields[name] = (offset, size)
                offset += size
        return fields

    def views(self, ref: jax.Ref) -> dict[str, View]:
        """The lists in the packed ref."""
        return {name: View(ref, *place) for name, place in self.fields.items()}


# Entries of `counters`.
NUM_DECODES, DECODE_ITEMS, NUM_SEGMENTS, PREFILL_ITEMS, NUM_STRIPS = range(5)
NUM_COUNTERS = 5


def build_work(
    layout: WorkLayout,
    block_tables: Int[Array, "B M"],
    query_starts: Int[Array, "B+1"],
    kv_lengths: Int[Array, " B"],
    num_decodes: Int[Array, ""],
    token_sequences: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    window: int | None,
    page_size: int,
    block: int,
    query_block: int,
    strip: int,
) -> Int[Array, " work"]:
    """Pack the work of one step.

    Decoding sequences are segments `0..num_decodes - 1`. The segments of longer ranges follow, in the order of their
    token rows: one begins at every row that begins a sequence or a query block. A strip begins at every row that begins
    a sequence or a multiple of `strip` positions.
    """
    num_tokens, num_sequences = token_sequences.shape[0], kv_lengths.shape[0]
    decodes = jnp.arange(layout.num_segments)
    is_decode = decodes < num_decodes
    own = jnp.minimum(decodes, num_sequences - 1)
    segments = {
        "sequences": own,
        "lasts": jnp.maximum(kv_lengths[own] - 1, 0),
        "blocks": jnp.zeros_like(own),
        "starts": own,
        "stops": own + 1,
    }
    segments["firsts"] = segments["lasts"]
    num_segments = num_decodes
    strips: dict[str, Array] = {}
    num_strips = jnp.zeros((), jnp.int32)
    if layout.num_strips:
        rows = jnp.arange(num_tokens)
        longer = (token_sequences >= num_decodes) & (token_sequences < num_sequences)
        begins = jnp.concatenate([jnp.ones(1, bool), token_sequences[1:] != token_sequences[:-1]])
        ends = query_starts[1:]

        marks = longer & (begins | (rows % query_block == 0))
        starts, count = _marked(marks, layout.num_segments)
        # Placed behind the decodes.
        starts = starts[jnp.maximum(decodes - num_decodes, 0)]
        sequence = jnp.minimum(token_sequences[starts], num_sequences - 1)
        stops = jnp.minimum((starts // query_block + 1) * query_block, ends[sequence])
        longer_segments = {
            "sequences": sequence,
            "firsts": positions[starts],
            "lasts": positions[jnp.maximum(stops - 1, 0)],
            "blocks": starts // query_block,
            "starts": starts,
            "stops": stops,
        }
        segments = {name: jnp.where(is_decode, segments[name], longer_segments[name]) for name in segments}
        num_segments = num_decodes + count

        starts, num_strips = _marked(longer & (begins | (positions % strip == 0)), layout.num_strips)
        sequence = jnp.minimum(token_sequences[starts], num_sequences - 1)
        place = positions[starts]
        strips = {
            "rows": starts,
            "counts": jnp.minimum(strip - place % strip, ends[sequence] - starts),
            "offsets": place % page_size,
            "page_numbers": block_tables[sequence, place // page_size],
        }
    # A window is counted from a segment's first row, which sees furthest back.
    firsts = jnp.zeros_like(own) if window is None else jnp.maximum(segments["firsts"] - window + 1, 0)
    segments["firsts"] = firsts
    items = segments["lasts"] // block - firsts // block + 1
    counters = [
        num_decodes,
        jnp.sum(jnp.where(is_decode, items, 0)),
        num_segments,
        jnp.sum(jnp.where(~is_decode & (decodes < num_segments), items, 0)),
        num_strips,
    ]
    lists = {"counters": jnp.stack(counters), **segments, **strips}
    return jnp.concatenate([lists[name].astype(jnp.int32) for name, (_, size) in layout.fields.items() if size])


def _marked(marks: Bool[Array, " T"], size: int) -> tuple[Int[Array, " size"], Int[Array, ""]]:
    """The rows that are marked, padded with row 0, and how many they are."""
    return jnp.nonzero(marks, size=size, fill_value=0)[0], jnp.sum(marks)
