"""The host's side of the FULL sampling mode: makes the rows of the slots' state, and each step's inputs."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int
from numpy.typing import NDArray

from jax_engine.core.messages import NO_CONTROLS, TokenControls
from jax_engine.execution.step_program import Program
from jax_engine.grammar.bitmasks import all_tokens, pack_bits
from jax_engine.sampling.full_sampling import ANY_TOKEN, NO_OUTPUT, Ask, FullState
from jax_engine.sampling.logits_processors import argument_defaults
from jax_engine.sampling.logprob_results import prompt_targets
from jax_engine.sampling.pooling_results import pooled_rows
from jax_engine.sampling_params import MAX_BAD_WORD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIAS
from jax_engine.scheduling.request import Request
from jax_engine.scheduling.step_plan import Chunk
from jax_engine.sharding.placed_model import PlacedModel

Fields = dict[str, NDArray[Any]]  # of a `FullState`, of `ForwardInputs` or of `DrawInputs`


class FullSlots:
    """What the slots' requests ask for. Mutable; owned by the runner."""

    def __init__(self, placed: PlacedModel, num_slots: int) -> None:
        self._placed = placed
        self._asks = np.zeros((num_slots, len(Ask)), bool)
        self._is_controlled, self._asks_logprobs = np.zeros((2, num_slots), bool)

    def take(self, chunk: Chunk) -> Fields | None:
        """Record what a request that has just taken a slot asks for, whose output so far the host knows; its row of
        the `FullState`, if it needs one.
        """
        request, slot = chunk.request, chunk.slot
        assert request.num_pending == chunk.num_draws, "a request starts again before its last token is known"
        is_controlled = request.asked.needs_full or bool(self._placed.processors)
        self._is_controlled[slot] = is_controlled
        controls = request.asked.controls or NO_CONTROLS
        self._asks[slot] = asks_of(controls)
        self._asks_logprobs[slot] = controls.num_logprobs is not None
        return slot_row(request, controls, self._placed) if is_controlled else None

    def draw_inputs(self, chunks: Sequence[Chunk], program: Program) -> Fields:
        """The fields of `DrawInputs` for a step over these ordered chunks; `masks` only where not all tokens may be
        drawn. Waits until they are made.
        """
        num_rows, count = program.bucket.num_sequences, len(chunks)
        slots = np.fromiter((chunk.slot for chunk in chunks), np.int32, count)
        controlled, logprobs = np.zeros((2, num_rows), bool)
        controlled[:count] = self._is_controlled[slots]
        logprobs[:count] = self._asks_logprobs[slots]
        asks: NDArray[np.bool_] = np.any(self._asks[slots], axis=0)
        masks: Fields = {}
        if any(map(needs_mask, chunks)):
            masks, asks[Ask.MASKS] = {"masks": self._fill_masks(chunks, program)}, True
        return masks | {"asks": asks, "controlled": controlled, "logprobs": logprobs}

    def _fill_masks(self, chunks: Sequence[Chunk], program: Program) -> NDArray[np.uint32]:
        """The masks of the rows that are drawn from: with drafts, several of a chunk, one chunk's after another's."""
        filled = all_tokens(program.bucket.num_tokens, self._placed.vocab_size)
        made: dict[int, tuple[NDArray[np.uint32], list[int], list[int]]] = {}  # which rows of an array go where
        next_row = 0
        for index, chunk in enumerate(chunks):
            row = next_row if program.draft_rows else index
            constraint = chunk.request.constraint
            if constraint is not None and needs_mask(chunk):
                if chunk.drafts:
                    constraint.fill(filled[row : row + 1 + len(chunk.drafts)], chunk.drafts)
                else:
                    masks, place = constraint.made()
                    _, places, rows = made.setdefault(id(masks), (masks, [], []))
                    places.append(place)
                    rows.append(row)
            next_row += chunk.num_draws
        for masks, places, rows in made.values():
            filled[rows] = masks[places, : filled.shape[1]]
        return filled


def forward_inputs(chunks: Sequence[Chunk], program: Program) -> Fields:
    """The fields of `ForwardInputs` for a step over these ordered chunks; none where nobody asks for anything."""
    if all(chunk.request.asked.controls is None for chunk in chunks):
        return {}
    return {
        "pooled_rows": pooled_rows(chunks, program.bucket.num_sequences),
        "targets": prompt_targets(chunks, program.bucket.num_tokens),
    }


def needs_mask(chunk: Chunk) -> bool:
    """Whether what a chunk draws is held to a grammar; nothing is, once the token before has ended the request."""
    request = chunk.request
    return chunk.num_draws > 0 and request.constraint is not None and request.finish_reason is None


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


def slot_row(request: Request, controls: TokenControls, placed: PlacedModel) -> Fields:
    """A request's row of the `FullState`: what it asks for, and the tokens that it has."""
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
    return {
        "allowed": all_tokens(1, vocab_size)[0] if allowed is None else pack_bits(allowed, vocab_size),
        "in_prompt": pack_bits(prompt, vocab_size),
        "counts": np.bincount(np.asarray(output, np.int64), minlength=vocab_size).astype(np.int32),
        "penalties": np.asarray(penalties, np.float32),
        "bias_tokens": bias_tokens,
        "bias_values": bias_values,
        "bad_words": bad_words,
        "latest": latest,
        "num_prompt": np.asarray(request.num_prompt, np.int32),
        "arguments": np.asarray(arguments, np.float32),
        "vectors": np.zeros(placed.hidden_size, np.float32),
    }
