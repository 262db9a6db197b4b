"""The experts of a mixture in XLA operations: each row goes through the few that it chose.

Specified by `pallas_kernels.reference.expert_feed_forward`, which says what the arrays are. Rows are sorted by the
expert they chose, and taken as many at a time as a loop's body has room for; its bound is the real number of rows, so
none is ever dropped, whatever the experts' loads. What a row gets is added up in float32 in the order of the experts.
The weights of all layers are given, and read in place: a slice of those of one layer would be a copy for every step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Rows of one expert in one product. On 2 CPU cores, with 32 experts of [256, 128], blocks of 64 take half the time of 8
# where an expert has 64 rows, and three times as much where it has one.
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 8, 64
# Choices of an expert, for each expert there is. By blocks, each expert that is met crosses the memory three times; of
# twice as many choices as experts, 6 of 7 experts are met if there are many.
MOST_GATHERED = 2
MIN_RAGGED_ROWS, MAX_RAGGED_ROWS = 512, 8192  # in one `ragged_dot`


class _Assignments(NamedTuple):
    """Rows by expert: the first `sizes[0]` are the first one's, and so on; what chose none here comes last."""

    tokens: Int[Array, " R"]  # each one's row of x
    shares: Float[Array, " R"]
    starts: Int[Array, " E"]
    sizes: Int[Array, " E"]

    @classmethod
    def of(
        cls, chosen: Int[Array, "T C"], shares: Float[Array, "T C"], num_experts: int, *, padding: int
    ) -> "_Assignments":
        """Those of all rows, and `padding` more entries at the end, so that every block can be read whole."""
        flat = chosen.reshape(-1)
        experts = jnp.where((flat >= 0) & (flat < num_experts), flat, num_experts)
        order = jnp.argsort(experts)
        sizes = jnp.sum(experts[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
        tokens = jnp.pad((order // chosen.shape[1]).astype(jnp.int32), (0, padding))
        return cls(tokens, jnp.pad(shares.reshape(-1)[order], (0, padding)), jnp.cumsum(sizes) - sizes, sizes)

    def add(
        self,
        total: Float[Array, "T D"],
        x: Float[Array, "T D"],
        first: Int[Array, ""],
        rows: int,
        used: Int[Array, ""],
        run: Callable[[Array], Array],
    ) -> Float[Array, "T D"]:
        """`total` with what `run` makes of assignments `first` to `first + rows`, of which the first `used` count."""
        tokens = lax.dynamic_slice_in_dim(self.tokens, first, rows)
        shares = lax.dynamic_slice_in_dim(self.shares, first, rows)
        # Not a product with a zero share: that of what is not finite would be no zero.
        own = jnp.where((jnp.arange(rows) < used)[:, None], run(x[tokens]) * shares[:, None], 0)
        return total.at[tokens].add(own)


def blocked_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T C"],
    shares: Float[Array, "T C"],
    gate: Float[Array, "L E D F"],
    up: Float[Array, "L E D F"],
    down: Float[Array, "L E F D"],
    *,
    layer: int | Int[Array, ""],
    activation: Callable[[Array], Array],
) -> Float[Array, "T D"]:
    """One expert at a time, by blocks of its rows: only chosen experts are read, and no row meets another's expert.

    All products have one shape, which follows from the number of rows in `x` alone. So a row's result does not depend,
    bit for bit, on the rows beside it.
    """
    num_experts = gate.shape[1]
    rows = _block_rows(chosen.size, num_experts)
    assigned = _Assignments.of(chosen, shares, num_experts, padding=rows)
    blocks = (assigned.sizes + rows - 1) // rows
    ends = jnp.cumsum(blocks)

    def add(item: Int[Array, ""], total: Float[Array, "T D"]) -> Float[Array, "T D"]:
        expert = jnp.sum(ends <= item)
        before = (item - (ends - blocks)[expert]) * rows  # of this expert's rows

        def run(block: Float[Array, "B D"]) -> Float[Array, "B D"]:
            def product(values: Array, weights: Array) -> Array:
                return jnp.dot(values, weights[layer, expert], preferred_element_type=jnp.float32)

            inner = activation(product(block, gate)) * product(block, up)
            return product(inner.astype(x.dtype), down)

        first = assigned.starts[expert] + before
        return assigned.add(total, x, first, rows, assigned.sizes[expert] - before, run)

    return lax.fori_loop(0, ends[-1], add, jnp.zeros(x.shape, jnp.float32))


def _block_rows(num_assignments: int, num_experts: int) -> int:
    """Rows in one product: about as many as an expert has on average, a power of two."""
    average = num_assignments // num_experts
    return min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, 1 << average.bit_length()))


def gathered_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T C"],
    shares: Float[Array, "T C"],
    gate: Float[Array, "L E D F"],
    up: Float[Array, "L E D F"],
    down: Float[Array, "L E F D"],
    *,
    layer: int | Int[Array, ""],
    activation: Callable[[Array], Array],
) -> Float[Array, "T D"]:
    """Every row with each of its experts by itself, without a loop; for few rows on a GPU.

    Products are written as sums, into which XLA reads an expert's weights from where they are. As dot products, it
    copies those first: an expert is then read twice and written once, as in `blocked_experts`.
    """
    num_experts, num_chosen = gate.shape[1], chosen.shape[1]
    flat = chosen.reshape(-1)
    is_here = (flat >= 0) & (flat < num_experts)
    experts = jnp.where(is_here, flat, 0)

    def product(values: Float[Array, "R I"], weights: Float[Array, "L E I O"]) -> Float[Array, "R O"]:
        own = weights.at[layer, experts].get(mode="promise_in_bounds", wrap_negative_indices=False)
        return jnp.sum(values.astype(jnp.float32)[:, :, None] * own.astype(jnp.float32), axis=1)

    rows = jnp.repeat(x, num_chosen, axis=0)
    inner = activation(product(rows, gate)) * product(rows, up)
    # Not a product with a zero share: that of what is not finite would be no zero.
    out = jnp.where(is_here[:, None], product(inner.astype(x.dtype), down) * shares.reshape(-1)[:, None], 0)
    return jnp.sum(out.reshape(-1, num_chosen, x.shape[1]), axis=1)


def gpu_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T C"],
    shares: Float[Array, "T C"],
    gate: Float[Array, "L E D F"],
    up: Float[Array, "L E D F"],
    down: Float[Array, "L E F D"],
    *,
    layer: int | Int[Array, ""],
    activation: Callable[[Array], Array],
) -> Float[Array, "T D"]:
    """`gathered_experts` where rows are few enough, else `blocked_experts`."""
    is_few = chosen.size <= MOST_GATHERED * gate.shape[1]
    run = gathered_experts if is_few else blocked_experts
    return run(x, chosen, shares, gate, up, down, layer=layer, activation=activation)


def ragged_experts(
    x: Float[Array, "T D"],
    chosen: Int[Array, "T C"],
    shares: Float[Array, "T C"],
    gate: Float[Array, "L E D F"],
    up: Float[Array, "L E D F"],
    down: Float[Array, "L E F D"],
    *,
    layer: int | Int[Array, ""],
    activation: Callable[[Array], Array],
    parts: int | None = None,
    min_rows: int = MIN_RAGGED_ROWS,
) -> Float[Array, "T D"]:
    """All experts at once by `jax.lax.ragged_dot`, a kernel of its own on a TPU.

    With `parts`, the experts are one of so many parts of all, and assignments are taken by pieces of about twice as
    many as a part has on average: usually one, whose rows alone take memory and time. Without, all are one piece, and
    it can be differentiated.
    """
    num_layers, num_experts = gate.shape[:2]
    rows = chosen.size
    if parts is not None:
        rows = min(rows, max(min_rows, min(2 * rows // parts, MAX_RAGGED_ROWS)))
    assigned = _Assignments.of(chosen, shares, num_experts, padding=-chosen.size % rows)
    starts, ends = assigned.starts, assigned.starts + assigned.sizes

    def add(item: int | Int[Array, ""], total: Float[Array, "T D"]) -> Float[Array, "T D"]:
        first = jnp.asarray(item * rows, jnp.int32)
        sizes = jnp.clip(ends - first, 0, rows) - jnp.clip(starts - first, 0, rows)
        # Of all layers' experts, those of the others have no rows.
        groups = lax.dynamic_update_slice_in_dim(
            jnp.zeros(num_layers * num_experts, jnp.int32), sizes, layer * num_experts, 0
        )

        def run(chunk: Float[Array, "R D"]) -> Float[Array, "R D"]:
            def product(values: Array, weights: Array) -> Array:
                stack = weights.reshape(-1, *weights.shape[2:])
                return lax.ragged_dot(values, stack, groups, preferred_element_type=jnp.float32)

            inner = activation(product(chunk, gate)) * product(chunk, up)
            return product(inner.astype(x.dtype), down)

        return assigned.add(total, x, first, rows, ends[-1] - first, run)

    zeros = jnp.zeros(x.shape, jnp.float32)
    return add(0, zeros) if rows == chosen.size else lax.fori_loop(0, (ends[-1] + rows - 1) // rows, add, zeros)
