"""Several tokens a row in one step: the device decodes, draws and decodes again, until every row is done.

What ends a row is decided here as `Request.append` decides it on the host, so that both agree on every token.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jax_engine.execution.step_batch import NO_TOKEN, TAKE_LAST, StepBatch
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.sampling.sampler import SamplingRows, ends_sequence

# Runs the model over token rows and draws what follows the given one of each sequence: (tokens, cache, sequences,
# those rows, sampling rows) -> (cache, drawn).
Advance = Callable[
    [Int[Array, " B"], KVPages, SequenceTable, Int[Array, " B"], SamplingRows], tuple[KVPages, Int[Array, " B"]]
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Loop:
    """What an iteration hands to the next."""

    num_done: Int[Array, ""]  # iterations
    cache: KVPages
    tokens: Int[Array, " B"]  # the latest of each row, not in the cache yet
    lengths: Int[Array, " B"]  # of each row's sequence, that token included
    active: Bool[Array, " B"]  # rows that go on
    drawn: Int[Array, "K B"]


def decode_loop(
    advance: Advance,
    cache: KVPages,
    sequences: SequenceTable,
    tokens: Int[Array, " B"],
    batch: StepBatch,
    *,
    num_steps: int,
) -> tuple[KVPages, Int[Array, " B"], Int[Array, "K B"]]:
    """Draw up to `num_steps` (static) tokens for each row of a batch of one-token ranges, row i being token row i.

    A row ends after its `num_draws` tokens, or after a token that ends its sequence. Then it is out of the batch: it
    writes nothing and attention does not see it, and once all rows are, the loop ends. A row whose sequence ended in
    the step before, which the host did not know yet, draws nothing. The pages of `num_draws` tokens are in the table.

    Returns the cache, the latest token of each row and those drawn in each iteration, `NO_TOKEN` where a row was out.
    """
    num_rows = tokens.shape[0]
    assert sequences.kv_lengths.shape == (num_rows,), "a batch of decodes has as many token rows as sequences"
    rows, lengths = batch.sampling, sequences.kv_lengths
    had_ended = (batch.tokens == TAKE_LAST) & ends_sequence(tokens, lengths - 1, rows)

    def advance_all(loop: _Loop) -> _Loop:
        # Active rows side by side, in their order: the others are padding to everything that reads the table.
        count, index = jnp.sum(loop.active), jnp.arange(num_rows + 1)
        order = jnp.nonzero(loop.active, size=num_rows, fill_value=num_rows - 1)[0]
        places = jnp.maximum(jnp.cumsum(loop.active) - 1, 0)
        table = SequenceTable.build(
            sequences.block_tables[:, order],
            jnp.minimum(index, count).astype(jnp.int32),
            jnp.where(index[:-1] < count, loop.lengths[order], 0),
            count.astype(jnp.int32),
            num_tokens=num_rows,
        )
        if sequences.adapters is not None:
            slots, present = sequences.adapters.slots, sequences.adapters.present
            table = table.with_adapters(slots[order], present.shape[0])
        cache, latest = advance(loop.tokens[order], loop.cache, table, places, replace(rows, positions=loop.lengths))
        num_done = loop.num_done + 1
        goes_on = loop.active & (num_done < batch.num_draws) & ~ends_sequence(latest, loop.lengths, rows)
        return _Loop(
            num_done,
            cache,
            jnp.where(loop.active, latest, loop.tokens),
            loop.lengths + loop.active,
            goes_on,
            loop.drawn.at[loop.num_done].set(jnp.where(loop.active, latest, NO_TOKEN)),
        )

    start = _Loop(
        jnp.zeros((), jnp.int32),
        cache,
        tokens,
        lengths,
        (batch.num_draws > 0) & ~had_ended,
        jnp.full((num_steps, num_rows), NO_TOKEN, jnp.int32),
    )
    end = lax.while_loop(lambda loop: (loop.num_done < num_steps) & jnp.any(loop.active), advance_all, start)
    return end.cache, end.tokens, end.drawn
