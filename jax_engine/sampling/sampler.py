"""Drawing the next token on the device, each row by its own parameters.

A token at position `p` of a request is drawn with `fold_in(request key, p)` (counter-based, threefry: Salmon et al.,
SC 2011): it depends on the request and its position only, not on the batch around it. One uniform number a row is
compared with the cumulative distribution, so that the random bits cost nothing beside the logits. Thresholds for
top-k and top-p are found without sorting the vocabulary: by bisection over the bits of a float32, 32 passes of
compare-and-sum, exact. On a CPU, rows whose limits leave few tokens are drawn among those, by `lax.top_k`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from jax_engine.models.partition import Partition


class SamplingMode(StrEnum):
    """Which sampling a step program contains; each mode can do all that the modes before it can."""

    GREEDY = "greedy"  # every row takes the likeliest token
    SAMPLE = "sample"  # temperature, top-k, top-p, min-p, min_tokens
    FULL = "full"  # masks, and all that reads or changes logits row by row (`full_sampling.py`); one token a step


# For top-k and top-p, beyond which `lax.top_k` takes longer: 18 ms for 20 on 2 cores, 21 for 256, 49 for 1024.
NUM_CANDIDATES = 256
CACHED_LOGITS = 2**18  # as floats, half of what the second cache of a processor's core holds
BLOCK_TOKENS = 512  # that are summed, or compared, before blocks are
SMALLEST_BLOCK = 64  # a vocabulary that larger ones do not divide is padded
LOOPING_MODES = (SamplingMode.GREEDY, SamplingMode.SAMPLE)  # those whose steps may draw several tokens a row


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingRows:
    """The parameters of each row (sequence) of a step."""

    temperature: Float[Array, " B"]  # 0 is greedy
    top_k: Int[Array, " B"]  # 0 is all
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    keys: UInt[Array, "B 2"]
    positions: Int[Array, " B"]  # of the token to draw
    hold_until: Int[Array, " B"]  # tokens of `held_back` are not drawn at positions before this one
    held_back: Int[Array, "B 32"]  # those that end the sequence, padded with an id past the vocabulary


def sample(logits: Float[Array, "B V"], rows: SamplingRows, mode: SamplingMode) -> Int[Array, " B"]:
    """The next token of each row; `full_sampling.sample_full` does what FULL has beyond SAMPLE."""
    if mode is SamplingMode.GREEDY:
        return sample_greedy(logits)
    holds = rows.positions < rows.hold_until
    index = jnp.arange(logits.shape[0])[:, None]
    held = logits.at[index, jnp.where(holds[:, None], rows.held_back, logits.shape[1])].set(-jnp.inf, mode="drop")
    is_drawn = rows.temperature > 0
    # Asked together: rows that are spread over devices take one sum over them.
    limits = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
    asked = jnp.any(jnp.stack([is_drawn, is_drawn & limits]), axis=1)
    greedy = likeliest(held)
    drawn = lax.cond(asked[0], _draw, lambda *_: jnp.zeros_like(greedy), held, rows, asked[1])
    return jnp.where(is_drawn, drawn, greedy).astype(jnp.int32)


def sample_greedy(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The likeliest token of each row."""
    return lax.platform_dependent(logits, cpu=likeliest, default=_argmax).astype(jnp.int32)


def likeliest_of_parts(logits: Float[Array, "B V"], partition: Partition, vocab_size: int) -> Int[Array, " B"]:
    """`argmax` of each row, the first of equals, of logits whose vocabulary is split over devices: each finds its own
    part's, and only those and their values travel. Columns from `vocab_size` on are padding.
    """
    axes = partition.mesh_axes("vocab")
    if partition.mesh is None or not axes:
        return sample_greedy(logits[:, :vocab_size])

    def find(part: Float[Array, "B S"]) -> Int[Array, " B"]:
        first = lax.axis_index(axes) * part.shape[1]
        own = jnp.where(first + jnp.arange(part.shape[1]) < vocab_size, part, -jnp.inf)
        token = sample_greedy(own)
        value = jnp.take_along_axis(own, token[:, None], axis=1)[:, 0]
        pairs = jnp.stack([lax.bitcast_convert_type(value, jnp.int32), first + token])
        values, tokens = jnp.moveaxis(lax.all_gather(pairs, axes), 1, 0)  # [devices, B] each
        best = jnp.argmax(lax.bitcast_convert_type(values, jnp.float32), axis=0)
        return jnp.take_along_axis(tokens, best[None], axis=0)[0]

    spec = partition.spec((None, "vocab"))
    return jax.shard_map(find, mesh=partition.mesh, in_specs=spec, out_specs=PartitionSpec(), check_vma=False)(logits)


def _argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    return jnp.argmax(logits, axis=-1)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """`argmax` of each row, the first of equals: a maximum over blocks, and an `argmax` of the one that has it, which
    on a CPU takes a tenth of the time.
    """
    blocks = _blocks(logits, -jnp.inf)
    highest = jnp.max(blocks, axis=-1)
    return _within_block(blocks, jnp.argmax(highest, axis=-1), lambda block: jnp.argmax(block, axis=-1))


def _draw(logits: Float[Array, "B V"], rows: SamplingRows, any_limits: Bool[Array, ""]) -> Int[Array, " B"]:
    """The drawn token of each row; anything where the temperature is 0."""

    def limited(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
        return lax.platform_dependent(logits, rows, cpu=draw_by_candidates, default=draw_by_bisection)

    def unlimited(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
        return lax.platform_dependent(logits, rows, cpu=draw_in_groups, default=draw_by_bisection)

    return lax.cond(any_limits, limited, unlimited, logits, rows)


def draw_by_candidates(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Draw among each row's likeliest tokens where all that its limits keep are among them; bisect others'.

    Which way a row is drawn depends on that row alone. Nothing of the vocabulary's size is made on the way.
    """
    num_candidates = min(NUM_CANDIDATES, logits.shape[1])
    # Fused with what follows, XLA sorts whole rows on a CPU: 5 s instead of 50 ms for 64 rows of 131,072. One barrier a
    # result: of both at once it would make their tuple, which XLA's pass over top-k on several devices does not expect.
    values, tokens = map(lax.optimization_barrier, lax.top_k(logits, num_candidates))
    temperature, top_k = jnp.maximum(rows.temperature, 1e-6)[:, None], rows.top_k[:, None]
    weights = jnp.exp((values - values[:, :1]) / temperature)
    kth = jnp.take_along_axis(weights, jnp.clip(top_k, 1, num_candidates) - 1, axis=1)
    lightest = jnp.maximum(rows.min_p[:, None], jnp.where(top_k > 0, kth, 0))
    kept = jnp.where(weights >= lightest, weights, 0)
    # Of equals with the last candidate, some may not be among them.
    has_rest = num_candidates < logits.shape[1]
    is_whole = (weights[:, -1:] < lightest) if has_rest else jnp.ones_like(lightest, bool)
    is_top_p, is_drawn = rows.top_p < 1, rows.temperature > 0
    needs_sum = is_drawn & is_top_p & ~is_whole[:, 0] & (rows.top_k == 0) & (rows.min_p == 0)

    def sum_all() -> Float[Array, " B"]:
        return jnp.sum(jnp.exp((logits - values[:, :1]) / temperature), axis=-1)

    total = jnp.where(needs_sum, lax.cond(jnp.any(needs_sum), sum_all, lambda: rows.top_p), jnp.sum(kept, axis=-1))
    reached = jnp.cumsum(kept, axis=-1) >= (rows.top_p * total)[:, None]
    at_top_p = jnp.take_along_axis(weights, jnp.argmax(reached, axis=-1)[:, None], axis=1)
    is_cut = jnp.any(reached, axis=-1) & ((weights[:, -1] < at_top_p[:, 0]) if has_rest else True)
    is_settled = jnp.where(is_top_p, (is_whole[:, 0] | needs_sum) & is_cut, is_whole[:, 0])
    kept = jnp.where(weights >= jnp.where(is_top_p[:, None], at_top_p, 0), kept, 0)
    tokens, kept = lax.sort((tokens, kept), num_keys=1)  # in the order of bisection's cumulative sum: the same token
    drawn = jnp.take_along_axis(tokens, _invert(kept, rows)[:, None], axis=1)[:, 0]
    is_settled |= ~is_drawn
    return lax.cond(
        jnp.all(is_settled),
        lambda: drawn,
        lambda: jnp.where(is_settled, drawn, draw_in_groups(logits, rows, ~is_settled)),
    )


def draw_in_groups(
    logits: Float[Array, "B V"], rows: SamplingRows, needed: Bool[Array, " B"] | None = None
) -> Int[Array, " B"]:
    """`draw_by_bisection` of groups of rows that fit into a processor's cache, as far as any of a group needs it (by
    default, if it is drawn); anything for the others.
    """
    needed = rows.temperature > 0 if needed is None else needed
    num_rows, vocab_size = logits.shape
    size = max(1, min(num_rows, CACHED_LOGITS // vocab_size))
    size = next(count for count in range(size, 0, -1) if num_rows % count == 0)

    def draw(group: tuple[Float[Array, "G V"], SamplingRows, Bool[Array, " G"]]) -> Int[Array, " G"]:
        logits, rows, needed = group
        return lax.cond(jnp.any(needed), draw_by_bisection, lambda *_: jnp.zeros(size, jnp.int32), logits, rows)

    groups = jax.tree.map(lambda column: column.reshape(-1, size, *column.shape[1:]), (logits, rows, needed))
    return lax.map(draw, groups).reshape(-1)


def draw_by_bisection(logits: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Draw among all tokens, after 32 passes over them for each of the limits that any row has."""
    scaled = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))  # relative to the likeliest token, which has 1
    weights = jnp.where(weights >= rows.min_p[:, None], weights, 0)
    is_drawn = rows.temperature > 0
    weights = _skip_unless(jnp.any(is_drawn & (rows.top_k > 0)), keep_top_k, weights, rows.top_k)
    weights = _skip_unless(jnp.any(is_drawn & (rows.top_p < 1)), keep_top_p, weights, rows.top_p)
    return _invert(weights, rows)


def ends_sequence(tokens: Int[Array, " B"], positions: Int[Array, " B"], rows: SamplingRows) -> Bool[Array, " B"]:
    """Whether each row's token, at its position, is one to stop at: what `Request.append` decides on the host."""
    return jnp.any(tokens[:, None] == rows.held_back, axis=-1) & (positions + 1 >= rows.hold_until)


def keep_top_k(weights: Float[Array, "B V"], top_k: Int[Array, " B"]) -> Float[Array, "B V"]:
    """Zero what is lighter than the k-th heaviest; ties with it stay. `top_k` of 0 keeps all."""
    wanted = jnp.where(top_k > 0, top_k, weights.shape[1])
    threshold = _largest_threshold(lambda low: jnp.sum(weights >= low, axis=-1) >= wanted, weights.shape[0])
    return jnp.where(weights >= threshold, weights, 0)


def keep_top_p(weights: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, "B V"]:
    """Keep the heaviest whose share of the sum reaches `top_p`, zero the rest; ties with the lightest kept stay."""
    wanted = top_p * jnp.sum(weights, axis=-1)
    threshold = _largest_threshold(lambda low: _sum_where(weights >= low, weights) >= wanted, weights.shape[0])
    return jnp.where((weights >= threshold) | (top_p >= 1)[:, None], weights, 0)


def _skip_unless(
    needed: Bool[Array, ""],
    keep: Callable[[Float[Array, "B V"], Array], Float[Array, "B V"]],
    weights: Float[Array, "B V"],
    limits: Array,
) -> Float[Array, "B V"]:
    return lax.cond(needed, keep, lambda weights, _: weights, weights, limits)


def _sum_where(condition: Bool[Array, "B V"], weights: Float[Array, "B V"]) -> Float[Array, " B"]:
    return jnp.sum(jnp.where(condition, weights, 0), axis=-1)


def _bisect(holds: Callable[[Int[Array, " B"]], Bool[Array, " B"]], bound: int, num_rows: int) -> Int[Array, " B"]:
    """For each row the largest number in `[0, bound)` at which `holds` is true; it is true at 0, and false from some
    number on.
    """

    def narrow(_: int, limits: tuple[Int[Array, " B"], Int[Array, " B"]]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        low, high = limits
        middle = low + (high - low) // 2
        inside = holds(middle)
        return jnp.where(inside, middle, low), jnp.where(inside, high, middle)

    start = (jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, bound, jnp.int32))
    return lax.fori_loop(0, bound.bit_length(), narrow, start)[0]


def _largest_threshold(
    enough: Callable[[Float[Array, "B 1"]], Bool[Array, " B"]], num_rows: int
) -> Float[Array, "B 1"]:
    """The largest weight in [0, 1] at which `enough` still holds, exactly: non-negative floats order as their bits
    do.
    """

    def as_float(bits: Int[Array, " B"]) -> Float[Array, "B 1"]:
        return lax.bitcast_convert_type(bits, jnp.float32)[:, None]

    one = int(np.float32(1).view(np.int32))
    return as_float(_bisect(lambda bits: enough(as_float(bits)), one + 1, num_rows))


def _invert(weights: Float[Array, "B V"], rows: SamplingRows) -> Int[Array, " B"]:
    """Invert the cumulative distribution of each row at its own uniform number.

    In two levels, blocks and then the tokens of one: a cumulative sum over the vocabulary would be a second array of
    its size.
    """

    def uniform(key: UInt[Array, " 2"], position: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position))

    blocks = _blocks(weights, 0)
    sums = jnp.sum(blocks, axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    target = jax.vmap(uniform)(rows.keys, rows.positions) * cumulative[:, -1]
    block = _first_past(cumulative, sums, target)
    before = jnp.take_along_axis(cumulative - sums, block[:, None], axis=1)[:, 0]

    def invert(tokens: Float[Array, "B S"]) -> Int[Array, " B"]:
        return _first_past(jnp.cumsum(tokens, axis=-1), tokens, target - before)

    return _within_block(blocks, block, invert)


def _first_past(
    cumulative: Float[Array, "B N"], weights: Float[Array, "B N"], target: Float[Array, " B"]
) -> Int[Array, " B"]:
    """The first entry that has weight and at which the cumulative sum passes the target; the last with weight where
    rounding brings the target up to the whole sum.
    """
    has_weight = weights > 0
    is_past = has_weight & (cumulative > target[:, None])
    last = weights.shape[1] - 1 - jnp.argmax(has_weight[:, ::-1], axis=-1)
    return jnp.where(jnp.any(is_past, axis=-1), jnp.argmax(is_past, axis=-1), last)


def _blocks(rows: Float[Array, "B V"], padding: float) -> Float[Array, "B N S"]:
    """Each row in blocks of as many tokens as divide it, up to `BLOCK_TOKENS`; of so many, with `padding` behind it,
    where that would be fewer than `SMALLEST_BLOCK`.
    """
    size = math.gcd(rows.shape[1], BLOCK_TOKENS)
    if size < SMALLEST_BLOCK <= rows.shape[1]:
        rows, size = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK_TOKENS)), constant_values=padding), BLOCK_TOKENS
    return rows.reshape(rows.shape[0], -1, size)


def _within_block(
    blocks: Float[Array, "B N S"], block: Int[Array, " B"], choose: Callable[[Float[Array, "B S"]], Int[Array, " B"]]
) -> Int[Array, " B"]:
    """The token that is chosen in one block of each row."""
    return block * blocks.shape[2] + choose(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0])
