"""What the FULL sampling mode has beside the packed buffer: state of every slot, inputs of every step, and results.

A request that needs the mode writes its row of the state once, when it takes a slot. Rows of other requests, which
share its steps, are as if nothing had been asked: what lies in their slots is not read.
"""

from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt
from numpy.typing import NDArray

from jax_engine.logprobs import RowLogprobs, row_logprobs
from jax_engine.messages import CoreRequest
from jax_engine.sampler import SamplingMode, SamplingRows, sample

ALL_TOKENS = np.uint32(0xFFFFFFFF)
WORD_BITS = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullState:
    """What stays on the device for every slot, beside the `DeviceState`; donated to each FULL step and replaced by its
    result. Gathered, one row for each sequence of a step.
    """

    allowed: UInt[Array, "*rows W"]  # bit v % 32 of word v // 32: token v may be drawn

    @classmethod
    def zeros(cls, num_slots: int, vocab_size: int) -> "FullState":
        return cls(jnp.zeros((num_slots, num_words(vocab_size)), jnp.uint32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullInputs:
    """What a FULL step takes from the host beside the packed buffer."""

    controlled: Bool[Array, " B"]  # whether the row's own slot of the `FullState` is in force
    masks: UInt[Array, "B W"]  # as `FullState.allowed`, of this step alone; a token needs both bits
    logprobs: Bool[Array, " B"]  # whether those of the drawn token are to be found
    targets: Int[Array, " T"]  # the token after each token row, if its log-probability is to be found, or else -1

    @classmethod
    def zeros(cls, num_rows: int, num_tokens: int, vocab_size: int) -> "FullInputs":
        return cls(
            controlled=jnp.zeros(num_rows, bool),
            masks=jnp.zeros((num_rows, num_words(vocab_size)), jnp.uint32),
            logprobs=jnp.zeros(num_rows, bool),
            targets=jnp.zeros(num_tokens, jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullRows:
    """The parameters of each row of a FULL step."""

    sampling: SamplingRows
    controlled: Bool[Array, " B"]
    allowed: UInt[Array, "B W"]
    logprobs: Bool[Array, " B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullResults:
    """What a FULL step gives for each row; of log-probabilities nothing that counts where nobody asks."""

    tokens: Int[Array, " B"]
    logprobs: RowLogprobs | None = None  # of the tokens
    prompt: RowLogprobs | None = None  # of `FullInputs.targets`


def full_rows(sampling: SamplingRows, state: FullState, inputs: FullInputs, slots: Int[Array, " B"]) -> FullRows:
    """The parameters of a step's rows, which are in these slots; past the last, they are padding."""
    allowed = jnp.where(inputs.controlled[:, None], state.allowed.at[slots].get(mode="clip"), ALL_TOKENS)
    return FullRows(sampling, inputs.controlled, allowed & inputs.masks, inputs.logprobs)


def sample_full(logits: Float[Array, "B V"], rows: FullRows, num_logprobs: int) -> FullResults:
    """The next token of each row, under all that it asked for, and if any row asks, log-probabilities of it and of the
    `num_logprobs` (static) likeliest.
    """
    chosen = jnp.where(unpack_bits(rows.allowed, logits.shape[1]), logits, -jnp.inf)
    tokens = sample(chosen, rows.sampling, SamplingMode.SAMPLE)
    logprobs: RowLogprobs = lax.cond(
        jnp.any(rows.logprobs),
        lambda: row_logprobs(logits, tokens, num_logprobs),
        lambda: RowLogprobs.zeros(logits.shape[0], num_logprobs),
    )
    return FullResults(tokens, logprobs)


def slot_row(asked: CoreRequest, vocab_size: int) -> FullState:
    """A request's row of the state, on the host."""
    allowed = asked.controls.allowed_token_ids if asked.controls else None
    return FullState(cast(Array, all_tokens(vocab_size) if allowed is None else pack_bits(allowed, vocab_size)))


def write_slot(state: FullState, slot: Int[Array, ""], row: FullState) -> FullState:
    """The state with a slot's row replaced."""
    return jax.tree.map(lambda rows, new: rows.at[slot].set(new), state, row)


def num_words(vocab_size: int) -> int:
    """Words of a bitmask over the vocabulary."""
    return -(-vocab_size // WORD_BITS)


def all_tokens(vocab_size: int) -> NDArray[np.uint32]:
    """The bitmask with every bit set."""
    return np.full(num_words(vocab_size), ALL_TOKENS)


def pack_bits(tokens: tuple[int, ...], vocab_size: int) -> NDArray[np.uint32]:
    """The bitmask with the bits of these tokens set."""
    bits = np.zeros(num_words(vocab_size) * WORD_BITS, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def unpack_bits(words: UInt[Array, "B W"], vocab_size: int) -> Bool[Array, "B V"]:
    """Whether each token's bit is set."""
    bits = (words[:, :, None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab_size].astype(bool)
