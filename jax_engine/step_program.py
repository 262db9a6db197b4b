"""The one step function: tokens in, next tokens out, the device state replaced.

A plan of decodes alone may have several tokens a row: the same step, looped over on the device (`decode_loop.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_engine.decode_loop import decode_loop
from jax_engine.draft_rows import DraftRows
from jax_engine.full_sampling import FullInputs, FullResults, FullRows, FullState, sample_full
from jax_engine.logits_processors import LogitsProcessor
from jax_engine.logprobs import RowLogprobs, prompt_block, prompt_logprobs
from jax_engine.model_structure import ModelStructure
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.pooling import pool_rows
from jax_engine.row_blocks import by_blocks
from jax_engine.sampler import SamplingMode, SamplingRows, likeliest_of_parts, sample
from jax_engine.sharding import Placement
from jax_engine.step_batch import TAKE_LAST, BatchLayout, Bucket, StepBatch, write_block_tables
from jax_engine.step_plan import TAKE_DRAFT

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
    def zeros(
        cls, cache_shape: tuple[int, ...], dtype: jnp.dtype, *, num_slots: int, num_groups: int, max_pages: int
    ) -> "DeviceState":
        return cls(
            KVPages.zeros(cache_shape, dtype),
            jnp.zeros((num_groups * num_slots, max_pages), jnp.int32),
            jnp.zeros(num_slots, jnp.int32),
        )

    def with_draft_cache(self, cache_shape: tuple[int, ...], dtype: jnp.dtype, *, num_drafts: int) -> "DeviceState":
        """With room for what a draft model keeps: a cache, and `num_drafts` tokens a slot."""
        drafts = jnp.zeros((self.last_tokens.shape[0], num_drafts), jnp.int32)
        return replace(self, draft_cache=KVPages.zeros(cache_shape, dtype), drafts=drafts)


@dataclass(frozen=True, order=True)
class Program:
    """The compile key of a step: everything that shapes its executable beside the model and the shardings."""

    bucket: Bucket
    mode: SamplingMode
    num_steps: int = 1  # above 1: a loop over decodes, of up to so many tokens a row
    draft_rows: int = 0  # above 0: tokens are drawn from so many rows, several a sequence where that has drafts
    num_drafts: int = 0  # above 0: of the draft model, which drafts up to so many tokens (`draft_program.py`)

    def __str__(self) -> str:
        if self.num_drafts:
            return f"{self.bucket.num_tokens} tokens x {self.bucket.num_sequences} sequences of the draft model"
        loop = f", up to {self.num_steps} steps" if self.num_steps > 1 else ""
        drafts = f", {self.draft_rows} rows with drafts" if self.draft_rows else ""
        return f"{self.bucket.num_tokens} tokens x {self.bucket.num_sequences} sequences, {self.mode}{loop}{drafts}"

    def can_do(self, mode: SamplingMode) -> bool:
        """Whether it serves steps of a mode: its own and those before it. One of the draft model serves none."""
        modes = list(SamplingMode)
        return not self.num_drafts and modes.index(self.mode) >= modes.index(mode)

    def holds(self, num_tokens: int, num_sequences: int, num_steps: int, draft_rows: int) -> bool:
        is_of_kind = (self.num_steps > 1, self.draft_rows > 0) == (num_steps > 1, draft_rows > 0)
        is_long_enough = num_steps <= self.num_steps and draft_rows <= self.draft_rows
        return is_of_kind and is_long_enough and self.bucket.holds(num_tokens, num_sequences)


StepFunction = Callable[[tuple[jax.Array, ...], DeviceState, Int[Array, " W"]], tuple[DeviceState, Int[Array, "K B"]]]
FullStepFunction = Callable[
    [tuple[jax.Array, ...], DeviceState, FullState, Int[Array, " W"], FullInputs],
    tuple[DeviceState, FullState, FullResults],
]


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
                model, hidden[last_rows], batch, draw, rows, placement, row_block, by_rows=by_rows
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
        last_tokens = keep_tokens(state, batch, latest)
        return replace(state, cache=cache, block_tables=block_tables, last_tokens=last_tokens), drawn

    return step


def _draw(
    logits: Float[Array, "R V"], rows: SamplingRows, *, mode: SamplingMode, placement: Placement
) -> Int[Array, " R"]:
    """The next token of each row, of logits that lie by rows or, in the GREEDY mode, by the vocabulary."""
    if mode is SamplingMode.GREEDY:
        return likeliest_of_parts(logits, placement.activations, placement.vocab_size or logits.shape[1])
    return sample(logits, rows, mode)


def full_step_function(
    structure: ModelStructure,
    layout: BatchLayout,
    placement: Placement,
    row_block: int | None = None,
    *,
    num_logprobs: int,
    processors: tuple[LogitsProcessor, ...] = (),
    draft_rows: int = 0,
    num_drafts: int = 0,
) -> FullStepFunction:
    """The function that a step program of the FULL mode compiles: `step_function`'s, which besides takes the slots'
    `FullState` (donate it too) and the step's `FullInputs`, and returns the new state and its `FullResults`, with the
    log-probabilities of the `num_logprobs` likeliest tokens where any are asked for. With `draft_rows`, a sequence has
    at most `num_drafts` drafts.
    """

    def step(
        leaves: tuple[jax.Array, ...],
        state: DeviceState,
        full: FullState,
        buffer: Int[Array, " W"],
        inputs: FullInputs,
    ) -> tuple[DeviceState, FullState, FullResults]:
        model = structure.merge(leaves)
        batch = StepBatch.unpack(buffer, layout)
        block_tables, sequences, tokens = take_batch(state, batch, layout)
        cache, hidden = run_model(model, tokens, state.cache, sequences, row_block)

        def draw(logits: Float[Array, "R V"], rows: FullRows) -> FullResults:
            return sample_full(logits, rows, full, inputs.asks, num_logprobs=num_logprobs, processors=processors)

        drafted = DraftRows.of(batch, draft_rows) if draft_rows else DraftRows.one_each(batch)
        of, vocab_size = drafted.owners, full.counts.shape[1]
        rows = FullRows(
            drafted.sampling(batch),
            batch.slots[of],
            inputs.controlled[of],
            inputs.masks,
            inputs.logprobs[of],
            drafted.before(tokens, num_drafts=num_drafts, no_token=vocab_size) if draft_rows else None,
        )
        results = draw_tokens(model, hidden[drafted.rows], batch, draw, rows, placement, row_block)
        num_kept = jnp.where(inputs.controlled, drafted.num_kept(tokens, results.tokens, batch.num_draws), 0)
        prompt = score_prompts(model, hidden, inputs.targets, placement, row_block, num_logprobs=num_logprobs)
        vectors, pooled = pool_rows(
            hidden, full.vectors, batch.slots, inputs.pooled_rows, in_order=row_block is not None
        )
        last_tokens = keep_tokens(state, batch, results.tokens[drafted.lasts])
        new_state = replace(state, cache=cache, block_tables=block_tables, last_tokens=last_tokens)
        new_full = full.with_drawn(batch.slots, results.tokens, of, drafted.firsts, num_kept)
        return new_state, replace(new_full, vectors=vectors), replace(results, prompt=prompt, pooled=pooled)

    return step


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


def keep_tokens(state: DeviceState, batch: StepBatch, latest: Int[Array, " B"]) -> Int[Array, " slots"]:
    """The last tokens of all slots, with those that a step drew to be kept."""
    kept = jnp.where(batch.num_draws > 0, batch.slots, state.last_tokens.shape[0])
    return state.last_tokens.at[kept].set(latest, mode="drop")


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
    batch: StepBatch,
    draw: Callable[[Float[Array, "R V"], Rows], Results],
    rows: Rows,
    placement: Placement,
    row_block: int | None,
    *,
    by_rows: bool = True,
) -> Results:
    """What `draw` makes of each sequence's logits and its `rows`, from the hidden state of its last token.

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

    used = jnp.sum(batch.kv_lengths > 0)  # padding follows the sequences
    return by_blocks(block, None, num_rows=hidden.shape[0], size=row_block, used=used)[1]


def score_prompts(
    model: LlamaForCausalLM,
    hidden: Float[Array, "T D"],
    targets: Int[Array, " T"],
    placement: Placement,
    row_block: int | None,
    *,
    num_logprobs: int,
) -> RowLogprobs:
    """Log-probabilities of the prompt tokens that are asked about, from the hidden states of those before them."""

    def logits_of(hidden: Float[Array, "R D"]) -> Float[Array, "R V"]:
        return placement.by_rows(model.compute_logits(hidden), (None, "vocab"))[:, : placement.vocab_size]

    block = placement.whole_shares(row_block or prompt_block(hidden.shape[0], model.model.embed_tokens.weight.shape[0]))
    return prompt_logprobs(logits_of, hidden, targets, num_top=num_logprobs, block=block)
