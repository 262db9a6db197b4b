"""The host's side of the FULL sampling mode: writes the slots' state, and makes each step's inputs."""

from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
from numpy.typing import NDArray

from jax_engine.full_sampling import ALL_TOKENS, FullInputs, FullState, num_words, slot_row, write_slot
from jax_engine.logprob_results import asks_logprobs, prompt_targets
from jax_engine.messages import CoreRequest
from jax_engine.placed_model import PlacedModel
from jax_engine.step_batch import Bucket
from jax_engine.step_plan import Chunk


class FullSlots:
    """The `FullState` and what goes with it. Mutable; owned by the runner.

    Device memory is taken when the first request needs it.
    """

    def __init__(self, placed: PlacedModel, num_slots: int) -> None:
        self._placed = placed
        self._num_slots = num_slots
        self._state: FullState | None = None
        self._write = jax.jit(write_slot, donate_argnums=0)
        self._is_controlled = np.zeros(num_slots, bool)

    @property
    def state(self) -> FullState:
        """On the device; whoever donates it puts back what replaces it."""
        if self._state is None:
            self._state = self._placed.zero_full_state(self._num_slots)
        return self._state

    @state.setter
    def state(self, state: FullState) -> None:
        self._state = state

    def take(self, slot: int, asked: CoreRequest) -> None:
        """Record what a request that has just taken a slot asks for."""
        self._is_controlled[slot] = asked.needs_full
        if asked.needs_full:
            self.state = self._write(self.state, np.int32(slot), slot_row(asked, self._placed.vocab_size))

    def inputs(self, chunks: Sequence[Chunk], slots: NDArray[np.int32], bucket: Bucket) -> FullInputs:
        """What a step over these ordered chunks takes beside its packed buffer.

        Made of NumPy arrays: the step's executable puts them where it wants them.
        """
        num_rows = bucket.num_sequences
        controlled = np.zeros(num_rows, bool)
        controlled[: len(slots)] = self._is_controlled[slots]
        masks = np.full((num_rows, num_words(self._placed.vocab_size)), ALL_TOKENS)
        for row, chunk in enumerate(chunks):
            if chunk.num_draws and chunk.request.constraint is not None:
                chunk.request.constraint.fill(masks[row])
        logprobs = np.zeros(num_rows, bool)
        logprobs[: len(chunks)] = [asks_logprobs(chunk) for chunk in chunks]
        targets = prompt_targets(chunks, bucket.num_tokens)
        return FullInputs(*(cast(jax.Array, array) for array in (controlled, masks, logprobs, targets)))
