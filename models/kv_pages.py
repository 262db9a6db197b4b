"""The paged KV cache and the table that says which pages a step's tokens use: the one place that knows the layout.

Layout: `[layers, pages, planes, kv_heads, page_size, width]`. One block table serves every layer. A page of one layer
is contiguous, which is one DMA on a TPU, the HND order of paged libraries on a GPU, and a plain gather for XLA. What
lies in planes and width is the attention implementation's business: K and V in planes of their own
(`split_page_shape`), or padded to a TPU's lanes, or side by side in them.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

PageShape = tuple[int, int, int, int]  # planes, kv_heads, page_size, width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPages:
    """The cache of all layers; updated functionally, in place once XLA has donated it."""

    data: Float[Array, "L P C K S W"]

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
    def zeros(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> "KVPages":
        return cls(jnp.zeros(shape, dtype))


def split_page_shape(num_kv_heads: int, page_size: int, head_dim: int) -> PageShape:
    """A page of one layer with keys in plane 0 and values in plane 1, each head as wide as it is."""
    return 2, num_kv_heads, page_size, head_dim


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceTable:
    """Which sequence, position and page each of a step's tokens belongs to.

    The step's T token rows are the sequences' ranges one after the other. The first `num_decodes` sequences have a
    range of one token (so decode rows are rows `0..num_decodes-1`); longer ranges follow. Padding sequences have a
    range of zero and `kv_lengths` of zero; padding tokens lie past `query_starts[-1]` and have the position 0.
    """

    block_tables: Int[
        Array, "B M"
    ]  # page of each page_size-long part of a sequence; entries past its length are ignored
    query_starts: Int[Array, "B+1"]  # first token row of each sequence; the last entry is the number of real tokens
    kv_lengths: Int[Array, " B"]  # tokens of the sequence in the cache once this step has written its own
    num_decodes: Int[Array, ""]
    token_sequences: Int[Array, " T"]  # the sequence of each token row; B for padding
    positions: Int[Array, " T"]
    # What the attention kernel works through, by window (0: none), where it wants that once a step (see `Ops.prepare`).
    work: dict[int, Int[Array, " W"]] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        block_tables: Int[Array, "B M"],
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
        token_sequences = jnp.searchsorted(query_starts[1:], rows, side="right").astype(jnp.int32)
        owner = jnp.minimum(token_sequences, num_sequences - 1)
        lengths = query_starts[1:] - query_starts[:-1]
        positions = (kv_lengths - lengths)[owner] + rows - query_starts[owner]
        positions = jnp.where(rows < query_starts[-1], positions, 0)
        return cls(block_tables, query_starts, kv_lengths, num_decodes, token_sequences, positions)

    def block(self, first: Int[Array, ""], size: int) -> "SequenceTable":
        """The table of token rows `first` to `first + size`, for a step that runs them after all rows before them.

        Ranges of one token are none of its decodes, since they need not lead: sequences outside of the block are
        there with a range of zero.
        """
        ends = self.query_starts[1:]
        return SequenceTable(
            self.block_tables,
            jnp.clip(self.query_starts - first, 0, size),
            self.kv_lengths - (ends - jnp.clip(first + size, self.query_starts[:-1], ends)),
            jnp.zeros((), jnp.int32),
            lax.dynamic_slice_in_dim(self.token_sequences, first, size),
            lax.dynamic_slice_in_dim(self.positions, first, size),
        )
