"""Drawing tokens: against a float64 numpy implementation that sorts, by distribution, and row by row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import distribution
from scipy import stats

from jax_engine.sampling.sampler import (
    SamplingMode,
    SamplingRows,
    first_try,
    likeliest,
    sample,
    settle,
    settle_each,
)
from jax_engine.sampling.token_blocks import in_blocks
from jax_engine.sampling.top_k import LOWEST, bisect_kth, candidates

VOCAB_SIZE = 24


def rows(num_rows: int, **fields: object) -> SamplingRows:
    given = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "keys": np.stack([np.arange(num_rows), np.full(num_rows, 11)], axis=1),
        "positions": np.arange(num_rows),
        "hold_until": 0,
        "held_back": np.full((num_rows, 32), VOCAB_SIZE),
    } | fields
    types = {"temperature": jnp.float32, "top_p": jnp.float32, "min_p": jnp.float32, "keys": jnp.uint32}

    def column(name: str) -> jax.Array:
        value = jnp.asarray(given[name], types.get(name, jnp.int32))
        return jnp.broadcast_to(value, (num_rows,)) if value.ndim == 0 else value

    return SamplingRows(**{name: column(name) for name in given})


draw = jax.jit(lambda logits, rows: sample(logits, rows, SamplingMode.SAMPLE))

SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (1.7, 5, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.2),
    (1.3, 9, 0.7, 0.05),
    (1.0, 1, 1.0, 0.0),
    (1.9, 0, 0.15, 0.0),
    (1.9, 12, 0.3, 0.01),
]


def assert_drawn_from(counts: np.ndarray, shares: np.ndarray) -> None:
    """Chi-square, tokens that are expected fewer than five times taken together; and nothing without a share."""
    wanted = shares * counts.sum()
    assert counts[wanted == 0].sum() == 0
    often = wanted >= 5
    observed = np.append(counts[often], counts[~often].sum())
    predicted = np.append(wanted[often], wanted[~often].sum())
    if len(observed[predicted > 0]) > 1:
        assert stats.chisquare(observed[predicted > 0], predicted[predicted > 0]).pvalue > 1e-4


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), SETTINGS)
def test_draws_follow_the_distribution(temperature, top_k, top_p, min_p):
    """Chi-square over 20,000 draws, and nothing that was cut off is ever drawn."""
    num_draws = 20_000
    logits = np.random.default_rng(3).normal(size=VOCAB_SIZE).astype(np.float32) * 2
    given = rows(num_draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn = np.asarray(draw(jnp.broadcast_to(logits, (num_draws, VOCAB_SIZE)), given))
    counts = np.bincount(drawn, minlength=VOCAB_SIZE)
    assert_drawn_from(counts, distribution(logits, temperature, top_k, top_p, min_p))


KTH = {
    "bisection": jax.jit(bisect_kth),
    "4 candidates": jax.jit(lambda blocks, top_k: candidates(blocks, 4)[:, top_k[0] - 1]),
    "64 candidates": jax.jit(lambda blocks, top_k: candidates(blocks, 64)[:, top_k[0] - 1]),
}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 4), digits=st.sampled_from([1, 9]), masked=st.floats(0, 1))
@pytest.mark.parametrize("way", KTH)
def test_the_kth_logit_is_that_of_sorting(way, seed, top_k, digits, masked):
    """With few digits many are equal; of those that masks leave there may be fewer than k."""
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=(1, 576)) * 3).round(digits).astype(np.float32)
    logits[generator.random(logits.shape) < masked] = -np.inf
    wanted = np.sort(logits[0])[::-1][top_k - 1]
    found = max(float(KTH[way](in_blocks(jnp.asarray(logits), -jnp.inf), jnp.array([top_k]))[0]), LOWEST)
    assert (logits >= found).sum() == (logits >= max(wanted, LOWEST)).sum()


@pytest.mark.parametrize("top_k", [5, 63, 64, 65, 256, 257, 599, 600, 5000])
@pytest.mark.parametrize("is_rounded", [False, True])
def test_top_p_shares_what_top_k_keeps(top_k, is_rounded):
    """Of 600 tokens, by each size of candidates and beyond them, where `top_p` is still to be checked; as it is where
    equals of the last candidate may not be among them.
    """
    logits = np.random.default_rng(1).normal(size=(1, 600)).round(0 if is_rounded else 9).astype(np.float32)
    given = rows(1, top_k=top_k, top_p=0.5)
    blocks = in_blocks(jnp.asarray(logits), -jnp.inf)
    kept, tries = jax.jit(first_try)(blocks, given, jnp.max(logits, axis=-1))
    lowest = np.sort(logits[0])[::-1][min(top_k, 600) - 1]
    held = np.sort(logits[logits >= lowest])[::-1].astype(np.float64)
    is_settled = len(held) <= (64 if top_k <= 64 else 256) and top_k <= 256
    assert bool(tries.share[0] == jnp.inf) == is_settled
    if is_settled:
        lowest = held[np.searchsorted(np.cumsum(np.exp(held) / np.exp(held).sum()), 0.5)]
    assert (logits >= np.asarray(kept.lowest)).sum() == (logits >= lowest).sum()


@partial(jax.jit, static_argnames="settle")
def settled(logits, rows, settle):
    """The draw of `sample`, with what a CPU does behind the first try or what accelerators do."""
    blocks = in_blocks(logits, -jnp.inf)
    kept, tries = first_try(blocks, rows, jnp.max(logits, axis=-1))
    return settle(blocks, rows, kept, tries).tokens


LIMITS = [  # temperature, top_k, top_p, min_p
    (1.0, 300, 1.0, 0.0),  # more than there are candidates
    (1.0, 300, 0.9, 0.0),
    (2.0, 257, 1.0, 0.2),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.05, 0.0),
    (0.2, 20, 0.7, 0.0),
    (0.1, 0, 0.6, 0.0),
    (0.2, 0, 1.0, 0.3),
    (0.2, 0, 0.8, 0.1),
    (1.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 400, 0.5, 0.0),
    (1.0, 100, 0.5, 0.1),
    (1.0, 5, 0.5, 0.0),
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_both_ways_draw_the_same_and_from_the_distribution(limits):
    """Chi-square over 2,000 draws of 600 tokens."""
    vocab_size, num_draws = 600, 2000
    logits = np.random.default_rng(5).normal(size=vocab_size).astype(np.float32)
    names = ("temperature", "top_k", "top_p", "min_p")
    given = rows(num_draws, **dict(zip(names, limits, strict=True)))
    tokens = np.asarray(settled(jnp.broadcast_to(logits, (num_draws, vocab_size)), given, settle_each))
    assert_drawn_from(np.bincount(tokens, minlength=vocab_size), distribution(logits, *limits))
    together = settled(jnp.broadcast_to(logits, (num_draws, vocab_size)), given, settle)
    assert np.mean(tokens == np.asarray(together)) > 0.999  # sums of one row and of many may round differently


@pytest.mark.parametrize("value", [0.0, -7.5, 1e-30], ids=str)
@pytest.mark.parametrize("top_k", [0, 2, 300])
def test_limits_keep_all_of_equal_tokens(value, top_k):
    """None is above the others, whatever their logit, so that none is ever rejected."""
    logits = jnp.full((500, 600), value).at[:, 300:].set(value - 50)
    blocks, given = in_blocks(logits, -jnp.inf), rows(500, top_p=0.01, top_k=top_k)
    kept, first = jax.jit(first_try)(blocks, given, jnp.max(logits, axis=-1))
    settled = jax.jit(settle_each)(blocks, given, kept, first)
    assert settled.tokens.tolist() == first.tokens.tolist()
    assert len(set(first.tokens.tolist())) > 200
    assert max(first.tokens.tolist()) < 300


def test_a_row_without_a_distribution_ends():
    """Nothing that may be drawn, or no number at all: any token, but no endless loop."""
    logits = jnp.full((2, VOCAB_SIZE), -jnp.inf).at[1].set(jnp.nan)
    assert draw(logits, rows(2, top_p=0.5, top_k=2)).shape == (2,)


def test_a_row_is_drawn_one_way_whatever_the_others_ask_for():
    logits = jnp.asarray(np.random.default_rng(5).normal(size=(len(LIMITS) * 10, 2000)), jnp.float32)
    columns = dict(zip(("temperature", "top_k", "top_p", "min_p"), np.tile(np.array(LIMITS), (10, 1)).T, strict=True))
    given = rows(len(logits), **columns)
    together = draw(logits, given)
    for row in range(len(logits)):
        alone = jax.tree.map(lambda value, row=row: value[row : row + 1], given)
        assert int(draw(logits[row : row + 1], alone)[0]) == int(together[row])


@pytest.mark.parametrize("vocab_size", [7, 101, 512, 1000, 4096])
def test_the_likeliest_token_is_the_first_of_equals(vocab_size):
    logits = np.random.default_rng(0).integers(0, 9, (32, vocab_size)).astype(np.float32)
    logits[0], logits[1, : vocab_size // 2] = -np.inf, -np.inf
    assert likeliest(jnp.asarray(logits)).tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("vocab_size", [101, 1024])
def test_draws_from_many_tokens_follow_the_distribution(vocab_size):
    """Of blocks of one token, and of blocks of many; half of the tokens, whole blocks among them, have no weight."""
    num_draws = 20_000
    logits = np.random.default_rng(4).normal(size=vocab_size).astype(np.float32)
    logits[vocab_size // 4 : vocab_size // 4 * 3] = -np.inf
    drawn = np.asarray(
        draw(
            jnp.broadcast_to(logits, (num_draws, vocab_size)),
            rows(num_draws, held_back=np.full((num_draws, 32), vocab_size)),
        )
    )
    assert_drawn_from(np.bincount(drawn, minlength=vocab_size), distribution(logits, 1.0))


def test_a_row_draws_the_same_alone_and_in_any_batch():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(16, VOCAB_SIZE)), jnp.float32)
    given = rows(16, temperature=jnp.linspace(0.1, 2, 16), top_k=jnp.arange(16), top_p=jnp.linspace(0.3, 1, 16))
    together = np.asarray(draw(logits, given))
    for row in range(16):
        alone = jax.tree.map(lambda value, row=row: value[row : row + 1], given)
        assert int(draw(logits[row : row + 1], alone)[0]) == together[row]


def test_temperature_zero_is_greedy_within_a_sampled_batch():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(8, VOCAB_SIZE)), jnp.float32)
    tokens = draw(logits, rows(8, temperature=jnp.array([0.0, 1.0] * 4)))
    assert tokens[::2].tolist() == jnp.argmax(logits, axis=-1)[::2].tolist()
    greedy = sample(logits, rows(8), SamplingMode.GREEDY)
    assert greedy.tolist() == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_held_back_tokens_are_drawn_only_from_their_position_on(temperature):
    logits = jnp.zeros((2, VOCAB_SIZE)).at[:, 7].set(50.0).at[:, 8].set(40.0)
    held_back = jnp.full((2, 32), VOCAB_SIZE).at[:, 0].set(7)
    given = rows(2, temperature=temperature, hold_until=10, held_back=held_back, positions=jnp.array([9, 10]))
    assert draw(logits, given).tolist() == [8, 7]


def test_another_position_or_key_draws_another_number():
    logits = jnp.zeros((64, VOCAB_SIZE))
    by_position = draw(logits, rows(64, keys=np.zeros((64, 2))))
    by_key = draw(logits, rows(64, positions=0))
    assert len(set(by_position.tolist())) > 10
    assert len(set(by_key.tolist())) > 10
