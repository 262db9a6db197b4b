"""A decoder in stages: each device along the mesh axis `stage` holds some of the layers, and passes on what they give.

A step's rows are cut into microbatches, blocks of rows one after another. While a stage runs one, the stage before it
runs the next (GPipe, arXiv 1811.06965): with S stages and M microbatches a step takes M + S - 1 ticks, of which S - 1
find a stage idle. A sequence may lie in several microbatches, since a block of rows finds in every stage's cache what
the blocks before it wrote there.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from jax_engine.models.kv_pages import CacheLayout, KVPages, SequenceTable
from jax_engine.models.layers import Cache, DecoderLayer, LayerRun, Sequences, scan_layers
from jax_engine.models.rope import Rotation

Kind = TypeVar("Kind", bound=Hashable)  # what a layer is; equal layers share a program

STAGE_AXIS = "stage"
# Runs the layers of one stage over a microbatch.
RunOwn = Callable[[Float[Array, "R D"], Cache, Rotation, Sequences, CacheLayout], tuple[Float[Array, "R D"], Cache]]
# Rows of a microbatch, at least. Below about as many operations as an accelerator does while it reads a weight, rows
# that are run apart take as long as together: 918 TFLOP/s / 1.64 TB/s is 560 rows of a TPU v6e, 206 of an H200.
MICROBATCH_ROWS = 256
CPU_MICROBATCH_ROWS = 4  # on devices that a CPU pretends to be, so that small steps show what large ones do


def staged_run(kinds: Sequence[Kind], num_stages: int) -> LayerRun:
    """A decoder of layers of these kinds as one run that `num_stages` divide: whole periods for each, padded at the
    end.

    So all stages are alike, as a program must be that they share.

    Raises:
        ValueError: the stages are more than the pattern's repeats, or would leave one without any; with the numbers
            that fit.
    """
    count = len(kinds)
    period = next(size for size in range(1, count + 1) if all(kinds[i] == kinds[i % size] for i in range(count)))
    repeats = -(-count // period)
    fitting = [stages for stages in range(1, repeats + 1) if -(-repeats // -(-repeats // stages)) == stages]
    if num_stages not in fitting:
        pattern = f"repeat after {period}" if period < count else "follow no repeating pattern"
        pattern = "are alike" if period == 1 else pattern
        raise ValueError(
            f"pipeline_parallel_size={num_stages} does not fit the model's {count} layers, which {pattern}: a stage "
            f"holds whole repeats, as many as any other; sizes that fit are {', '.join(map(str, fitting))}"
        )
    padded = num_stages * -(-repeats // num_stages)
    return LayerRun(0, period, padded, padding=padded * period - count)


def of_one_stage(kinds: Sequence[Kind], num_stages: int) -> Sequence[Kind]:
    """The kinds of one stage's layers; of all layers, if there is one."""
    if num_stages == 1:
        return kinds
    run = staged_run(kinds, num_stages)
    return [kinds[layer % run.period] for layer in range(run.period * run.repeats // num_stages)]


def microbatch_rows(platform: str) -> int:
    """The least rows of a microbatch on "cpu", "gpu" or "tpu"."""
    return CPU_MICROBATCH_ROWS if platform == "cpu" else MICROBATCH_ROWS


def num_microbatches(num_rows: int, least: int) -> int:
    """How many equal microbatches of `least` rows or more a step is cut into: as many as possible."""
    return next(count for count in range(max(num_rows // least, 1), 0, -1) if num_rows % count == 0)


@dataclass(frozen=True)
class Pipeline:
    """Runs a decoder's layers over the stages of a mesh, in place of `run_layers`."""

    mesh: Mesh
    least_rows: int  # of a microbatch

    @property
    def num_stages(self) -> int:
        return int(self.mesh.shape[STAGE_AXIS])

    def block_size(self, num_rows: int) -> int:
        """Rows of a microbatch of a step."""
        return num_rows // num_microbatches(num_rows, self.least_rows)

    def run_layers(
        self,
        runs: Sequence[tuple[LayerRun, Sequence[DecoderLayer]]],
        hidden: Float[Array, "T D"],
        cache: Cache,
        rotate: Rotation,
        sequences: Sequences,
        layout: CacheLayout,
    ) -> tuple[Float[Array, "T D"], Cache]:
        """The layers of a `staged_run`, of which each stage has its part of the axis `layers`, as of the cache's.

        `layout` is that of one stage. Hidden states come and go whole: the last stage's are sent to all.
        """
        ((run, period),) = runs
        assert isinstance(cache, KVPages) and isinstance(sequences, SequenceTable)
        own = replace(run, repeats=run.repeats // self.num_stages, padding=0)
        graphs, weights = zip(*(nnx.split(layer) for layer in period), strict=True)

        def run_stage(
            stage: Int[Array, " 1"],
            weights: tuple[nnx.State, ...],
            hidden: Float[Array, "T D"],
            cache: KVPages,
            rotate: Rotation,
            sequences: SequenceTable,
        ) -> tuple[Float[Array, "T D"], KVPages]:
            layers = [nnx.merge(graph, state) for graph, state in zip(graphs, weights, strict=True)]
            run_own = partial(scan_layers, own, layers)
            return self._run_stage(stage[0], run_own, hidden, cache, rotate, sequences, layout)

        of_stage = P(STAGE_AXIS)
        return jax.shard_map(
            run_stage,
            mesh=self.mesh,
            in_specs=(of_stage, of_stage, P(), of_stage, P(), P()),
            out_specs=(P(), of_stage),
            axis_names={STAGE_AXIS},
            check_vma=False,  # kernels do not say which of their values differ between devices
        )(jnp.arange(self.num_stages), weights, hidden, cache, rotate, sequences)

    def prepare(
        self,
        prepare: Callable[..., SequenceTable],
        sequences: SequenceTable,
        cache: KVPages,
        **shapes: Any,
    ) -> SequenceTable:
        """What `prepare` (see `Ops`) makes of each microbatch, and then of none, stacked."""
        num_rows = sequences.positions.shape[0]
        size = self.block_size(num_rows)

        def work(first: Int[Array, ""]) -> PyTree[Array] | None:
            return prepare(sequences.block(first, size), cache, **shapes).work

        return replace(sequences, work=lax.map(work, jnp.arange(0, num_rows + 1, size)))

    def _run_stage(
        self,
        stage: Int[Array, ""],
        run_own: RunOwn,
        hidden: Float[Array, "T D"],
        cache: KVPages,
        rotate: Rotation,
        sequences: SequenceTable,
        layout: CacheLayout,
    ) -> tuple[Float[Array, "T D"], KVPages]:
        """The microbatches that hold any tokens, in turn, through one stage."""
        num_rows, last = hidden.shape[0], self.num_stages - 1
        size = self.block_size(num_rows)
        used = (sequences.query_starts[-1] + size - 1) // size

        def tick(number: Int[Array, ""], carry: tuple[Array, KVPages, Array]) -> tuple[Array, KVPages, Array]:
            received, cache, out = carry
            index = number - stage
            is_at_work = (index >= 0) & (index < used)
            # An idle stage computes for nobody, on a table without tokens, which leaves the cache as it is: others
            # would wait for the tick anyway, and all devices come to the same collectives equally often.
            first = jnp.where(is_at_work, index * size, num_rows)
            rows = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
            given = jnp.where(stage == 0, rows(hidden), received)
            result, written = run_own(given, cache, jax.tree.map(rows, rotate), _block(sequences, first, size), layout)
            assert written is not None
            kept = jnp.where(is_at_work, result, rows(out))
            out = lax.dynamic_update_slice_in_dim(out, kept, first, axis=0)
            return lax.ppermute(result, STAGE_AXIS, [(i, i + 1) for i in range(last)]), written, out

        start = jnp.zeros((size, hidden.shape[1]), hidden.dtype), cache, jnp.zeros_like(hidden)
        _, cache, out = lax.fori_loop(0, used + last, tick, start)
        return lax.psum(jnp.where(stage == last, out, 0), STAGE_AXIS), cache


def _block(sequences: SequenceTable, first: Int[Array, ""], size: int) -> SequenceTable:
    table = sequences.block(first, size)
    if sequences.work is not None:
        table = replace(table, work=jax.tree.map(lambda array: array[first // size], sequences.work))
    if sequences.adapters is not None and table.adapters is not None:
        # Of the step, not of the block: stages must not differ in how often they loop over adapters.
        table = replace(table, adapters=replace(sequences.adapters, slots=table.adapters.slots))
    return table
