"""The running softmax that both phases keep in VMEM (Milakov and Gimelshein 2018, arXiv 1805.02867), in base 2."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jax_engine.pallas_kernels.tpu.geometry import LANES

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # the maximum of a row that has seen nothing
HIDDEN = -2e30  # the score of what a query must not see: below LOWEST, so that its weight is 0, and finite


Index = (
    int | jax.Array | tuple[jax.Array, pl.Slice | slice]
)  # of rows in the state: a group, or a head and a slice of rows


@dataclass(frozen=True)
class SoftmaxState:
    """Maximum, sum and weighted values of some rows, all float32. The maximum is the same in every lane; the sum is
    spread over the lanes, and is added up once, at the end.
    """

    maximum: jax.Ref  # [..., rows, 128]
    total: jax.Ref  # [..., rows, 128]
    values: jax.Ref  # [..., rows, W]

    def reset(self, sinks: jax.Ref | None) -> None:
        """Start rows that have seen nothing yet but their sink, if there are sinks (scores in base 2)."""
        self.maximum[...] = jnp.full(self.maximum.shape, LOWEST, jnp.float32) if sinks is None else sinks[...]
        one = 0.0 if sinks is None else 1 / LANES  # the weight of the sink, in every lane
        self.total[...] = jnp.full(self.total.shape, one, jnp.float32)
        self.values[...] = jnp.zeros(self.values.shape, jnp.float32)

    def weigh(self, index: Index, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Take scores [rows, tokens] in, tokens a multiple of 128; their weights, and the factor [rows, 128] by which
        what was summed before shrinks.
        """
        repeats = scores.shape[1] // LANES
        maximum = self.maximum[index]
        new = jnp.maximum(maximum, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - repeat_lanes(new, repeats))
        shrink = jnp.exp2(maximum - new)
        self.maximum[index] = new
        total = self.total[index] * shrink
        for part in range(repeats):
            total += weights[:, part * LANES : (part + 1) * LANES]
        self.total[index] = total
        return weights, shrink

    def add(self, index: Index, shrink: jax.Array, values: jax.Array) -> None:
        """Add weighted values [rows, W]."""
        self.values[index] = self.values[index] * repeat_lanes(shrink, values.shape[1] // LANES) + values

    def result(self, index: Index) -> jax.Array:
        """Attention of some rows, float32; zero for rows that saw nothing."""
        total = jnp.sum(self.total[index], axis=1, keepdims=True)
        return self.values[index] / jnp.maximum(total, 1e-30)


def repeat_lanes(lanes: jax.Array, repeats: int) -> jax.Array:
    """The same registers side by side."""
    return lanes if repeats == 1 else jnp.concatenate([lanes] * repeats, axis=1)


def score_transform(soft_cap: float | None) -> Callable[[jax.Array], jax.Array]:
    """From products of scaled queries with keys to scores in base 2; without a cap, log2(e) is in the queries."""
    if soft_cap is None:
        return lambda scores: scores
    return lambda scores: jnp.tanh(scores) * (soft_cap * LOG2_E)


def query_factor(scale: float, soft_cap: float | None) -> float:
    """What queries are multiplied by before the kernel (see `score_transform`)."""
    return scale * LOG2_E if soft_cap is None else scale / soft_cap


def product(left: jax.Array, right: jax.Array, contract: int) -> jax.Array:
    """`left` [M, A] times `right` over its dimension `contract`, in float32. Eight-bit keys and values go into the
    matrix unit as they are where it takes them.
    """
    if left.dtype == jnp.float32:
        right = right.astype(jnp.float32)
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return lax.dot_general(
        left, right, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32, precision=precision
    )
