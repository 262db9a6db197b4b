"""The FULL sampling mode on the device: what changes a row's logits before its token is drawn.

A request that needs the mode writes its row of the `FullState` once, when it takes a slot. Rows of other requests,
which share its steps, are as if nothing had been asked: what lies in their slots is not read. The order is vLLM's:
masks, bad words, logit bias and custom processors, penalties, and then temperature and what follows it. A token that a
mask or a bad word takes has a logit of minus infinity, which nothing after it changes, so masks come last here, in one
pass with the penalties.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt

from jax_engine.grammar.bitmasks import ALL_TOKENS, WORD_BITS, num_words
from jax_engine.sampling.logits_processors import LogitsProcessor, ProcessorState, argument_names
from jax_engine.sampling.logprobs import RowLogprobs, row_logprobs
from jax_engine.sampling.sampler import SamplingRows, draw_or_take, hold_back, holds
from jax_engine.sampling_params import MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIAS

ANY_TOKEN = -1  # in a bad word: in front of its first token
NO_OUTPUT = -2  # in place of an output token that there is not yet


class Ask(IntEnum):
    """What a step's rows may ask for; what none of them does is skipped."""

    MASKS = 0
    BIAS = 1
    BAD_WORDS = 2
    PENALTIES = 3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullState:
    """What stays on the device for every slot, beside the `DeviceState`; donated to each FULL step and replaced by its
    result.
    """

    allowed: UInt[Array, "*slots W"]  # bit v % 32 of word v // 32: token v may be drawn
    in_prompt: UInt[Array, "*slots W"]  # as bits, which tokens the prompt holds
    counts: Int[Array, "*slots V"]  # of each token in the output
    penalties: Float[Array, "*slots 3"]  # presence, frequency, repetition
    bias_tokens: Int[Array, "*slots N"]  # padded with the vocabulary's size
    bias_values: Float[Array, "*slots N"]
    # The last token of each at the end, `ANY_TOKEN` in front; padding ends past the vocabulary.
    bad_words: Int[Array, "*slots S L"]
    latest: Int[Array, "*slots L-1"]  # output tokens, the last at the end, `NO_OUTPUT` in front
    num_prompt: Int[Array, "*slots"]  # tokens
    arguments: Float[Array, "*slots A"]  # of the logits processors
    vectors: Float[Array, "*slots D"]  # sums of hidden states, of requests that pool

    @classmethod
    def zeros(cls, num_slots: int, vocab_size: int, hidden_size: int, num_arguments: int = 0) -> "FullState":
        def zeros(*shape: int, dtype: type = jnp.int32) -> Array:
            return jnp.zeros((num_slots, *shape), dtype)

        return cls(
            allowed=zeros(num_words(vocab_size), dtype=jnp.uint32),
            in_prompt=zeros(num_words(vocab_size), dtype=jnp.uint32),
            counts=zeros(vocab_size),
            penalties=zeros(3, dtype=jnp.float32),
            bias_tokens=zeros(MAX_LOGIT_BIAS),
            bias_values=zeros(MAX_LOGIT_BIAS, dtype=jnp.float32),
            bad_words=zeros(MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS),
            latest=zeros(MAX_BAD_WORD_TOKENS - 1),
            num_prompt=zeros(),
            arguments=zeros(num_arguments, dtype=jnp.float32),
            vectors=zeros(hidden_size, dtype=jnp.float32),
        )

    def with_drawn(
        self,
        slots: Int[Array, " B"],
        drawn: Int[Array, " D"],
        owners: Int[Array, " D"],
        firsts: Int[Array, " B"],
        num_kept: Int[Array, " B"],
    ) -> "FullState":
        """With the tokens that each sequence keeps in its slot's output: `num_kept` of those `drawn`, from `firsts` on;
        `owners` are the sequences that they were drawn for.
        """
        num_slots, size = self.num_prompt.shape[0], drawn.shape[0]
        is_kept = jnp.arange(size) - firsts[owners] < num_kept[owners]
        kept = jnp.where(is_kept, slots[owners], num_slots)
        # The latest first: of what is kept, and then of what was there.
        places = (firsts + num_kept)[:, None] - 1 - jnp.arange(self.latest.shape[1])
        latest = self.latest.at[slots].get(mode="clip")
        latest = put_behind(latest, drawn[jnp.clip(places, 0, size - 1)], num_kept)
        return replace(
            self,
            counts=self.counts.at[kept, drawn].add(1, mode="drop"),
            latest=self.latest.at[jnp.where(num_kept > 0, slots, num_slots)].set(latest, mode="drop"),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardInputs:
    """What the first part of a FULL step takes from the host beside the packed buffer."""

    pooled_rows: Int[Array, "B 2"]  # of each sequence, those that `pool_rows` adds up
    targets: Int[Array, " T"]  # the token after each token row, if its log-probability is to be found, or else -1

    @classmethod
    def zeros(cls, num_rows: int, num_tokens: int) -> "ForwardInputs":
        """For a step of so many sequences and token rows."""
        return cls(jnp.zeros((num_rows, 2), jnp.int32), jnp.zeros(num_tokens, jnp.int32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DrawInputs:
    """What the second part of a FULL step takes from the host, which the first need not wait for."""

    asks: Bool[Array, " asks"]  # by `Ask`: whether any row does
    controlled: Bool[Array, " B"]  # whether the row's own slot of the `FullState` is in force
    masks: UInt[Array, "D W"]  # of each row drawn from: as `FullState.allowed`, in this step; a token needs both bits
    logprobs: Bool[Array, " B"]  # whether those of the drawn tokens are to be found

    @classmethod
    def zeros(cls, num_rows: int, num_draws: int, vocab_size: int) -> "DrawInputs":
        """For a step of so many sequences and rows to draw from."""
        return cls(
            asks=jnp.zeros(len(Ask), bool),
            controlled=jnp.zeros(num_rows, bool),
            masks=jnp.zeros((num_draws, num_words(vocab_size)), jnp.uint32),
            logprobs=jnp.zeros(num_rows, bool),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullRows:
    """The parameters of each row of a FULL step."""

    sampling: SamplingRows
    slots: Int[Array, " B"]  # padding rows are past the last one
    controlled: Bool[Array, " B"]
    masks: UInt[Array, "B W"]
    logprobs: Bool[Array, " B"]
    # Output that the slot's state does not have yet: drafts, the latest first, padded with the vocabulary's size.
    drafts: Int[Array, "B K"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ForwardResults:
    """What the first part of a FULL step finds; nothing that counts where nobody asks."""

    prompt: RowLogprobs | None  # of `ForwardInputs.targets`
    pooled: Float[Array, "B D"] | None  # sums of hidden states, of `ForwardInputs.pooled_rows`


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """What the second part of a FULL step gives for each row; of log-probabilities nothing that counts where nobody
    asks.
    """

    tokens: Int[Array, " B"]
    logprobs: RowLogprobs | None  # of the tokens


def sample_full(
    logits: Float[Array, "B V"],
    rows: FullRows,
    state: FullState,
    asks: Bool[Array, " asks"],
    *,
    num_logprobs: int,
    processors: tuple[LogitsProcessor, ...] = (),
    mesh: Mesh | None = None,
) -> Drawn:
    """The next token of each row, under all that it asked for; `asks` as in `DrawInputs`. If any row asks, with
    log-probabilities of it and of the `num_logprobs` (static) likeliest, from the logits as they come. Behind `mesh`,
    rows are spread over all of its devices.
    """

    def control(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        logits = lax.cond(any_held, hold_back, lambda logits, _: logits, logits, rows.sampling)
        logits = lax.cond(asks[Ask.BIAS], add_bias, _same, logits, rows, state)
        logits = run_processors(logits, rows, state, processors)
        logits = lax.cond(asks[Ask.PENALTIES], mask_and_penalize, _same, logits, rows, state)
        # One condition after the other: of three ways XLA makes another copy of the logits.
        only_masks = asks[Ask.MASKS] & ~asks[Ask.PENALTIES]
        logits = lax.cond(only_masks, drop_masked, _same, logits, rows, state)
        return lax.cond(asks[Ask.BAD_WORDS], drop_bad_words, _same, logits, rows, state)

    def draw(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        return draw_or_take(logits, rows.sampling, mesh)

    # The draw is within the condition, whose result would be a copy of the logits: they are kept for log-probabilities.
    any_held = jnp.any(holds(rows.sampling))
    is_controlled = jnp.any(asks) | any_held | bool(processors)
    tokens = lax.cond(is_controlled, lambda logits: draw(control(logits)), draw, logits)
    logprobs: RowLogprobs = lax.cond(
        jnp.any(rows.logprobs),
        lambda: row_logprobs(logits, tokens, num_logprobs),
        lambda: RowLogprobs.zeros(logits.shape[0], num_logprobs),
    )
    return Drawn(tokens, logprobs)


def add_bias(logits: Float[Array, "B V"], rows: FullRows, state: FullState) -> Float[Array, "B V"]:
    """Each row's logits with the bias of its tokens."""
    tokens = _of_slots(state.bias_tokens, rows, logits.shape[1])
    index = jnp.arange(logits.shape[0])[:, None]
    return logits.at[index, tokens].add(_of_slots(state.bias_values, rows, 0.0), mode="drop")


def mask_and_penalize(logits: Float[Array, "B V"], rows: FullRows, state: FullState) -> Float[Array, "B V"]:
    """Penalties as vLLM has them: the logit of a token in prompt or output is divided by the repetition penalty, or
    multiplied where it is negative; then, by the output alone, the frequency penalty for each time and the presence
    penalty once are subtracted. And minus infinity for tokens that a mask takes.
    """
    vocab_size = logits.shape[1]
    counts = output_counts(rows, state)
    is_seen = (counts > 0) | unpack_bits(_of_slots(state.in_prompt, rows, np.uint32(0)), vocab_size)
    presence, frequency = (_of_slots(state.penalties[:, column], rows, 0.0)[:, None] for column in (0, 1))
    repetition = _of_slots(state.penalties[:, 2], rows, 1.0)[:, None]
    logits *= jnp.where(is_seen, jnp.where(logits > 0, 1 / repetition, repetition), 1)
    logits -= frequency * counts + presence * (counts > 0)
    return drop_masked(logits, rows, state)


def drop_masked(logits: Float[Array, "B V"], rows: FullRows, state: FullState) -> Float[Array, "B V"]:
    """Minus infinity for tokens that a mask takes."""
    allowed = _of_slots(state.allowed, rows, ALL_TOKENS) & rows.masks
    return jnp.where(unpack_bits(allowed, logits.shape[1]), logits, -jnp.inf)


def drop_bad_words(logits: Float[Array, "B V"], rows: FullRows, state: FullState) -> Float[Array, "B V"]:
    """Minus infinity for the last token of each bad word whose other tokens are those that the output ends with."""
    words = _of_slots(state.bad_words, rows, logits.shape[1])
    latest = _of_slots(state.latest, rows, NO_OUTPUT)
    if rows.drafts is not None:
        num_drafts = jnp.sum(rows.drafts < logits.shape[1], axis=1)
        latest = put_behind(latest, rows.drafts, num_drafts)
    latest = latest[:, None]
    is_next = jnp.all((words[:, :, :-1] == ANY_TOKEN) | (words[:, :, :-1] == latest), axis=-1)
    dropped = jnp.where(is_next, words[:, :, -1], logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], dropped].set(-jnp.inf, mode="drop")


def run_processors(
    logits: Float[Array, "B V"], rows: FullRows, state: FullState, processors: tuple[LogitsProcessor, ...]
) -> Float[Array, "B V"]:
    """The logits after each processor in turn."""
    positions, num_prompt = rows.sampling.positions, _of_slots(state.num_prompt, rows, 0)
    seen = ProcessorState(
        output_counts=output_counts(rows, state),
        in_prompt=unpack_bits(_of_slots(state.in_prompt, rows, np.uint32(0)), logits.shape[1]),
        positions=positions,
        num_output_tokens=positions - num_prompt,
    )
    columns = {name: state.arguments[:, column] for column, name in enumerate(argument_names(processors))}
    for processor in processors:
        arguments = {name: _of_slots(columns[name], rows, value) for name, value in processor.arguments}
        logits = processor.function(logits, seen, **arguments)
    return logits


def output_counts(rows: FullRows, state: FullState) -> Int[Array, "B V"]:
    """How often each token is in the output in front of the row."""
    counts = _of_slots(state.counts, rows, 0)
    if rows.drafts is None:
        return counts
    return counts.at[jnp.arange(counts.shape[0])[:, None], rows.drafts].add(1, mode="drop")


def put_behind(latest: Int[Array, "B N"], new: Int[Array, "B K"], num_new: Int[Array, " B"]) -> Int[Array, "B N"]:
    """The latest tokens of each row, the last at the end, after `num_new` more; `new` has the latest of those first."""
    size = latest.shape[1]
    age = jnp.broadcast_to(jnp.arange(size), latest.shape)
    later = jnp.take_along_axis(new, jnp.minimum(age, new.shape[1] - 1), axis=1)
    earlier = jnp.take_along_axis(latest, jnp.clip(size - 1 - (age - num_new[:, None]), 0, size - 1), axis=1)
    return jnp.where(age < num_new[:, None], later, earlier)[:, ::-1]


def _same(logits: Float[Array, "B V"], rows: FullRows, state: FullState) -> Float[Array, "B V"]:
    return logits


def _of_slots(column: Array, rows: FullRows, neutral: object) -> Array:
    """What lies in the rows' slots, or what asks for nothing where a slot is not in force."""
    controlled = rows.controlled.reshape(-1, *[1] * (column.ndim - 1))
    return jnp.where(controlled, column.at[rows.slots].get(mode="clip"), jnp.asarray(neutral, column.dtype))


def unpack_bits(words: UInt[Array, "B W"], vocab_size: int) -> Bool[Array, "B V"]:
    """Whether each token's bit is set."""
    bits = (words[:, :, None] >> jnp.arange(WORD_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1)[:, :vocab_size].astype(bool)
