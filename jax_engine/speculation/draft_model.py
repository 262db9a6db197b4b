"""A draft model on the device: its weights, its place beside the model that it drafts for, and its buffers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import jax
import msgspec
import numpy as np
from numpy.typing import NDArray

from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.compilation.planner import draft_model_programs
from jax_engine.compilation.surroundings import Surroundings
from jax_engine.config import EngineConfig
from jax_engine.execution.kv_scales import load_weights
from jax_engine.execution.step_batch import BatchLayout, SlotParameters, order_chunks, pack_batch, page_updates_of
from jax_engine.execution.step_program import Program
from jax_engine.execution.weights import Weights
from jax_engine.loading.loader import load_config
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.scheduling.step_plan import Chunk
from jax_engine.sharding.placed_model import PlacedModel, StateSize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingDrafts:
    """What the draft model was launched for: chunks in the order of its rows, and its tokens, still on the device."""

    chunks: Sequence[Chunk]
    tokens: jax.Array  # [drafts, rows]

    def resolve(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks of the step behind it with the drafts themselves. Waits for them."""
        columns = np.asarray(self.tokens).T
        rows = {chunk.slot: columns[row].tolist() for row, chunk in enumerate(self.chunks)}
        return [
            msgspec.structs.replace(chunk, drafts=rows[chunk.slot][: len(chunk.drafts)]) if chunk.fill else chunk
            for chunk in chunks
        ]


class DraftModel:
    """The draft model of a `speculative_config`. Mutable; owned by the runner, whose device state holds its cache."""

    def __init__(self, config: EngineConfig, target: PlacedModel, shared: Surroundings) -> None:
        """Lay it out beside the model that it drafts for, which becomes `target` with a draft.

        Raises:
            ValueError: it has another vocabulary, or one of the two has layers that see only a window.
        """
        assert config.speculation is not None and config.draft_model is not None
        name = config.draft_model
        self._folder = resolve_model_path(name)
        model_config, model_class = load_config(self._folder)
        if model_config.vocab_size != target.vocab_size:
            raise ValueError(
                f"speculative_config.model={name!r} has a vocabulary of {model_config.vocab_size} tokens, and "
                f"the model {config.model or 'demo'!r} one of {target.vocab_size}; a draft model needs the same"
            )
        draft = PlacedModel.of(model_class, model_config, **shared)
        for which, windows in (("the model", target.geometry.layout.windows), (name, draft.geometry.layout.windows)):
            if windows != (0,):
                raise ValueError(
                    f"speculative_config.method='draft_model' needs models whose layers see the whole context, and "
                    f"{which} has layers that see only a window; use the method 'ngram'"
                )
        self.model = model_config
        self.max_len = model_config.max_model_len
        self.num_drafts = config.speculation.num_speculative_tokens
        geometry = replace(target.geometry, draft_bytes=draft.geometry.page_bytes)
        self.target = replace(target, draft=draft, geometry=geometry, num_drafts=self.num_drafts)
        self._programs = draft_model_programs(config.max_num_seqs, config.token_budget, self.num_drafts)
        self._draft = draft
        self._num_slots = config.max_num_seqs
        self.weights: Weights
        logger.info("draft model: %s, %.1f MiB of weights", self._folder, draft.structure.num_bytes / 2**20)

    @property
    def num_bytes(self) -> int:
        """Memory of its weights on each device."""
        parameters = self._draft.structure.parameters
        return sum(
            prod(self._draft.sharding_of(parameter).shard_shape(parameter.shape)) * parameter.dtype.itemsize
            for parameter in parameters
        )

    def load(self, config: EngineConfig) -> None:
        """Read its weights, or draw them."""
        self.weights = Weights(partial(load_weights, self._draft, self.model, self._folder, config))

    def lower(self, program: Program, size: StateSize) -> jax.stages.Lowered:
        """Trace one of its programs."""
        return self.target.lower_draft(self._layouts[program], size)

    def pack(
        self, compiled: CompiledSteps, chunks: Sequence[Chunk], parameters: SlotParameters
    ) -> tuple[Program, list[Chunk], NDArray[np.int32]]:
        """What takes in the fills of a step's chunks, those that have any, and drafts behind them: the program, the
        chunks in the order of its rows, and its buffer.
        """
        filled = order_chunks(
            [
                msgspec.structs.replace(
                    chunk, start=chunk.fill.start, length=len(chunk.fill), num_draws=len(chunk.drafts), drafts=()
                )
                for chunk in chunks
                if chunk.fill
            ]
        )
        program, _ = compiled.find_draft(sum(chunk.length for chunk in filled), len(filled))
        layout = self._layouts[program]
        return program, filled, pack_batch(filled, page_updates_of(filled, layout), layout, parameters)

    @cached_property
    def _layouts(self) -> dict[Program, BatchLayout]:
        page_size = self._draft.geometry.page_size
        more = self.num_drafts // page_size + 1  # pages of a sequence's drafts
        return {
            program: BatchLayout(
                program.bucket, page_size, self._num_slots, num_more_updates=more * program.bucket.num_sequences
            )
            for program in self._programs
        }
