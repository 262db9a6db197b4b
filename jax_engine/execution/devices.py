"""What lies on the devices, and all that is launched there: the one place that changes it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import jax
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from jax_engine.adapters.adapter_store import AdapterStore, Values
from jax_engine.compilation.blueprint import WRITE_TABLES
from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.execution.full_program import Undrawn
from jax_engine.execution.page_copies import PageCopier
from jax_engine.execution.step_program import DeviceState
from jax_engine.execution.weights import Weights
from jax_engine.grammar.bitmasks import all_tokens
from jax_engine.kv_cache.host_pool import PageCopies
from jax_engine.sampling.full_sampling import DrawInputs, Drawn, ForwardInputs, ForwardResults, FullState
from jax_engine.sampling.full_slots import Fields, write_slot
from jax_engine.sharding.placed_model import PlacedModel, StateSize
from jax_engine.speculation.draft_model import DraftModel


class Devices:
    """Weights, cache and state, and the launches that replace them. Mutable; owned by the runner.

    After the start, nothing but the orders of `orders` calls it: what a launch takes from the host comes with its
    order, so that processes which are given the same orders launch the same programs. Programs are named by their
    numbers, their places in `CompiledSteps.programs`.
    """

    def __init__(
        self, placed: PlacedModel, draft: DraftModel | None, adapters: AdapterStore, compiled: CompiledSteps
    ) -> None:
        """Takes no memory; `weights` and `make_state` do."""
        self._placed = placed
        self._draft = draft
        self._adapters = adapters
        self._compiled = compiled
        self.weights: Weights
        self.state: DeviceState
        self._size: StateSize
        self._full: FullState | None = None
        self._undrawn: Undrawn | None = None
        self._write_slot = jax.jit(write_slot, donate_argnums=0)
        self._unmasked: dict[int, jax.Array] = {}  # by number of rows: masks that allow everything
        self._unasked: dict[int, ForwardInputs] = {}  # by number of the program

    def make_state(self, size: StateSize, helpers: Mapping[str, jax.stages.Compiled]) -> None:
        """The state before the first step; `helpers` are the programs of `Blueprint.lower_helpers`."""
        self._size = size
        self.renew_state()
        self.copier = PageCopier(self.state.cache, helpers)
        self.updates_shape = (self.state.block_tables.shape[1], 3)  # of `write_pages`: one whole block table
        self._write_pages = helpers[WRITE_TABLES]

    @property
    def all_weights(self) -> tuple[Weights, ...]:
        """Those of the model, and of the draft model if there is one."""
        return (self.weights,) if self._draft is None else (self.weights, self._draft.weights)

    @property
    def full(self) -> FullState:
        """What the FULL mode keeps; it takes memory from the first request that needs it."""
        if self._full is None:
            self._full = self._placed.zero_full_state(self._size.num_slots)
        return self._full

    def step(self, number: int, buffer: NDArray[np.int32]) -> jax.Array:
        """A step program: the tokens drawn [steps, rows]."""
        executable = self._compiled.executable(number)
        self.state, tokens = executable(self.weights.leaves, self.state, buffer)
        return cast(Array, tokens)

    def forward(self, number: int, buffer: NDArray[np.int32], inputs: Fields) -> ForwardResults:
        """A step program of the FULL mode, up to what `draw` does; `inputs` are the fields of `ForwardInputs`, or none
        where nobody asks for anything.
        """
        executable, full = self._compiled.executable(number), self.full
        given = ForwardInputs(**cast(dict[str, Array], inputs)) if inputs else self._nothing_asked(number)
        self.state, vectors, self._undrawn, results = executable(
            self.weights.leaves, self.state, full.vectors, buffer, given
        )
        self._full = replace(full, vectors=vectors)
        return cast(ForwardResults, results)

    def draw(self, number: int, inputs: Fields) -> Drawn:
        """The program that draws what the latest `forward` has left; `inputs` are fields of `DrawInputs`, without
        `masks` where all tokens may be drawn.
        """
        executable, undrawn = self._compiled.executable(number), self._undrawn
        self._undrawn = None
        given = DrawInputs(**cast(dict[str, Array], inputs if "masks" in inputs else inputs | self._no_masks(number)))
        last_tokens, self._full, drawn = executable(
            self.weights.leaves, self.state.last_tokens, self.full, undrawn, given
        )
        self.state = replace(self.state, last_tokens=last_tokens)
        return cast(Drawn, drawn)

    def draft(self, number: int, buffer: NDArray[np.int32]) -> jax.Array:
        """A program of the draft model: the tokens drafted [drafts, rows]."""
        assert self._draft is not None
        executable = self._compiled.executable(number)
        self.state, tokens = executable(self._draft.weights.leaves, self.state, buffer)
        return cast(Array, tokens)

    def copy_pages(self, copies: PageCopies) -> None:
        self.state = replace(self.state, cache=self.copier.run(self.state.cache, copies))

    def write_pages(self, updates: NDArray[np.int32]) -> None:
        """Write into the block tables as many page updates as one of them has entries, the rest padding."""
        self.state = replace(self.state, block_tables=self._write_pages(self.state.block_tables, updates))

    def write_slot(self, slot: int, row: Fields) -> None:
        """Set what the FULL mode keeps for a slot, the fields of its `FullState`."""
        state = FullState(**cast(dict[str, Array], row))
        self._full = self._write_slot(self.full, np.int32(slot), state)

    def write_adapter(self, slot: int, values: Mapping[str, Values]) -> None:
        self.weights.leaves = self._adapters.write(self.weights.leaves, slot, values)

    def time_loads(self) -> float:
        """Seconds that a page takes from host memory to the devices."""
        seconds, cache = self.copier.seconds_per_load(self.state.cache)
        self.state = replace(self.state, cache=cache)
        return seconds

    def drop_state(self) -> None:
        """Free the memory of everything but the weights, and the pages in host memory; for `renew_state`."""
        self.copier.forget()
        for leaf in jax.tree.leaves((self.state, self._full, self._unmasked, self._unasked)):
            leaf.delete()
        self._full = None
        self._unmasked.clear()
        self._unasked.clear()

    def renew_state(self) -> None:
        """Make the state as it is before the first step; nothing is compiled anew."""
        self.state = self._placed.zero_state(self._size)

    def put_away_weights(self, *, keep: bool) -> None:
        for weights in self.all_weights:
            weights.put_away(keep=keep)

    def bring_back_weights(self) -> bool:
        """False when they were read anew, without adapters."""
        were_kept = [weights.bring_back() for weights in self.all_weights]
        return all(were_kept)

    def let_go(self) -> None:
        """Forget all of it, for good."""
        del self.state, self.weights
        self._full = None
        self._unmasked.clear()
        self._unasked.clear()

    def _nothing_asked(self, number: int) -> ForwardInputs:
        """Inputs of a step that nobody asks for more than tokens."""
        if number not in self._unasked:
            bucket = self._compiled.programs[number].bucket
            pooled, targets = np.full((bucket.num_sequences, 2), -1, np.int32), np.full(bucket.num_tokens, -1, np.int32)
            self._unasked[number] = ForwardInputs(*map(self._placed.whole_array, (pooled, targets)))
        return self._unasked[number]

    def _no_masks(self, number: int) -> dict[str, jax.Array]:
        """Masks that allow everything, of as many rows as a program draws from."""
        rows = self._compiled.programs[number].bucket.num_tokens
        if rows not in self._unmasked:
            self._unmasked[rows] = self._placed.whole_array(all_tokens(rows, self._placed.vocab_size))
        return {"masks": self._unmasked[rows]}
