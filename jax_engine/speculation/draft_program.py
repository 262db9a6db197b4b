"""The draft model's program: it takes in the tokens that are new to it, and then guesses some on its own.

It runs just before the step that checks its guesses, which takes them from the device state: the host need not see
them in between. Its keys and values lie in a cache of its own, in pages of the same numbers as the model's, so that one
block table serves both.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_engine.execution.decode_loop import decode_loop
from jax_engine.execution.step_batch import NO_TOKEN, BatchLayout, StepBatch
from jax_engine.execution.step_program import DeviceState, draw_tokens, run_model, take_batch
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.sampling.sampler import SamplingMode, SamplingRows, ends_sequence, sample
from jax_engine.sharding.sharding import Placement

DraftFunction = Callable[[tuple[jax.Array, ...], DeviceState, Int[Array, " W"]], tuple[DeviceState, Int[Array, "K B"]]]


def draft_function(
    structure: ModelStructure, layout: BatchLayout, placement: Placement, *, num_drafts: int
) -> DraftFunction:
    """The function that a program of the draft model compiles, for one layout.

    It takes the draft model's flat leaves, the device state (donate it) and a packed buffer. A sequence's range is what
    the draft model's cache lacks of its known tokens; behind it, up to `num_draws` tokens are drafted, one after
    another, at most `num_drafts` (static). Each is drawn as the model will draw the token at its position, with the
    same random number: of two like distributions that makes the same token most of the time, greedy or sampled.

    Returns the new state, whose `drafts` hold them, and the same for the host, a row for each: anything where a
    sequence has fewer, or has ended.
    """

    def draft(
        leaves: tuple[jax.Array, ...], state: DeviceState, buffer: Int[Array, " W"]
    ) -> tuple[DeviceState, Int[Array, "K B"]]:
        model = structure.merge(leaves)
        batch = StepBatch.unpack(buffer, layout)
        assert state.draft_cache is not None and state.drafts is not None

        def run(
            tokens: Int[Array, " T"],
            cache: KVPages,
            sequences: SequenceTable,
            last_rows: Int[Array, " B"],
            rows: SamplingRows,
        ) -> tuple[KVPages, Int[Array, " B"]]:
            def draw(logits: Float[Array, "R V"], rows: SamplingRows) -> Int[Array, " R"]:
                return sample(logits, rows, SamplingMode.SAMPLE, placement.mesh)

            cache, hidden = run_model(model, tokens, cache, sequences, None)
            return cache, draw_tokens(model, hidden[last_rows], batch.num_used, draw, rows, placement, None)

        block_tables, sequences, tokens = take_batch(state, batch, layout)
        cache, first = run(tokens, state.draft_cache, sequences, batch.last_rows, batch.sampling)
        drafts = first[None]
        if num_drafts > 1:
            goes_on = ~ends_sequence(first, batch.kv_lengths, batch.sampling)
            rest = replace(batch, tokens=first, num_draws=jnp.where(goes_on, jnp.maximum(batch.num_draws - 1, 0), 0))
            behind = replace(sequences, kv_lengths=batch.kv_lengths + 1)
            cache, _, others = decode_loop(run, cache, behind, first, rest, num_steps=num_drafts - 1)
            drafts = jnp.concatenate([drafts, jnp.where(others == NO_TOKEN, 0, others)])
        new_state = replace(
            state,
            block_tables=block_tables,
            draft_cache=cache,
            drafts=state.drafts.at[batch.slots].set(drafts.T, mode="drop"),
        )
        return new_state, drafts

    return draft
