"""The host's side of the FULL sampling mode: writes the slots' state, and makes each step's inputs."""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

from jax_engine.bitmasks import all_tokens, pack_bits
from jax_engine.full_sampling import ANY_TOKEN, NO_OUTPUT, Ask, FullInputs, FullState
from jax_engine.logits_processors import argument_defaults
from jax_engine.logprob_results import asks_logprobs, prompt_targets
from jax_engine.messages import NO_CONTROLS, TokenControls
from jax_engine.placed_model import PlacedModel
from jax_engine.pooling_results import pooled_rows
from jax_engine.request import Request
from jax_engine.sampling_params import MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIAS
from jax_engine.step_plan import Chunk
from jax_engine.step_program import Program


class FullSlots:
    """The `FullState` and what goes with it. Mutable; owned by the runner.

    Device memory is taken when the first request needs it.
    """

    def __init__(self, placed: PlacedModel, num_slots: int) -> None:
        self._placed = placed
        self._num_slots = num_slots
        self._state: FullState | None = None
        self._write = jax.jit(write_slot, donate_argnums=0)
        self._asks = np.zeros((num_slots, len(Ask)), bool)
        self._is_controlled = np.zeros(num_slots, bool)
        self._unmasked: dict[int, jax.Array] = {}  # by number of rows: masks that allow everything, on the devices

    @property
    def state(self) -> FullState:
        """On the device; whoever donates it puts back what replaces it."""
        if self._state is None:
            self._state = self._placed.zero_full_state(self._num_slots)
        return self._state

    @state.setter
    def state(self, state: FullState) -> None:
        self._state = state

    def drop(self) -> None:
        """Free the device memory; no slot may be taken."""
        for leaf in jax.tree.leaves((self._state, self._unmasked)):
            leaf.delete()
        self._state = None
        self._unmasked.clear()

    def take(self, chunk: Chunk) -> None:
        """Record what a request that has just taken a slot asks for, whose output so far the host knows."""
        request, slot = chunk.request, chunk.slot
        assert request.num_pending == chunk.num_draws, "a request starts again before its last token is known"
        is_controlled = request.asked.needs_full or bool(self._placed.processors)
        self._is_controlled[slot] = is_controlled
        controls = request.asked.controls or NO_CONTROLS
        self._asks[slot] = asks_of(controls)
        if is_controlled:
            row = slot_row(request, controls, self._placed)
            self.state = self._write(self.state, np.int32(slot), row)

    def inputs(self, chunks: Sequence[Chunk], slots: NDArray[np.int32], program: Program) -> FullInputs:
        """What a step over these ordered chunks takes beside its packed buffer.

        Made of NumPy arrays: the step's executable puts them where it wants them.
        """
        num_rows = program.bucket.num_sequences
        controlled = np.zeros(num_rows, bool)
        controlled[: len(slots)] = self._is_controlled[slots]
        asks: NDArray[np.bool_] = np.logical_or.reduce(self._asks[slots], axis=0)
        masks = self._no_masks(program.draft_rows or num_rows)
        if any(chunk.num_draws and chunk.request.constraint is not None for chunk in chunks):
            masks, asks[Ask.MASKS] = cast(Array, self._fill_masks(chunks, program)), True
        logprobs = np.zeros(num_rows, bool)
        logprobs[: len(chunks)] = [asks_logprobs(chunk) for chunk in chunks]
        targets = prompt_targets(chunks, program.bucket.num_tokens)
        arrays = asks, controlled, masks, logprobs, pooled_rows(chunks, num_rows), targets
        return FullInputs(*(cast(Array, array) for array in arrays))

    def _fill_masks(self, chunks: Sequence[Chunk], program: Program) -> NDArray[np.uint32]:
        """The masks of the rows that are drawn from: with drafts, several of a chunk, one chunk's after another's."""
        filled = all_tokens(program.draft_rows or program.bucket.num_sequences, self._placed.vocab_size)
        next_row = 0
        for index, chunk in enumerate(chunks):
            row = next_row if program.draft_rows else index
            if chunk.num_draws and chunk.request.constraint is not None:
                chunk.request.constraint.fill(filled[row : row + 1 + len(chunk.drafts)], chunk.drafts)
            next_row += chunk.num_draws
        return filled

    def _no_masks(self, num_rows: int) -> jax.Array:
        if num_rows not in self._unmasked:
            masks = all_tokens(num_rows, self._placed.vocab_size)
            self._unmasked[num_rows] = jax.device_put(masks, self._placed.placement.of())
        return self._unmasked[num_rows]


def write_slot(state: FullState, slot: Int[Array, ""], row: FullState) -> FullState:
    """The state with a slot's row replaced."""
    return jax.tree.map(lambda rows, new: rows.at[slot].set(new), state, row)


def asks_of(controls: TokenControls) -> list[bool]:
    """By `Ask`, what a request asks for."""
    penalties = (controls.presence_penalty, controls.frequency_penalty, controls.repetition_penalty)
    return [
        controls.allowed_token_ids is not None,
        bool(controls.logit_bias),
        bool(controls.bad_words),
        penalties != (0.0, 0.0, 1.0),
    ]


def slot_row(request: Request, controls: TokenControls, placed: PlacedModel) -> FullState:
    """A request's row of the `FullState`, as NumPy arrays: what it asks for, and the tokens that it has."""
    vocab_size = placed.vocab_size
    prompt, output = request.tokens[: request.num_prompt], request.tokens[request.num_prompt :]
    bias_tokens = np.full(MAX_LOGIT_BIAS, vocab_size, np.int32)
    bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
    bias_tokens[: len(controls.logit_bias)] = list(controls.logit_bias)
    bias_values[: len(controls.logit_bias)] = list(controls.logit_bias.values())
    bad_words = np.full((MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS), ANY_TOKEN, np.int32)
    bad_words[:, -1] = vocab_size
    for index, word in enumerate(controls.bad_words):
        bad_words[index, -len(word) :] = word
    latest = np.full(MAX_BAD_WORD_TOKENS - 1, NO_OUTPUT, np.int32)
    if tail := output[-len(latest) :]:
        latest[-len(tail) :] = tail
    allowed = controls.allowed_token_ids
    defaults = argument_defaults(placed.processors)
    arguments = [controls.processor_arguments.get(name, default) for name, default in defaults.items()]
    penalties = (controls.presence_penalty, controls.frequency_penalty, controls.repetition_penalty)
    row = {
        "allowed": all_tokens(1, vocab_size)[0] if allowed is None else pack_bits(allowed, vocab_size),
        "in_prompt": pack_bits(prompt, vocab_size),
        "counts": np.bincount(np.asarray(output, np.int64), minlength=vocab_size).astype(np.int32),
        "penalties": np.asarray(penalties, np.float32),
        "bias_tokens": bias_tokens,
        "bias_values": bias_values,
        "bad_words": bad_words,
        "latest": latest,
        "num_prompt": np.int32(request.num_prompt),
        "arguments": np.asarray(arguments, np.float32),
        "vectors": np.zeros(placed.hidden_size, np.float32),
    }
    return FullState(**cast(dict[str, Array], row))
