"""The one step function: tokens in, next tokens out, the device state replaced.

A plan of decodes alone may have several tokens a row: the same step, looped over on the device (`decode_loop.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_engine.decode_loop import decode_loop
from jax_engine.loader import ModelStructure
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.row_blocks import by_blocks
from jax_engine.sampler import SamplingMode, SamplingRows, sample
from jax_engine.sharding import Placement
from jax_engine.step_batch import TAKE_LAST, BatchLayout, Bucket, StepBatch, write_block_tables


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What stays on the device between steps; donated to each step and replaced by its result."""

    cache: KVPages
    block_tables: Int[Array, "rows M"]  # pages of the sequence in each slot, one cache group's slots after another's
    last_tokens: Int[Array, " slots"]  # the token each slot drew last

    @classmethod
    def zeros(
        cls, cache_shape: tuple[int, ...], dtype: jnp.dtype, *, num_slots: int, num_groups: int, max_pages: int
    ) -> "DeviceState":
        return cls(
            KVPages.zeros(cache_shape, dtype),
            jnp.zeros((num_groups * num_slots, max_pages), jnp.int32),
            jnp.zeros(num_slots, jnp.int32),
        )


@dataclass(frozen=True, order=True)
class Program:
    """The compile key of a step: everything that shapes its executable beside the model and the shardings."""

    bucket: Bucket
    mode: SamplingMode
    num_steps: int = 1  # above 1: a loop over decodes, of up to so many tokens a row

    def __str__(self) -> str:
        loop = f", up to {self.num_steps} steps" if self.num_steps > 1 else ""
        return f"{self.bucket.num_tokens} tokens x {self.bucket.num_sequences} sequences, {self.mode}{loop}"

    def holds(self, num_tokens: int, num_sequences: int, num_steps: int) -> bool:
        is_of_kind = (self.num_steps > 1) == (num_steps > 1)
        return is_of_kind and num_steps <= self.num_steps and self.bucket.holds(num_tokens, num_sequences)


StepFunction = Callable[[tuple[jax.Array, ...], DeviceState, Int[Array, " W"]], tuple[DeviceState, Int[Array, "K B"]]]


def step_function(
    structure: ModelStructure,
    layout: BatchLayout,
    mode: SamplingMode,
    placement: Placement,
    row_block: int | None = None,
    *,
    num_steps: int = 1,
) -> StepFunction:
    """The function that a step program compiles, for one layout, one sampling mode and one number of steps.

    It takes the model's flat leaves, the device state (donate it) and a packed buffer, and returns the new state and
    the tokens drawn for each row of the batch: one, or with more steps those up to its end and then `NO_TOKEN`. Token
    rows, and then sequences, go through it `row_block` at a time, which divides the bucket's sizes; all at once without
    it.
    """
    num_tokens = layout.bucket.num_tokens

    def step(
        leaves: tuple[jax.Array, ...], state: DeviceState, buffer: Int[Array, " W"]
    ) -> tuple[DeviceState, Int[Array, "K B"]]:
        model = structure.merge(leaves)
        batch = StepBatch.unpack(buffer, layout)

        def run(
            tokens: Int[Array, " T"],
            cache: KVPages,
            sequences: SequenceTable,
            last_rows: Int[Array, " B"],
            rows: SamplingRows,
        ) -> tuple[KVPages, Int[Array, " B"]]:
            cache, hidden = run_model(model, tokens, cache, sequences, row_block)
            given = replace(batch, sampling=rows)
            return cache, draw_tokens(model, hidden[last_rows], given, mode, placement, row_block)

        block_tables = write_block_tables(state.block_tables, batch.page_updates)
        first_rows = layout.num_slots * jnp.arange(layout.num_groups)[:, None]
        sequences = SequenceTable.build(
            block_tables[first_rows + jnp.minimum(batch.slots, layout.num_slots - 1)],
            batch.query_starts,
            batch.kv_lengths,
            batch.num_decodes,
            num_tokens=num_tokens,
        )
        last = jnp.append(state.last_tokens, 0)[jnp.append(batch.slots, layout.num_slots)[sequences.token_sequences]]
        tokens = jnp.where(batch.tokens == TAKE_LAST, last, batch.tokens)
        if num_steps > 1:
            cache, latest, drawn = decode_loop(run, state.cache, sequences, tokens, batch, num_steps=num_steps)
        else:
            last_rows = jnp.maximum(batch.query_starts[1:] - 1, 0)
            cache, latest = run(tokens, state.cache, sequences, last_rows, batch.sampling)
            drawn = latest[None]
        kept = jnp.where(batch.num_draws > 0, batch.slots, layout.num_slots)
        last_tokens = state.last_tokens.at[kept].set(latest, mode="drop")
        return DeviceState(cache, block_tables, last_tokens), drawn

    return step


def run_model(
    model: LlamaForCausalLM,
    tokens: Int[Array, " T"],
    cache: KVPages,
    sequences: SequenceTable,
    row_block: int | None,
) -> tuple[KVPages, Float[Array, "T D"]]:
    """The cache with the step's tokens in it, and their hidden states.

    A block finds what the blocks before it wrote in the cache, so a range may lie in several.
    """

    def run(cache: KVPages, tokens: Int[Array, " R"], sequences: SequenceTable) -> tuple[KVPages, Float[Array, "R D"]]:
        hidden, written = model(tokens, sequences.positions, cache, sequences)
        assert isinstance(written, KVPages)
        return written, hidden

    if row_block is None:
        return run(cache, tokens, sequences)

    def block(first: Int[Array, ""], cache: KVPages) -> tuple[KVPages, Float[Array, "R D"]]:
        return run(cache, lax.dynamic_slice_in_dim(tokens, first, row_block), sequences.block(first, row_block))

    embedding = model.model.embed_tokens.weight
    rows = jax.ShapeDtypeStruct((tokens.shape[0], embedding.shape[1]), embedding.dtype)
    return by_blocks(block, cache, rows=rows, size=row_block, used=sequences.query_starts[-1])


def draw_tokens(
    model: LlamaForCausalLM,
    hidden: Float[Array, "B D"],
    batch: StepBatch,
    mode: SamplingMode,
    placement: Placement,
    row_block: int | None,
) -> Int[Array, " B"]:
    """The next token of each sequence, from the hidden state of its last token."""

    def draw(hidden: Float[Array, "R D"], rows: SamplingRows) -> Int[Array, " R"]:
        logits = model.compute_logits(hidden)
        if mode is not SamplingMode.GREEDY:
            # A row's draw sums over the vocabulary dozens of times: on one device, and in the same order on any mesh.
            logits = placement.by_rows(logits, (None, "vocab"))
            rows = jax.tree.map(lambda column: placement.by_rows(column, ()), rows)
        return placement.constrain(sample(logits, rows, mode), ())

    if row_block is None:
        return draw(hidden, batch.sampling)

    def block(first: Int[Array, ""], nothing: None) -> tuple[None, Int[Array, " R"]]:
        part = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=row_block)
        return nothing, draw(part(hidden), jax.tree.map(part, batch.sampling))

    rows = jax.ShapeDtypeStruct(hidden.shape[:1], jnp.int32)
    used = jnp.sum(batch.kv_lengths > 0)  # padding follows the sequences
    return by_blocks(block, None, rows=rows, size=row_block, used=used)[1]
