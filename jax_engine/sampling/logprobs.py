"""Log-probabilities on the device: of given tokens, and of the likeliest beside them.

They are those of the model's own distribution: the log-softmax of its logits in float32, before temperature, penalties
and masks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

PROMPT_BLOCK_BYTES = 64 * 2**20  # logits of prompt rows that exist at once, in float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowLogprobs:
    """Log-probabilities of each row's own token, and of the K likeliest of the vocabulary in order."""

    own: Float[Array, " R"]
    ranks: Int[Array, " R"]  # tokens that are at least as likely as the row's own: 1 for the likeliest
    top_ids: Int[Array, "R K"]
    top: Float[Array, "R K"]

    @classmethod
    def zeros(cls, num_rows: int, num_top: int) -> "RowLogprobs":
        """What stands where nobody asks."""
        return cls(
            jnp.zeros(num_rows, jnp.float32),
            jnp.zeros(num_rows, jnp.int32),
            jnp.zeros((num_rows, num_top), jnp.int32),
            jnp.zeros((num_rows, num_top), jnp.float32),
        )


def row_logprobs(logits: Float[Array, "R V"], tokens: Int[Array, " R"], num_top: int) -> RowLogprobs:
    """Log-probabilities of one token a row, and of the `num_top` (static) likeliest."""
    logits = logits.astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    ranks = jnp.sum(logits >= own, axis=-1, dtype=jnp.int32)
    top, top_ids = lax.top_k(logits, num_top)
    return RowLogprobs((own - normalizer)[:, 0], ranks, top_ids.astype(jnp.int32), top - normalizer)


def prompt_block(num_rows: int, vocab_size: int) -> int:
    """How many prompt rows' logits exist at once: a power of two, and at most half of the rows. A loop of one block is
    none to XLA, which on a CPU then sorts for `lax.top_k`: 134 ms and not 6 for 256 rows of 1,024 tokens.
    """
    block = 1
    while 4 * block <= num_rows and 2 * block * vocab_size * 4 <= PROMPT_BLOCK_BYTES:
        block *= 2
    return block


def prompt_logprobs(
    logits_of: Callable[[Float[Array, "R D"]], Float[Array, "R V"]],
    hidden: Float[Array, "T D"],
    targets: Int[Array, " T"],
    *,
    num_top: int,
    block: int,
) -> RowLogprobs:
    """Log-probabilities of the tokens that follow token rows: `targets`, -1 for a row that nobody asks about, whose
    result says nothing.

    Rows that are asked about go through the head `block` at a time, and only they: that is what it costs.
    """
    num_rows = targets.shape[0]
    padded = -(-num_rows // block) * block
    asked = targets >= 0
    order = jnp.nonzero(asked, size=padded, fill_value=num_rows)[0]

    def body(index: Int[Array, ""], found: RowLogprobs) -> RowLogprobs:
        rows = lax.dynamic_slice_in_dim(order, index * block, block)
        inside = jnp.minimum(rows, num_rows - 1)
        new = row_logprobs(logits_of(hidden[inside]), jnp.maximum(targets[inside], 0), num_top)
        return jax.tree.map(lambda column, part: column.at[rows].set(part, mode="drop"), found, new)

    def search() -> RowLogprobs:
        num_blocks = (jnp.sum(asked) + block - 1) // block
        found: RowLogprobs = lax.fori_loop(0, num_blocks, body, RowLogprobs.zeros(num_rows, num_top))
        return found

    # A loop of one block has a constant body, which XLA takes out of the loop: it would run in every step.
    result: RowLogprobs = lax.cond(jnp.any(asked), search, lambda: RowLogprobs.zeros(num_rows, num_top))
    return result
