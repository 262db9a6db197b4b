"""Which token rows of a step with drafts tokens are drawn from, and which of those drawn are kept."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_engine.cuda_fallback.searching import rows_of
from jax_engine.execution.step_batch import StepBatch, StepRows
from jax_engine.sampling.sampler import SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftRows:
    """The last `num_draws` token rows of each sequence, one sequence after another. Rows beyond them are any rows."""

    rows: Int[Array, " D"]  # token rows
    owners: Int[Array, " D"]  # sequences
    positions: Int[Array, " D"]  # of the tokens behind them
    offsets: Int[Array, " D"]  # drafts that their logits depend on: those in front of them in the range, and their own
    firsts: Int[Array, " B"]  # which of the rows is each sequence's first
    lasts: Int[Array, " B"]  # and its last; anything where it has none

    @classmethod
    def one_each(cls, given: StepRows) -> "DraftRows":
        """One row of each sequence, of a step without drafts; they are not told from other token rows."""
        index = jnp.arange(given.num_draws.shape[0], dtype=jnp.int32)
        return cls(index, index, given.kv_lengths, jnp.zeros_like(index), index, index)

    @classmethod
    def of(cls, batch: StepBatch, size: int) -> "DraftRows":
        """Those of a batch, in `size` (static) rows."""
        ends = jnp.cumsum(batch.num_draws)
        index = jnp.arange(size, dtype=jnp.int32)
        last = batch.num_draws.shape[0] - 1
        owners = jnp.minimum(rows_of(index, ends), last)
        before_last = jnp.maximum(ends[owners] - 1 - index, 0)  # rows between it and its sequence's last one
        return cls(
            rows=batch.last_rows[owners] - before_last,
            owners=owners,
            positions=batch.kv_lengths[owners] - before_last,
            offsets=batch.num_draws[owners] - 1 - before_last,
            firsts=ends - batch.num_draws,
            lasts=jnp.maximum(ends - 1, 0),
        )

    def sampling(self, given: StepBatch | StepRows) -> SamplingRows:
        """The parameters of each row."""
        rows = jax.tree.map(lambda column: column[self.owners], given.sampling)
        return replace(rows, positions=self.positions)

    def before(self, tokens: Int[Array, " T"], *, num_drafts: int, no_token: int) -> Int[Array, "D K"]:
        """The drafts that each row's logits depend on, its own first, `no_token` behind them; `tokens` are those of the
        token rows.
        """
        distance = jnp.arange(num_drafts, dtype=jnp.int32)
        found = tokens[jnp.maximum(self.rows[:, None] - distance, 0)]
        return jnp.where(distance < self.offsets[:, None], found, no_token)

    def num_kept(self, tokens: Int[Array, " D"], drawn: Int[Array, " D"], num_draws: Int[Array, " B"]) -> Array:
        """How many of each sequence's drawn tokens (of `num_draws`) are kept: those behind drafts that were right, and
        the first that was drawn otherwise; `tokens` are those of the rows.
        """
        is_wrong = (self.offsets > 0) & (tokens != jnp.roll(drawn, 1))
        num_wrong = jnp.cumsum(is_wrong)
        size = drawn.shape[0]
        is_kept = num_wrong == num_wrong[jnp.minimum(self.firsts, size - 1)][self.owners]
        is_kept &= num_draws[self.owners] > self.offsets
        is_kept &= jnp.arange(size) - self.firsts[self.owners] == self.offsets  # none of those beyond
        return jnp.zeros_like(num_draws).at[self.owners].add(is_kept.astype(num_draws.dtype))
