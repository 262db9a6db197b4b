"""One step's input: packed by the host into a single int32 buffer, unpacked by the step program on the device."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

from jax_engine.core.messages import CoreRequest
from jax_engine.kv_cache.cache_records import NO_PAGE
from jax_engine.models.adapters import NO_ADAPTER
from jax_engine.sampling.sampler import SamplingMode, SamplingRows
from jax_engine.sampling_params import MAX_HELD_BACK_TOKENS
from jax_engine.scheduling.step_plan import Chunk

TAKE_LAST = -1  # in place of a token id: the token that the step before drew for this slot
NO_TOKEN = -1  # in place of a drawn token: the row had ended
NUM_PARAMETERS = 7  # temperature, top_k, top_p, min_p, two key words, hold_until


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of a step program: `num_tokens` token rows of at most `num_sequences` sequences."""

    num_tokens: int
    num_sequences: int

    def holds(self, num_tokens: int, num_sequences: int) -> bool:
        return num_tokens <= self.num_tokens and num_sequences <= self.num_sequences


@dataclass(frozen=True)
class BatchLayout:
    """Where each field lies in the packed buffer of a bucket."""

    bucket: Bucket
    page_size: int
    num_slots: int
    num_groups: int = 1  # cache groups
    num_adapters: int = 0  # slots of adapters
    num_more_updates: int = 0  # page updates beyond those of the step's own tokens

    @property
    def num_page_updates(self) -> int:
        """New pages a step can need, in each cache group: one for every full page of tokens, and one more for each
        sequence.

        Cached pages of admitted requests may be more; those beyond go by `write_block_tables`.
        """
        of_tokens = self.bucket.num_tokens // self.page_size + self.bucket.num_sequences
        return self.num_groups * of_tokens + self.num_more_updates

    @property
    def num_table_rows(self) -> int:
        """Rows of the block tables: the slots of the first cache group, of the second, and so on."""
        return self.num_groups * self.num_slots

    @cached_property
    def fields(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        tokens, sequences = self.bucket.num_tokens, self.bucket.num_sequences
        shapes: dict[str, tuple[int, ...]] = {
            "tokens": (tokens,),
            "query_starts": (sequences + 1,),
            "num_decodes": (1,),
            **row_shapes(sequences),
            "page_updates": (self.num_page_updates, 3),  # row of the block tables, index in it, page
        }
        if self.num_adapters:
            shapes["adapters"] = (sequences,)
        fields, offset = {}, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            fields[name] = (slice(offset, offset + size), shape)
            offset += size
        return fields

    @property
    def row_words(self) -> slice:
        """Where the fields of `StepRows` lie, one behind another."""
        names = list(row_shapes(0))
        return slice(self.fields[names[0]][0].start, self.fields[names[-1]][0].stop)

    @cached_property
    def size(self) -> int:
        """Length of the buffer in int32 words."""
        return max(span.stop for span, _ in self.fields.values())


def row_shapes(num_sequences: int) -> dict[str, tuple[int, ...]]:
    """The fields of a packed buffer that draws need, in their order."""
    return {
        "kv_lengths": (num_sequences,),
        "slots": (num_sequences,),
        "num_draws": (num_sequences,),
        "parameters": (num_sequences, NUM_PARAMETERS),
        "held_back": (num_sequences, MAX_HELD_BACK_TOKENS),
    }


@dataclass(frozen=True)
class StepRows:
    """What a step's buffer says of the rows to draw from, one of each sequence."""

    kv_lengths: Int[Array, " B"]
    slots: Int[Array, " B"]
    num_draws: Int[Array, " B"]  # tokens to draw for the row and to keep
    sampling: SamplingRows

    @staticmethod
    def num_words(num_sequences: int) -> int:
        """Of the fields of so many sequences."""
        return sum(int(np.prod(shape)) for shape in row_shapes(num_sequences).values())

    @classmethod
    def unpack(cls, words: Int[Array, " W"]) -> "StepRows":
        """Of the words at `BatchLayout.row_words`."""
        num_sequences = words.shape[0] // cls.num_words(1)
        view, end = {}, 0
        for name, shape in row_shapes(num_sequences).items():
            start, end = end, end + int(np.prod(shape))
            view[name] = words[start:end].reshape(shape)
        numbers = view["parameters"]

        def floats(column: int) -> Array:
            return jax.lax.bitcast_convert_type(numbers[:, column], jnp.float32)

        sampling = SamplingRows(
            temperature=floats(0),
            top_k=numbers[:, 1],
            top_p=floats(2),
            min_p=floats(3),
            keys=jax.lax.bitcast_convert_type(numbers[:, 4:6], jnp.uint32),
            positions=view["kv_lengths"],
            hold_until=numbers[:, 6],
            held_back=view["held_back"],
        )
        return cls(view["kv_lengths"], view["slots"], view["num_draws"], sampling)

    @property
    def num_used(self) -> Int[Array, ""]:
        """Sequences; padding follows them."""
        return jnp.sum(self.kv_lengths > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepBatch:
    """The unpacked fields on the device; padding sequences have the slot `num_slots`, padding page updates the row
    `num_table_rows`.
    """

    tokens: Int[Array, " T"]  # or TAKE_LAST
    kv_lengths: Int[Array, " B"]
    query_starts: Int[Array, "B+1"]
    slots: Int[Array, " B"]
    num_draws: Int[Array, " B"]
    num_decodes: Int[Array, ""]
    page_updates: Int[Array, "U 3"]
    sampling: SamplingRows
    adapters: Int[Array, " B"] | None = None  # slot of each sequence's adapter, or NO_ADAPTER

    @property
    def last_rows(self) -> Int[Array, " B"]:
        """The last token row of each sequence, which its next token is drawn from."""
        return jnp.maximum(self.query_starts[1:] - 1, 0)

    @property
    def num_used(self) -> Int[Array, ""]:
        """Sequences; padding follows them."""
        return jnp.sum(self.kv_lengths > 0)

    @classmethod
    def unpack(cls, buffer: Int[Array, " W"], layout: BatchLayout) -> "StepBatch":
        view = {name: buffer[span].reshape(shape) for name, (span, shape) in layout.fields.items()}
        rows = StepRows.unpack(buffer[layout.row_words])
        return cls(
            tokens=view["tokens"],
            query_starts=view["query_starts"],
            kv_lengths=rows.kv_lengths,
            slots=rows.slots,
            num_draws=rows.num_draws,
            num_decodes=view["num_decodes"][0],
            page_updates=view["page_updates"],
            sampling=rows.sampling,
            adapters=view.get("adapters"),
        )


class SlotParameters:
    """The sampling parameters of every slot, ready to be copied into a buffer. Mutable; owned by the runner.

    Written when a request takes a slot, so that a step costs one gather whatever its rows ask for.
    """

    def __init__(self, num_slots: int, vocab_size: int, *, least: SamplingMode = SamplingMode.GREEDY) -> None:
        """`least` is the mode of steps whose rows need no more."""
        self._least = least
        self._numbers = np.zeros((num_slots, NUM_PARAMETERS), np.int32)
        self._held_back = np.full((num_slots, MAX_HELD_BACK_TOKENS), vocab_size, np.int32)
        self._samples = np.zeros(num_slots, bool)
        self._needs_full = np.zeros(num_slots, bool)
        self._vocab_size = vocab_size

    def set(self, slot: int, asked: CoreRequest) -> None:
        row = self._numbers[slot]
        row[[0, 2, 3]] = np.asarray([asked.temperature, asked.top_p, asked.min_p], np.float32).view(np.int32)
        row[1] = asked.top_k
        row[4:6] = np.asarray(asked.prng_key, np.uint32).view(np.int32)
        ends = tuple(dict.fromkeys((*asked.eos_token_ids, *asked.stop_token_ids)))
        assert len(ends) <= MAX_HELD_BACK_TOKENS or (asked.needs_host and not asked.min_tokens)
        held_back = ends[:MAX_HELD_BACK_TOKENS]
        row[6] = len(asked.prompt_token_ids) + asked.min_tokens if asked.min_tokens else 0
        self._held_back[slot] = self._vocab_size
        self._held_back[slot, : len(held_back)] = held_back
        self._samples[slot] = asked.temperature > 0 or bool(asked.min_tokens and held_back)
        self._needs_full[slot] = asked.needs_full

    def mode(self, slots: NDArray[np.int32]) -> SamplingMode:
        """The least that a step over these slots needs."""
        if self._least is SamplingMode.FULL or self._needs_full[slots].any():
            return SamplingMode.FULL
        return SamplingMode.SAMPLE if self._samples[slots].any() else self._least

    def copy_into(self, view: dict[str, NDArray[np.int32]], slots: NDArray[np.int32]) -> None:
        view["parameters"][: len(slots)] = self._numbers[slots]
        view["held_back"][: len(slots)] = self._held_back[slots]


def order_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The order of a step's rows: one-token ranges first, those with like context lengths side by side, then the
    longer ranges.
    """
    decodes = [chunk for chunk in chunks if chunk.length == 1]
    decodes.sort(key=lambda chunk: chunk.start)
    return decodes + [chunk for chunk in chunks if chunk.length > 1]


def pack_batch(
    chunks: Sequence[Chunk], page_updates: NDArray[np.int32], layout: BatchLayout, parameters: SlotParameters
) -> NDArray[np.int32]:
    """Write a step's ordered chunks, and as many page updates as it has room for, into a new buffer of the layout."""
    buffer = np.zeros(layout.size, np.int32)
    view = {name: buffer[span].reshape(shape) for name, (span, shape) in layout.fields.items()}
    count = len(chunks)
    lengths = np.fromiter((chunk.length for chunk in chunks), np.int32, count)
    slots = np.fromiter((chunk.slot for chunk in chunks), np.int32, count)
    starts = view["query_starts"]
    np.cumsum(lengths, out=starts[1 : count + 1])
    starts[count + 1 :] = starts[count]
    view["kv_lengths"][:count] = np.fromiter((chunk.start for chunk in chunks), np.int32, count) + lengths
    view["slots"][:count] = slots
    view["slots"][count:] = layout.num_slots
    view["num_draws"][:count] = np.fromiter((chunk.num_draws for chunk in chunks), np.int32, count)
    view["num_decodes"][0] = int((lengths == 1).sum())
    parameters.copy_into(view, slots)
    if "adapters" in view:
        view["adapters"][count:] = NO_ADAPTER
        view["adapters"][:count] = np.fromiter((chunk.request.adapter_slot for chunk in chunks), np.int32, count)
    _pack_tokens(view["tokens"], chunks)
    view["page_updates"][: len(page_updates)] = page_updates
    view["page_updates"][len(page_updates) :, 0] = layout.num_table_rows
    return buffer


def _pack_tokens(tokens: NDArray[np.int32], chunks: Sequence[Chunk]) -> None:
    """Token ids as far as the host knows them; the one past them is taken from the device."""
    row = 0
    for chunk in chunks:
        known = chunk.request.tokens
        if chunk.drafts:
            tokens[row : row + chunk.length] = (known[chunk.start], *chunk.drafts)
        elif chunk.length == 1:
            tokens[row] = known[chunk.start] if chunk.start < len(known) else TAKE_LAST
        else:
            tokens[row : row + chunk.length] = known[chunk.start : chunk.start + chunk.length]
        row += chunk.length


def page_updates_of(chunks: Sequence[Chunk], layout: BatchLayout) -> NDArray[np.int32]:
    """The block table entries that a step changes: row of the tables, index in it, page."""
    updates = np.empty((sum(len(chunk.new_pages) for chunk in chunks), 3), np.int32)
    row = 0
    for chunk in chunks:
        if count := len(chunk.new_pages):
            block = updates[row : row + count]
            block[:, 0] = chunk.slot
            block[:, 1] = range(chunk.first_new_page, chunk.first_new_page + count)
            block[:, 2] = chunk.new_pages
            row += count
    if layout.num_groups > 1:
        index, group = np.divmod(updates[:, 1], layout.num_groups)
        updates[:, 0] += group * layout.num_slots
        updates[:, 1] = index
    return updates[updates[:, 2] != NO_PAGE]


def write_block_tables(block_tables: Int[Array, "rows M"], updates: Int[Array, "U 3"]) -> Int[Array, "rows M"]:
    """`block_tables` with page updates written; those of the row `rows`, past the last, are padding."""
    row, index, page = updates.T
    return block_tables.at[row, index].set(page, mode="drop")
