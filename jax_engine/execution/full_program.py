"""A step of the FULL sampling mode, in two programs: the model's forward pass, and the draw from what it leaves.

Only the draw takes masks. So the forward pass of a step is launched before the tokens of the step before are known, and
the host makes the masks that follow from them while it runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_engine.execution.step_batch import BatchLayout, StepBatch, StepRows
from jax_engine.execution.step_program import DeviceState, draw_tokens, keep_tokens, run_model, take_batch
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.sampling.full_sampling import (
    DrawInputs,
    Drawn,
    ForwardInputs,
    ForwardResults,
    FullRows,
    FullState,
    sample_full,
)
from jax_engine.sampling.logits_processors import LogitsProcessor
from jax_engine.sampling.logprobs import RowLogprobs, prompt_block, prompt_logprobs
from jax_engine.sampling.pooling import pool_rows
from jax_engine.sharding.sharding import Placement
from jax_engine.speculation.draft_rows import DraftRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftedRows:
    """The rows to draw from of a step with drafts."""

    rows: DraftRows
    tokens: Int[Array, " D"]  # of the rows themselves
    before: Int[Array, "D K"]  # as `FullRows.drafts`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Undrawn:
    """What is left to do of a FULL step once the model has run; it stays on the device."""

    hidden: Float[Array, "D H"]  # of the rows to draw from
    words: Int[Array, " W"]  # of the step's buffer, as `StepRows` unpacks them
    drafted: DraftedRows | None  # of a step with drafts

    @classmethod
    def zeros(
        cls, num_rows: int, num_sequences: int, hidden_size: int, dtype: DTypeLike, num_drafts: int | None
    ) -> "Undrawn":
        """Of so many rows and sequences; `num_drafts` is None of a step without drafts."""
        of_rows, of_sequences = jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_sequences, jnp.int32)
        drafted: DraftedRows | None = None
        if num_drafts is not None:
            rows = DraftRows(of_rows, of_rows, of_rows, of_rows, of_sequences, of_sequences)
            drafted = DraftedRows(rows, of_rows, jnp.zeros((num_rows, num_drafts), jnp.int32))
        words = jnp.zeros(StepRows.num_words(num_sequences), jnp.int32)
        return cls(jnp.zeros((num_rows, hidden_size), dtype), words, drafted)


ForwardFunction = Callable[
    [tuple[jax.Array, ...], DeviceState, Float[Array, "slots D"], Int[Array, " W"], ForwardInputs],
    tuple[DeviceState, Float[Array, "slots D"], Undrawn, ForwardResults],
]
DrawFunction = Callable[
    [tuple[jax.Array, ...], Int[Array, " slots"], FullState, Undrawn, DrawInputs],
    tuple[Int[Array, " slots"], FullState, Drawn],
]


def forward_function(
    structure: ModelStructure,
    layout: BatchLayout,
    placement: Placement,
    row_block: int | None = None,
    *,
    num_logprobs: int,
    vocab_size: int,
    draft_rows: int = 0,
    num_drafts: int = 0,
) -> ForwardFunction:
    """The function that the first program of a FULL step compiles: all that needs no masks.

    It takes what `step_function`'s does, and besides the `vectors` of the `FullState` (donate them too) and the step's
    `ForwardInputs`. It returns the new state and vectors, what `draw_function`'s needs, and what it finds, with the
    log-probabilities of the `num_logprobs` likeliest tokens where any are asked for. With `draft_rows`, a sequence has
    at most `num_drafts` drafts.
    """

    def forward(
        leaves: tuple[jax.Array, ...],
        state: DeviceState,
        vectors: Float[Array, "slots D"],
        buffer: Int[Array, " W"],
        inputs: ForwardInputs,
    ) -> tuple[DeviceState, Float[Array, "slots D"], Undrawn, ForwardResults]:
        model = structure.merge(leaves)
        batch = StepBatch.unpack(buffer, layout)
        block_tables, sequences, tokens = take_batch(state, batch, layout)
        cache, hidden = run_model(model, tokens, state.cache, sequences, row_block)
        drafted: DraftedRows | None = None
        last_rows = batch.last_rows
        if draft_rows:
            rows = DraftRows.of(batch, draft_rows)
            last_rows = rows.rows
            before = rows.before(tokens, num_drafts=num_drafts, no_token=vocab_size)
            drafted = DraftedRows(rows, tokens[last_rows], before)
        undrawn = Undrawn(hidden[last_rows], buffer[layout.row_words], drafted)
        prompt = score_prompts(model, hidden, inputs.targets, placement, row_block, num_logprobs=num_logprobs)
        vectors, pooled = pool_rows(hidden, vectors, batch.slots, inputs.pooled_rows, in_order=row_block is not None)
        state = replace(state, cache=cache, block_tables=block_tables)
        return state, vectors, undrawn, ForwardResults(prompt, pooled)

    return forward


def draw_function(
    structure: ModelStructure,
    placement: Placement,
    row_block: int | None = None,
    *,
    num_logprobs: int,
    processors: tuple[LogitsProcessor, ...] = (),
) -> DrawFunction:
    """The function that the second program of a FULL step compiles: from hidden states to tokens.

    It takes the model's flat leaves, the last tokens of the device state and the slots' `FullState` (donate both), what
    `forward_function`'s has left to do, and the step's `DrawInputs`.
    """

    def draw(
        leaves: tuple[jax.Array, ...],
        last_tokens: Int[Array, " slots"],
        full: FullState,
        undrawn: Undrawn,
        inputs: DrawInputs,
    ) -> tuple[Int[Array, " slots"], FullState, Drawn]:
        model, given, drafted = structure.merge(leaves), StepRows.unpack(undrawn.words), undrawn.drafted
        drawn_from = DraftRows.one_each(given) if drafted is None else drafted.rows
        of, slots, num_draws = drawn_from.owners, given.slots, given.num_draws

        def draw_rows(logits: Float[Array, "R V"], rows: FullRows) -> Drawn:
            return sample_full(
                logits,
                rows,
                full,
                inputs.asks,
                num_logprobs=num_logprobs,
                processors=processors,
                mesh=placement.mesh,
            )

        rows = FullRows(
            drawn_from.sampling(given),
            slots[of],
            inputs.controlled[of],
            inputs.masks,
            inputs.logprobs[of],
            None if drafted is None else drafted.before,
        )
        num_used = given.num_used if drafted is None else jnp.sum(num_draws)
        drawn = draw_tokens(model, undrawn.hidden, num_used, draw_rows, rows, placement, row_block)
        num_kept = num_draws
        if drafted is not None:
            num_kept = drawn_from.num_kept(drafted.tokens, drawn.tokens, num_draws)
        num_kept = jnp.where(inputs.controlled, num_kept, 0)
        last_tokens = keep_tokens(last_tokens, slots, num_draws, drawn.tokens[drawn_from.lasts])
        return last_tokens, full.with_drawn(slots, drawn.tokens, of, drawn_from.firsts, num_kept), drawn

    return draw


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
