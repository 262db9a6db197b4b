"""How large a model's keys and values are, found by running it on random tokens before the first request.

It runs as it serves: with the engine's own attention and on its mesh, over a small cache in the model's own type.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import PAGE_AXES, SequenceTable
from jax_engine.models.kv_scales import MeasuredPages
from jax_engine.sharding.placed_model import PlacedModel

NUM_SEQUENCES, NUM_TOKENS = 4, 128  # tokens of each, at most
SEED = 0


@dataclass(frozen=True)
class _Sequences:
    """Sequences of equal length, each with pages of its own in every cache group."""

    length: int
    tables: NDArray[np.int32]  # [groups, sequences, pages of one]
    num_pages: int  # of all partitions

    @classmethod
    def of(cls, placed: PlacedModel, length: int) -> "_Sequences":
        geometry, partitions = placed.geometry, placed.geometry.partitions
        shape = geometry.layout.num_groups, NUM_SEQUENCES, geometry.pages_for(length)
        size = int(np.prod(shape))  # of a partition: enough, however the pages fall
        tables, taken = np.zeros(shape, np.int32), [0] * partitions.count
        for group, sequence, index in np.ndindex(*shape):
            number = partitions.of(sequence % len(partitions.owners), index)
            tables[group, sequence, index] = number * size + taken[number]
            taken[number] += 1
        return cls(length, tables, size * partitions.count)


def measure_kv(
    placed: PlacedModel, structure: ModelStructure, model: ModelConfig, leaves: tuple[jax.Array, ...]
) -> NDArray[np.float32]:
    """The largest absolute value of each layer's keys and values, by head [layers, 2, K], copies of heads included.

    `structure` is that of `placed` over `MeasuredPages`. Equal for equal weights on equal devices.
    """
    sequences = _Sequences.of(placed, min(NUM_TOKENS, model.max_model_len))
    count = NUM_SEQUENCES * sequences.length
    tokens = random_tokens(model.vocab_size, count)
    whole = placed.placement.of()
    program = jax.jit(
        lambda leaves, tables, tokens: _largest(placed, structure, sequences, leaves, tables, tokens),
        out_shardings=whole,
        compiler_options=dict(placed.compiler_options),
    )
    largest = np.asarray(program(leaves, sequences.tables, tokens).addressable_data(0))
    layout = placed.geometry.layout
    of_stage = len(layout.groups)
    found = []
    for layer in range(model.num_hidden_layers):
        stage, own = divmod(layer, of_stage)
        place, group = stage * layout.layers_a_page + layout.places[own], layout.groups[own]
        found.append(largest[place, sequences.tables[group, :, 0]].max(axis=0))
    return np.stack(found)


def random_tokens(vocab_size: int, count: int) -> NDArray[np.int32]:
    """Tokens of no meaning, the same ones in every process."""
    return np.random.default_rng(SEED).integers(0, vocab_size, count, np.int32)


def _largest(
    placed: PlacedModel,
    structure: ModelStructure,
    sequences: _Sequences,
    leaves: tuple[jax.Array, ...],
    tables: Int[Array, "G B M"],
    tokens: Int[Array, " T"],
) -> Float[Array, "L P 2 K"]:
    """What `MeasuredPages` has taken down after a step of all sequences."""
    shape, constrain = placed.geometry.shape(sequences.num_pages), placed.placement.constrain
    pages = constrain(jnp.zeros(shape, placed.dtype), PAGE_AXES)
    largest = constrain(jnp.zeros((*shape[:2], 2, shape[3]), jnp.float32), ("cache_layers", None, None, "kv_heads"))
    lengths = jnp.full(NUM_SEQUENCES, sequences.length, jnp.int32)
    starts = sequences.length * jnp.arange(NUM_SEQUENCES + 1, dtype=jnp.int32)
    table = SequenceTable.build(tables, starts, lengths, jnp.int32(0), num_tokens=tokens.shape[0])
    _, cache = structure.merge(leaves)(tokens, table.positions, MeasuredPages(pages, largest=largest), table)
    assert isinstance(cache, MeasuredPages)
    return cache.largest
