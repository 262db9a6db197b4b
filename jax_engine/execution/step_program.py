"""The one step function: tokens in, next tokens out, the device state replaced.

A plan of decodes alone may have several tokens a row: the same step, looped over on the device (`decode_loop.py`).
A step of the FULL mode is two programs (`full_program.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_engine.execution.decode_loop import decode_loop
from jax_engine.execution.row_blocks import by_blocks
from jax_engine.execution.step_batch import TAKE_LAST, BatchLayout, Bucket, StepBatch, write_block_tables
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.sampling.sampler import SamplingMode, SamplingRows, likeliest_of_parts, sample
from jax_engine.scheduling.step_plan import TAKE_DRAFT
from jax_engine.sharding.sharding import Placement
from jax_engine.speculation.draft_rows import DraftRows

Rows = TypeVar("Rows")  # pytrees of arrays with one entry for each row
Results = TypeVar("Results")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What stays on the device between steps; donated to each step and replaced by its result."""

    cache: KVPages
    block_tables: Int[Array, "rows M"]  # pages of the sequence in each slot, one cache group's slots after another's
    last_tokens: Int[Array, " slots"]  # the token each slot drew last
    draft_cache: KVPages | None = None  # of a draft model, in pages of the same numbers
    drafts: Int[Array, "slots K"] | None = None  # what it drafted last

    @classmethod
    def zeros(cls, cache: KVPages, *, num_slots: int, num_groups: int, max_pages: int) -> "DeviceState":
        return cls(
            cache,
            jnp.zeros((num_groups * num_slots, max_pages), jnp.int32),
            jnp.zeros(num_slots, jnp.int32),
        )

    def with_draft_cache(self, cache: KVPages, *, num_drafts: int) -> "DeviceState":
        """With room for what a draft model keeps: a cache, and `num_drafts` tokens a slot."""
        drafts = jnp.zeros((self.last_tokens.shape[0], num_drafts), jnp.int32)
        return replace(self, draft_cache=cache, drafts=drafts)


@dataclass(frozen=True, order=True)
class Program:
    """The compile key of a step: everything that shapes its executable beside the model and the shardings."""

    bucket: Bucket
    mode: SamplingMode
    num_steps: int = 1  # above 1: a loop over decodes, of up to so many tokens a row
    draft_rows: int = 0  # above 0: tokens are drawn from so many rows, several a sequence where that has drafts
    num_drafts: int = 0  # above 0: of the draft model, which drafts up to so many tokens (`draft_program.py`)
    is_draw: bool = False  # it draws from as many rows as the bucket has tokens, what another has left to draw

    @property
    def draw(self) -> "Program | None":
        """What draws behind it: a step of the FULL mode is two programs (`full_program.py`)."""
        if self.mode is not SamplingMode.FULL or self.is_draw:
            return None
        bucket = Bucket(self.draft_rows or self.bucket.num_sequences, self.bucket.num_sequences)
        return Program(bucket, self.mode, draft_rows=self.draft_rows, is_draw=True)

    @property
    def parts(self) -> "tuple[Program, ...]":
        """All that a step of it runs: what draws behind it, if anything does, and itself."""
        return (self,) if self.draw is None else (self.draw, self)

    def __str__(self) -> str:
        if self.is_draw:
            drafts = " with drafts" if self.draft_rows else ""
            return f"draws from {self.bucket.num_tokens} rows{drafts} of {self.bucket.num_sequences} sequences"
        if self.num_drafts:
            return f"{self.bucket.num_tokens} tokens x {self.bucket.num_sequences} sequences of the draft model"
        loop = f", up to {self.num_steps} steps" if self.num_steps > 1 else ""
        drafts = f", {self.draft_rows} rows with drafts" if self.draft_rows else ""
        return f"{self.bucket.num_tokens} tokens x {self.bucket.num_sequences} sequences, {self.mode}{loop}{drafts}"

    def can_do(self, mode: SamplingMode) -> bool:
        """Whether it serves steps of a mode: its own and those before it. One of the draft model serves none, nor does
        one that only draws.
        """
        modes = list(SamplingMode)
        return not self.num_drafts and not self.is_draw and modes.index(self.mode) >= modes.index(mode)

    def holds(self, num_tokens: int, num_sequences: int, num_steps: int, draft_rows: int) -> bool:
        is_of_kind = (self.num_steps > 1, self.draft_rows > 0) == (num_steps > 1, draft_rows > 0)
        is_long_enough = num_steps <= self.num_steps and draft_rows <= self.draft_rows
        return is_of_kind and is_long_enough and self.bucket.holds(num_tokens, num_sequences)


StepFunction = Callable[[tuple[jax.Array, ...], DeviceState, Int[Array, " W"]], tuple[DeviceState, Int[Array, "K B"]]]


def step_function(
    structure: ModelStructure,
    layout: BatchLayout,
    mode: SamplingMode,
    placement: Placement,
    row_block: int | None = None,
    *,
    num_steps: int = 1,
    draft_rows: int = 0,
) -> StepFunction:
    """The function that a step program compiles, for one layout, one sampling mode and one number of steps.

    It takes the model's flat leaves, the device state (donate it) and a packed buffer, and returns the new state and
    the tokens drawn for each row of the batch: one, or with more steps those up to its end and then `NO_TOKEN`. Token
    rows, and then sequences, go through it `row_block` at a time, which divides the bucket's sizes; all at once without
    it. With `draft_rows`, the tokens are those drawn behind the last rows of each sequence, as many as its `num_draws`,
    one sequence after another, in as many rows.
    """
    assert mode is not SamplingMode.FULL

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
            draw = partial(_draw, mode=mode, placement=placement)
            cache, hidden = run_model(model, tokens, cache, sequences, row_block)
            # A draw sums a row over the vocabulary dozens of times: on one device, and in the same order on any mesh.
            by_rows = mode is not SamplingMode.GREEDY
            return cache, draw_tokens(
                model, hidden[last_rows], batch.num_used, draw, rows, placement, row_block, by_rows=by_rows
            )

        block_tables, sequences, tokens = take_batch(state, batch, layout)
        if num_steps > 1:
            cache, latest, drawn = decode_loop(run, state.cache, sequences, tokens, batch, num_steps=num_steps)
        else:
            last_rows, rows = batch.last_rows, batch.sampling
            if draft_rows:
                drafted = DraftRows.of(batch, draft_rows)
                last_rows, rows = drafted.rows, drafted.sampling(batch)
            cache, latest = run(tokens, state.cache, sequences, last_rows, rows)
            drawn = latest[None]
            if draft_rows:
                latest = latest[drafted.lasts]
        last_tokens = keep_tokens(state.last_tokens, batch.slots, batch.num_draws, latest)
        return replace(state, cache=cache, block_tables=block_tables, last_tokens=last_tokens), drawn

    return step


def _draw(
    logits: Float[Array, "R V"], rows: SamplingRows, *, mode: SamplingMode, placement: Placement
) -> Int[Array, " R"]:
    """The next token of each row, of logits that lie by rows or, in the GREEDY mode, by the vocabulary."""
    if mode is SamplingMode.GREEDY:
        return likeliest_of_parts(logits, placement.activations, placement.vocab_size or logits.shape[1])
    return sample(logits, rows, mode, placement.mesh)


def take_batch(
    state: DeviceState, batch: StepBatch, layout: BatchLayout
) -> tuple[Int[Array, "rows M"], SequenceTable, Int[Array, " T"]]:
    """The block tables with a step's page updates, its sequences, and its tokens, those that only the device knows
    included.
    """
    block_tables = write_block_tables(state.block_tables, batch.page_updates)
    first_rows = layout.num_slots * jnp.arange(layout.num_groups)[:, None]
    sequences = SequenceTable.build(
        block_tables[first_rows + jnp.minimum(batch.slots, layout.num_slots - 1)],
        batch.query_starts,
        batch.kv_lengths,
        batch.num_decodes,
        num_tokens=layout.bucket.num_tokens,
    )
    if batch.adapters is not None:
        sequences = sequences.with_adapters(batch.adapters, layout.num_adapters)
    slots = jnp.append(batch.slots, layout.num_slots)[sequences.token_sequences]
    tokens = jnp.where(batch.tokens == TAKE_LAST, jnp.append(state.last_tokens, 0)[slots], batch.tokens)
    if state.drafts is not None:
        drafted = state.drafts.at[slots, jnp.maximum(TAKE_DRAFT - tokens, 0)].get(mode="clip")
        tokens = jnp.where(tokens <= TAKE_DRAFT, drafted, tokens)
    return block_tables, sequences, tokens


def keep_tokens(
    last_tokens: Int[Array, " slots"], slots: Int[Array, " B"], num_draws: Int[Array, " B"], latest: Int[Array, " B"]
) -> Int[Array, " slots"]:
    """The last tokens of all slots, with those that a step drew to be kept."""
    kept = jnp.where(num_draws > 0, slots, last_tokens.shape[0])
    return last_tokens.at[kept].set(latest, mode="drop")


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

    # Decodes take the way of longer ranges: whether a row is one of them must not show in its numbers.
    ranges = replace(sequences, num_decodes=jnp.zeros((), jnp.int32))

    def block(first: Int[Array, ""], cache: KVPages) -> tuple[KVPages, Float[Array, "R D"]]:
        return run(cache, lax.dynamic_slice_in_dim(tokens, first, row_block), ranges.block(first, row_block))

    return by_blocks(block, cache, num_rows=tokens.shape[0], size=row_block, used=sequences.query_starts[-1])


def draw_tokens(
    model: LlamaForCausalLM,
    hidden: Float[Array, "B D"],
    num_used: Int[Array, ""],
    draw: Callable[[Float[Array, "R V"], Rows], Results],
    rows: Rows,
    placement: Placement,
    row_block: int | None,
    *,
    by_rows: bool = True,
) -> Results:
    """What `draw` makes of the logits of hidden states and their `rows`, of which the first `num_used` count.

    `by_rows` moves logits and rows so that each row is whole on one device of a mesh: no device holds the logits of all
    rows, nor the vocabulary of more than its share of them.
    """

    def draw_rows(hidden: Float[Array, "R D"], rows: Rows) -> Results:
        logits = model.compute_logits(hidden)
        if by_rows:
            logits = placement.by_rows(logits, (None, "vocab"))[:, : placement.vocab_size]
            rows = jax.tree.map(lambda column: placement.by_rows(column, ()), rows)
        results = draw(logits, rows)
        return jax.tree.map(lambda column: placement.constrain(column, ())[: hidden.shape[0]], results)

    if row_block is None:
        return draw_rows(hidden, rows)

    def block(first: Int[Array, ""], nothing: None) -> tuple[None, Results]:
        part = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=row_block)
        return nothing, draw_rows(part(hidden), jax.tree.map(part, rows))

    return by_blocks(block, None, num_rows=hidden.shape[0], size=row_block, used=num_used)[1]
