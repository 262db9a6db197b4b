"""Drawing the next token on the device, each row by its own parameters.

A token at position `p` of a request is drawn with `fold_in(request key, p)` (counter-based, threefry: Salmon et al.,
SC 2011): it depends on the request and its position only, not on the batch around it. One uniform number a row is
compared with the cumulative distribution, so that the random bits cost nothing beside the logits.

The vocabulary is never sorted. A row's tokens are kept from a lowest logit on, which `min_p` says and `top_k` is
searched for (`top_k.py`). One of them is drawn, and `top_p` is checked for that one alone: it is kept if less than the
share of the sum is above it, which one pass over the vocabulary tells. If not, another is drawn of those above it, with
the next number of `fold_in(key, try)`: rejection sampling, as FlashInfer does (Ye et al., arXiv 2501.01005). A try
halves what may yet be rejected, and which tokens are tried depends on the row alone.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt

from jax_engine.models.partition import Partition
from jax_engine.sampling.token_blocks import in_blocks, within_block
from jax_engine.sampling.top_k import CANDIDATES, LOWEST, Kept, keep_top_k, num_from


class SamplingMode(StrEnum):
    """Which sampling a step program contains; each mode can do all that the modes before it can."""

    GREEDY = "greedy"  # every row takes the likeliest token
    SAMPLE = "sample"  # temperature, top-k, top-p, min-p, min_tokens
    FULL = "full"  # masks, and all that reads or changes logits row by row (`full_sampling.py`); one token a step


MAX_TRIES = 1000  # never reached: a bound so that no rounding can make a loop endless
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


def sample(
    logits: Float[Array, "B V"], rows: SamplingRows, mode: SamplingMode, mesh: Mesh | None = None
) -> Int[Array, " B"]:
    """The next token of each row; `full_sampling.sample_full` does what FULL has beyond SAMPLE.

    Behind `mesh`, rows are spread over all of its devices.
    """
    if mode is SamplingMode.GREEDY:
        return sample_greedy(logits)
    held = lax.cond(jnp.any(holds(rows)), hold_back, lambda logits, _: logits, logits, rows)
    return draw_or_take(held, rows, mesh)


def holds(rows: SamplingRows) -> Bool[Array, " B"]:
    """Whether tokens that would end the row are held back."""
    return rows.positions < rows.hold_until


def hold_back(logits: Float[Array, "B V"], rows: SamplingRows) -> Float[Array, "B V"]:
    """Minus infinity for the tokens that rows may not end with yet."""
    tokens = jnp.where(holds(rows)[:, None], rows.held_back, logits.shape[1])
    return logits.at[jnp.arange(logits.shape[0])[:, None], tokens].set(-jnp.inf, mode="drop")


def draw_or_take(logits: Float[Array, "B V"], rows: SamplingRows, mesh: Mesh | None) -> Int[Array, " B"]:
    """Each row's token, drawn or, at a temperature of 0, the likeliest; on each device of a mesh of its own rows."""

    def find(logits: Float[Array, "R V"], rows: SamplingRows) -> Int[Array, " R"]:
        blocks = in_blocks(logits, -jnp.inf)
        greedy, highest = _likeliest_of(blocks)
        is_drawn = rows.temperature > 0
        drawn = lax.cond(jnp.any(is_drawn), draw, lambda *_: jnp.zeros_like(greedy), blocks, rows, highest)
        return jnp.where(is_drawn, drawn, greedy).astype(jnp.int32)

    if mesh is None:
        return find(logits, rows)
    spec = PartitionSpec(mesh.axis_names)
    # Unchecked: each device tries as often as its own rows need.
    return jax.shard_map(find, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(logits, rows)


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
    return _likeliest_of(in_blocks(logits, -jnp.inf))[0]


def _likeliest_of(blocks: Float[Array, "B N S"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The `likeliest` of rows in blocks, and its logit."""
    highest = jnp.max(blocks, axis=-1)
    token = within_block(blocks, jnp.argmax(highest, axis=-1), lambda block: jnp.argmax(block, axis=-1))
    return token, jnp.max(highest, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tries:
    """The tokens that rows have drawn last, and what limits still ask of them."""

    tokens: Int[Array, " B"]
    logits: Float[Array, " B"]  # of the tokens
    is_open: Bool[Array, " B"]  # whether they may yet be rejected
    count: Int[Array, " B"]  # of those rejected
    # A token is kept if there is less above it than `top_p` of the sum, and fewer tokens than `top_k`; or infinity.
    share: Float[Array, " B"]
    number: Float[Array, " B"]


def draw(blocks: Float[Array, "B N S"], rows: SamplingRows, highest: Float[Array, " B"]) -> Int[Array, " B"]:
    """The drawn token of each row, of logits in blocks and the `highest` of each; anything if the temperature is 0."""
    kept, tries = first_try(blocks, rows, highest)
    return lax.platform_dependent(blocks, rows, kept, tries, cpu=settle_each, default=settle).tokens


def first_try(blocks: Float[Array, "B N S"], rows: SamplingRows, highest: Float[Array, " B"]) -> tuple[Kept, Tries]:
    """What `min_p` and `top_k` keep, and a token of that; a great `top_k` without `top_p` is left to be checked too."""
    is_drawn, has_min_p, has_top_p = rows.temperature > 0, rows.min_p > 0, rows.top_p < 1
    is_checked = (rows.top_k > CANDIDATES[-1]) & ~has_top_p
    by_min_p = jnp.where(has_min_p, highest + rows.temperature * jnp.log(jnp.where(has_min_p, rows.min_p, 1)), LOWEST)
    kept = Kept(highest, by_min_p, 1 / jnp.maximum(rows.temperature, 1e-6))
    kept, is_settled = keep_top_k(blocks, kept, jnp.where(is_drawn & ~is_checked, rows.top_k, 0), rows.top_p)
    has_top_p &= ~is_settled
    none = jnp.zeros_like(rows.positions)
    total, tokens, logits = _invert(blocks, kept, rows, none)
    share = jnp.where(has_top_p, rows.top_p * total, jnp.inf)
    number = jnp.where(is_checked, rows.top_k.astype(jnp.float32), jnp.inf)
    return kept, Tries(tokens, logits, is_drawn & (has_top_p | is_checked), none, share, number)


def settle(blocks: Float[Array, "B N S"], rows: SamplingRows, kept: Kept, tries: Tries) -> Tries:
    """The first try of each row that its limits keep."""
    return lax.while_loop(lambda tries: jnp.any(tries.is_open), partial(_check, blocks, rows, kept), tries)


def settle_each(blocks: Float[Array, "B N S"], rows: SamplingRows, kept: Kept, tries: Tries) -> Tries:
    """`settle` for a CPU, which takes as long for several rows as for one after another: a check of all, and then row
    by row those that are rejected.
    """
    given = (blocks, rows, kept)
    tries = lax.cond(jnp.any(tries.is_open), _check, lambda *given: given[-1], *given, tries)
    order = jnp.argsort(~tries.is_open)

    def settle_row(place: Int[Array, ""], tries: Tries) -> Tries:
        row = order[place]
        found = settle(*jax.tree.map(lambda column: lax.dynamic_slice_in_dim(column, row, 1), (*given, tries)))
        return jax.tree.map(lambda rows, one: lax.dynamic_update_slice_in_dim(rows, one, row, 0), tries, found)

    return lax.fori_loop(0, jnp.sum(tries.is_open), settle_row, tries)


def _check(blocks: Float[Array, "B N S"], rows: SamplingRows, kept: Kept, tries: Tries) -> Tries:
    """With another try where the limits do not keep the last."""
    # The barrier keeps what all tries have in common from being found, and stored, before the loop over them.
    blocks, last = lax.optimization_barrier((blocks, tries.logits))
    above = kept.above(last)
    total, tokens, logits = _invert(blocks, above, rows, tries.count + 1)
    is_counted = tries.is_open & (tries.number < jnp.inf)
    number = lax.cond(jnp.any(is_counted), num_from, lambda *_: jnp.zeros_like(total), blocks, above.lowest)
    is_rejected = ((total >= tries.share) | (number >= tries.number)) & (total > 0)
    is_open = tries.is_open & is_rejected & (tries.count < MAX_TRIES)
    again = replace(tries, tokens=tokens, logits=logits, is_open=is_open, count=tries.count + 1)
    return jax.tree.map(lambda new, old: jnp.where(is_open, new, old), again, replace(tries, is_open=is_open))


def _invert(
    blocks: Float[Array, "B N S"], kept: Kept, rows: SamplingRows, count: Int[Array, " B"]
) -> tuple[Float[Array, " B"], Int[Array, " B"], Float[Array, " B"]]:
    """The sum of each row's kept weights; the token at which the sum up to it passes the row's random number, that of
    the try after `count` others; and that token's logit.

    In two levels, blocks and then the tokens of one: a cumulative sum over the vocabulary would be a second array of
    its size.
    """
    sums = jnp.sum(kept.weigh(blocks), axis=-1)
    cumulative = jnp.cumsum(sums, axis=-1)
    total = cumulative[:, -1]
    target = jax.vmap(_uniform)(rows.keys, rows.positions, count) * total
    block = _first_past(cumulative, sums, target)
    before = jnp.take_along_axis(cumulative - sums, block[:, None], axis=1)[:, 0]
    logits = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    weights = kept.weigh(logits)
    place = _first_past(jnp.cumsum(weights, axis=-1), weights, target - before)
    return total, block * blocks.shape[2] + place, jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]


def _uniform(key: UInt[Array, " 2"], position: Int[Array, ""], count: Int[Array, ""]) -> Float[Array, ""]:
    """The random number of a try at a position, in the middle of one of 2**23 equal parts of [0, 1]."""
    own = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), position)
    again = jax.random.fold_in(own, count)
    data = jnp.where(count > 0, jax.random.key_data(again), jax.random.key_data(own))
    return jax.random.uniform(jax.random.wrap_key_data(data, impl="threefry2x32")) + 2.0**-24


def ends_sequence(tokens: Int[Array, " B"], positions: Int[Array, " B"], rows: SamplingRows) -> Bool[Array, " B"]:
    """Whether each row's token, at its position, is one to stop at: what `Request.append` decides on the host."""
    return jnp.any(tokens[:, None] == rows.held_back, axis=-1) & (positions + 1 >= rows.hold_until)


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
