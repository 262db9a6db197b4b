"""The one step function: tokens in, next tokens out, the device state replaced."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_engine.loader import ModelStructure
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.sampler import SamplingMode, sample
from jax_engine.sharding import Placement
from jax_engine.step_batch import TAKE_LAST, BatchLayout, Bucket, StepBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """What stays on the device between steps; donated to each step and replaced by its result."""

    cache: KVPages
    block_tables: Int[Array, "slots M"]  # pages of the sequence in each slot
    last_tokens: Int[Array, " slots"]  # the token each slot drew last

    @classmethod
    def zeros(cls, cache_shape: tuple[int, ...], dtype: jnp.dtype, *, num_slots: int, max_pages: int) -> "DeviceState":
        return cls(
            KVPages.zeros(cache_shape, dtype),
            jnp.zeros((num_slots, max_pages), jnp.int32),
            jnp.zeros(num_slots, jnp.int32),
        )


@dataclass(frozen=True, order=True)
class Program:
    """The compile key of a step: everything that shapes its executable beside the model and the shardings."""

    bucket: Bucket
    mode: SamplingMode

    def __str__(self) -> str:
        return f"{self.bucket.num_tokens} tokens x {self.bucket.num_sequences} sequences, {self.mode}"


StepFunction = Callable[[tuple[jax.Array, ...], DeviceState, Int[Array, " W"]], tuple[DeviceState, Int[Array, " B"]]]


def step_function(
    structure: ModelStructure, layout: BatchLayout, mode: SamplingMode, placement: Placement
) -> StepFunction:
    """The function that a step program compiles, for one layout and one sampling mode.

    It takes the model's flat leaves, the device state (donate it) and a packed buffer, and returns the new state and
    the token drawn for each row of the batch.
    """
    num_tokens = layout.bucket.num_tokens

    def step(
        leaves: tuple[jax.Array, ...], state: DeviceState, buffer: Int[Array, " W"]
    ) -> tuple[DeviceState, Int[Array, " B"]]:
        model = structure.merge(leaves)
        batch = StepBatch.unpack(buffer, layout)
        slot, index, page = batch.page_updates.T
        block_tables = state.block_tables.at[slot, index].set(page, mode="drop")
        sequences = SequenceTable.build(
            block_tables[jnp.minimum(batch.slots, layout.num_slots - 1)],
            batch.query_starts,
            batch.kv_lengths,
            batch.num_decodes,
            num_tokens=num_tokens,
        )
        last = jnp.append(state.last_tokens, 0)[jnp.append(batch.slots, layout.num_slots)[sequences.token_sequences]]
        tokens = jnp.where(batch.tokens == TAKE_LAST, last, batch.tokens)
        hidden, cache = model(tokens, sequences.positions, state.cache, sequences)
        assert isinstance(cache, KVPages)
        last_rows = jnp.maximum(batch.query_starts[1:] - 1, 0)
        logits, rows = model.compute_logits(hidden[last_rows]), batch.sampling
        if mode is not SamplingMode.GREEDY:
            # A row's draw sums over the vocabulary dozens of times: on one device, and in the same order on any mesh.
            logits = placement.by_rows(logits, (None, "vocab"))
            rows = jax.tree.map(lambda column: placement.by_rows(column, ()), rows)
        drawn = placement.constrain(sample(logits, rows, mode), ())
        kept = jnp.where(batch.samples == 1, batch.slots, layout.num_slots)
        last_tokens = state.last_tokens.at[kept].set(drawn, mode="drop")
        return DeviceState(cache, block_tables, last_tokens), drawn

    return step
