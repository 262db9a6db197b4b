"""The paged KV cache and the table that says which pages a step's tokens use: the one place that knows the layout.

Layout: `[layers, pages, planes, kv_heads, page_size, width]`. A page of one layer is contiguous, which is one DMA on a
TPU, the HND order of paged libraries on a GPU, and a plain gather for XLA. What lies in planes and width is the
attention implementation's business: K and V in planes of their own (`split_page_shape`), or padded to a TPU's lanes, or
side by side in them.

Layers that see equally far back form cache groups (`CacheLayout`), each with a block table of its own. A page belongs
to one group at a time and has room for its layers alone; all groups have equally many, so any page serves any group.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jax_engine.cuda_fallback.searching import rows_of
from jax_engine.models.adapters import NO_ADAPTER, AdapterRows

PageShape = tuple[int, int, int, int]  # planes, kv_heads, page_size, width
ATTENTION_SCOPE = "attention"  # what attention is traced under, in profiles and in programs' texts
PAGE_AXES = ("cache_layers", "pages", None, "kv_heads")  # by which a cache is split over devices


MAX_CACHE_GROUPS = 8  # a step's host work and block tables grow with the groups


@dataclass(frozen=True)
class CacheLayout:
    """Which cache group each decoder layer belongs to, and which of a page's layers it is there.

    A model of layers that see equally far is one group. Of a model that mixes them, a page of a sliding layer can be
    given up when its tokens have left the window, while one of a full layer cannot: they must not be one page. After
    the hybrid KV cache of vLLM (`vllm/v1/core/kv_cache_utils.py`), pages are made equal, to share one pool.
    """

    windows: tuple[int, ...]  # of each group: tokens that its layers see, the current one too; 0: all
    layers_a_page: int
    groups: tuple[int, ...]  # of each layer
    places: tuple[int, ...]  # of each layer: below layers_a_page

    @classmethod
    def of(cls, windows: Sequence[int | None], max_model_len: int) -> "CacheLayout":
        """The layout for layers with these windows.

        Of all numbers of layers a page, the one that makes a sequence of `max_model_len` tokens smallest: layers that
        do not fill their last group waste its rest. At most `MAX_CACHE_GROUPS` groups, or one for each window.
        """
        counts = Counter(window or 0 for window in windows)
        kinds = sorted(counts)

        def num_groups(size: int) -> dict[int, int]:
            return {kind: -(-counts[kind] // size) for kind in kinds}

        def cost(size: int) -> tuple[int, int]:
            groups = num_groups(size)
            tokens = sum(groups[kind] * min(kind or max_model_len, max_model_len) for kind in kinds)
            return size * tokens, sum(groups.values())

        most = max(MAX_CACHE_GROUPS, len(kinds))
        size = min((s for s in range(1, max(counts.values()) + 1) if sum(num_groups(s).values()) <= most), key=cost)
        firsts, before = {}, 0
        for kind, number in num_groups(size).items():
            firsts[kind] = before
            before += number
        seen: Counter[int] = Counter()
        groups, places = [], []
        for window in windows:
            kind = window or 0
            # In turn, so that layers which repeat in a pattern tend to keep one group for each place of it.
            number = num_groups(size)[kind]
            groups.append(firsts[kind] + seen[kind] % number)
            places.append(seen[kind] // number)
            seen[kind] += 1
        of_groups = tuple(kind for kind in kinds for _ in range(num_groups(size)[kind]))
        return cls(of_groups, size, tuple(groups), tuple(places))

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    def describe(self) -> str:
        """How many layers see how far, and what they share, in one sentence."""
        seen = Counter(self.windows[group] for group in self.groups)
        kinds = (f"{count} layers see {f'{window} tokens' if window else 'all'}" for window, count in seen.items())
        return f"{', '.join(kinds)}; in {self.num_groups} of up to {self.layers_a_page} layers a page"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """The cache of all layers; updated functionally, in place once XLA has donated it.

    Where XLA handles 8-bit floats badly (`cuda_fallback/stored_pages.py`), `data` is their bits, `bits_of` their type.
    """

    data: Float[Array, "L P C K S W"]
    bits_of: str | None = field(default=None, metadata={"static": True})

    @property
    def num_pages(self) -> int:
        return self.data.shape[1]

    @property
    def num_heads(self) -> int:
        return self.data.shape[3]

    @property
    def page_size(self) -> int:
        return self.data.shape[4]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: jnp.dtype, *, as_bits: bool = False) -> "KVPages":
        """`as_bits` of an 8-bit float."""
        return cls(jnp.zeros(shape, jnp.uint8), jnp.dtype(dtype).name) if as_bits else cls(jnp.zeros(shape, dtype))


def split_page_shape(num_kv_heads: int, page_size: int, head_dim: int) -> PageShape:
    """A page of one layer with keys in plane 0 and values in plane 1, each head as wide as it is."""
    return 2, num_kv_heads, page_size, head_dim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceTables:
    """What one device's attention kernel works through where pages are divided between devices (`device_tables.py`):
    the tables of the kernels' calling convention, with its own page numbers; and which of the step's token rows its
    rows are. Between programs of single devices, those of all devices are stacked.
    """

    block_tables: Int[Array, "*tables B M"]
    query_starts: Int[Array, "*devices B+1"]
    kv_lengths: Int[Array, "*devices B"]
    num_decodes: Int[Array, "*devices"]
    token_sequences: Int[Array, "*devices T"]
    positions: Int[Array, "*devices T"]
    rows: Int[Array, "*devices T"]  # T for padding

    @property
    def convention(self) -> tuple[Array, ...]:
        """The tables in the order of the kernels' calling convention."""
        return (
            self.block_tables,
            self.query_starts,
            self.kv_lengths,
            self.num_decodes,
            self.token_sequences,
            self.positions,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceTable:
    """Which sequence, position and page each of a step's tokens belongs to.

    The step's T token rows are the sequences' ranges one after the other. The first `num_decodes` sequences have a
    range of one token (so decode rows are rows `0..num_decodes-1`); longer ranges follow. Padding sequences have a
    range of zero and `kv_lengths` of zero; padding tokens lie past `query_starts[-1]` and have the position 0.
    """

    # Page of each page_size-long part of a sequence; entries past its length or before its window are ignored. One
    # table a cache group, until `of_group` has taken one.
    block_tables: Int[Array, "*groups B M"]
    query_starts: Int[Array, "B+1"]  # first token row of each sequence; the last entry is the number of real tokens
    kv_lengths: Int[Array, " B"]  # tokens of the sequence in the cache once this step has written its own
    num_decodes: Int[Array, ""]
    token_sequences: Int[Array, " T"]  # the sequence of each token row; B for padding
    positions: Int[Array, " T"]
    # What the attention kernel works through, where it wants that once a step (see `Ops.prepare`): arrays of its own,
    # with a first axis of cache groups until `of_group` has taken one.
    work: PyTree[Array] | None = None
    adapters: AdapterRows | None = None  # in an engine that has any
    on_devices: DeviceTables | None = None  # of each device, stacked, where pages are divided between them

    @classmethod
    def build(
        cls,
        block_tables: Int[Array, "*groups B M"],
        query_starts: Int[Array, "B+1"],
        kv_lengths: Int[Array, " B"],
        num_decodes: Int[Array, ""],
        *,
        num_tokens: int,
    ) -> "SequenceTable":
        """Derive the per-token vectors for `num_tokens` (static) token rows."""
        num_sequences = kv_lengths.shape[0]
        rows = jnp.arange(num_tokens, dtype=jnp.int32)
        # A row belongs to the last sequence that starts at or before it; rows past the end, to sequence B.
        token_sequences = rows_of(rows, query_starts[1:])
        owner = jnp.minimum(token_sequences, num_sequences - 1)
        lengths = query_starts[1:] - query_starts[:-1]
        positions = (kv_lengths - lengths)[owner] + rows - query_starts[owner]
        positions = jnp.where(rows < query_starts[-1], positions, 0)
        return cls(block_tables, query_starts, kv_lengths, num_decodes, token_sequences, positions)

    def block(self, first: Int[Array, ""], size: int) -> "SequenceTable":
        """The table of token rows `first` to `first + size`, for a step that runs them after all rows before them.

        Its sequences are those that have such rows, in their order, so that decodes still lead; without any where
        `first` is the number of rows.
        """
        num_sequences = self.kv_lengths.shape[0]
        index = jnp.append(self.token_sequences, num_sequences)[first] + jnp.arange(min(size, num_sequences) + 1)
        starts = self.query_starts[jnp.minimum(index, num_sequences)]
        owners = jnp.minimum(index[:-1], num_sequences - 1)
        past_block = starts[1:] - jnp.clip(first + size, starts[:-1], starts[1:])
        table = SequenceTable.build(
            self.block_tables[..., owners, :],
            jnp.clip(starts - first, 0, size),
            jnp.where(index[:-1] < num_sequences, self.kv_lengths[owners] - past_block, 0),
            jnp.clip(self.num_decodes - first, 0, size),
            num_tokens=size,
        )
        return replace(table, adapters=None if self.adapters is None else self.adapters.block(first, size))

    def with_adapters(self, slots: Int[Array, " B"], num_slots: int) -> "SequenceTable":
        """The table of sequences that have the adapters of these slots, or `NO_ADAPTER`, of `num_slots` (static)."""
        of_rows = jnp.append(slots, NO_ADAPTER)[self.token_sequences]
        return replace(self, adapters=AdapterRows.of(of_rows, num_slots))

    def of_group(self, group: int | Int[Array, ""]) -> "SequenceTable":
        """What the layers of one cache group work with."""
        work = jax.tree.map(lambda array: array[group], self.work)
        own = self.on_devices
        if own is not None:
            own = replace(own, block_tables=own.block_tables[:, group])
        return replace(self, block_tables=self.block_tables[group], work=work, on_devices=own)
