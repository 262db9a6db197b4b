"""Log-probabilities on the device, against float64 and sorting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.sampling.logprobs import prompt_block, prompt_logprobs, row_logprobs

VOCAB_SIZE = 40
RNG = np.random.default_rng(5)


def expected(logits: np.ndarray) -> np.ndarray:
    """The log-softmax of each row in float64."""
    wide = logits.astype(np.float64)
    highest = wide.max(axis=-1, keepdims=True)
    return wide - highest - np.log(np.exp(wide - highest).sum(axis=-1, keepdims=True))


def test_they_are_the_log_softmax_with_ranks_from_one():
    logits = RNG.normal(size=(9, VOCAB_SIZE)).astype(np.float32) * 30
    tokens = RNG.integers(0, VOCAB_SIZE, 9)
    found = row_logprobs(jnp.asarray(logits), jnp.asarray(tokens, jnp.int32), 5)
    wanted = expected(logits)
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_allclose(found.own, wanted[np.arange(9), tokens], atol=1e-5, rtol=1e-6)
    np.testing.assert_array_equal(found.ranks, [list(row).index(t) + 1 for row, t in zip(order, tokens, strict=True)])
    np.testing.assert_array_equal(found.top_ids, order[:, :5])
    np.testing.assert_allclose(found.top, np.take_along_axis(wanted, order[:, :5], -1), atol=1e-5, rtol=1e-6)


def test_equal_tokens_share_the_last_ones_rank_and_impossible_ones_have_minus_infinity():
    logits = jnp.asarray([[1.0, 3.0, 3.0, -jnp.inf]] * 2)
    found = row_logprobs(logits, jnp.asarray([1, 3], jnp.int32), 2)
    assert found.ranks.tolist() == [2, 4]
    assert found.own.tolist()[1] == -np.inf


@pytest.mark.parametrize("block", [1, 4, 13, 16])
@pytest.mark.parametrize("num_asked", [0, 1, 5, 13])
def test_prompt_rows_are_scored_whatever_the_blocks_and_others_cost_nothing(block, num_asked):
    hidden = RNG.normal(size=(13, 6)).astype(np.float32)
    head = RNG.normal(size=(6, VOCAB_SIZE)).astype(np.float32)
    targets = np.full(13, -1, np.int32)
    asked = RNG.permutation(13)[:num_asked]
    targets[asked] = RNG.integers(0, VOCAB_SIZE, num_asked)
    blocks: list[int] = []

    def logits_of(rows: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: blocks.append(block))
        return rows @ head

    found = jax.jit(lambda hidden, targets: prompt_logprobs(logits_of, hidden, targets, num_top=3, block=block))(
        jnp.asarray(hidden), jnp.asarray(targets)
    )
    jax.effects_barrier()
    alone = row_logprobs(jnp.asarray(hidden[asked] @ head), jnp.asarray(targets[asked]), 3)
    for column, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.asarray(column)[asked], wanted, atol=1e-5)
    assert len(blocks) == -(-num_asked // block), "no block without a row that somebody asks about"


def test_a_large_vocabulary_is_scored_in_small_blocks():
    assert prompt_block(512, 1024) == 256
    assert prompt_block(512, 2**17) == 128
    assert prompt_block(100, 2**30) == 1
