"""Beam search: the search by itself, over a language whose every sequence can be listed."""

import itertools
import math
from typing import Any

import numpy as np
import pytest

from jax_engine.frontend.beam_search import BeamSearch, BeamSearchParams
from jax_engine.outputs import Logprob, LogprobsAtPosition

VOCAB_SIZE, END = 4, 3


def logprobs_after(tokens: tuple[int, ...]) -> np.ndarray:
    """A fixed random next-token distribution for every beginning."""
    logits = np.random.default_rng([7, *tokens]).normal(size=VOCAB_SIZE) * 1.5
    return logits - np.log(np.exp(logits).sum())


def position(tokens: tuple[int, ...], count: int) -> LogprobsAtPosition:
    logprobs = logprobs_after(tokens)
    return {int(token): Logprob(float(logprobs[token])) for token in np.argsort(-logprobs)[:count]}


def search(**fields: Any) -> BeamSearch:
    found = BeamSearch(BeamSearchParams(**fields), [END])
    while found.beams:
        found.advance([position(beam.token_ids, found.num_logprobs) for beam in found.beams])
    return found


def every_sequence(max_tokens: int, length_penalty: float) -> list[tuple[float, tuple[int, ...]]]:
    """All sequences that end, or are as long as they may be, by their score."""
    found = []
    for length in range(1, max_tokens + 1):
        for tokens in itertools.product(range(VOCAB_SIZE), repeat=length):
            if END in tokens[:-1] or (length < max_tokens and tokens[-1] != END):
                continue
            total = sum(logprobs_after(tokens[:index])[token] for index, token in enumerate(tokens))
            found.append((float(total / length**length_penalty), tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_a_beam_as_wide_as_the_language_finds_the_best_sequences_of_all(length_penalty: float) -> None:
    found = search(beam_width=3**4, max_tokens=4, length_penalty=length_penalty, early_stopping="never")
    wanted = every_sequence(4, length_penalty)[: 3**4]
    assert [one.beam.token_ids for one in found.hypotheses] == [tokens for _, tokens in wanted]
    np.testing.assert_allclose([one.score for one in found.hypotheses], [score for score, _ in wanted], rtol=1e-9)


def test_one_beam_is_greedy_search() -> None:
    tokens: tuple[int, ...] = ()
    while len(tokens) < 6 and tokens[-1:] != (END,):
        tokens = (*tokens, int(np.argmax(logprobs_after(tokens))))
    (found,) = search(beam_width=1, max_tokens=6, early_stopping=True).hypotheses
    assert found.beam.token_ids == tokens
    assert found.finish_reason == ("stop" if tokens[-1] == END else "length")


def test_without_end_of_sequence_all_are_as_long_as_they_may_be() -> None:
    found = search(beam_width=3, max_tokens=5, ignore_eos=True)
    assert {len(one.beam.token_ids) for one in found.hypotheses} == {5}
    assert found.num_logprobs == 3


def test_stopping_early_saves_steps_and_never_does_not() -> None:
    def steps(early_stopping: object) -> int:
        found, count = (
            BeamSearch(BeamSearchParams(beam_width=2, max_tokens=40, early_stopping=early_stopping), [END]),
            0,
        )
        while found.beams:
            found.advance([position(beam.token_ids, found.num_logprobs) for beam in found.beams])
            count += 1
        return count

    assert steps(True) <= steps(False) <= steps("never")
    assert steps(True) < steps("never")


def test_probabilities_add_up_along_a_beam() -> None:
    for one in search(beam_width=3, max_tokens=5).hypotheses:
        beam = one.beam
        alone = [entry[token].logprob for entry, token in zip(beam.logprobs, beam.token_ids, strict=True)]
        assert math.isclose(beam.cumulative_logprob, sum(alone))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beam_width": 0}, "beam_width=0 must be a whole number, at least 1"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": 0.5}, "temperature=0.5 must be 0"),
        ({"length_penalty": math.nan}, "length_penalty=nan"),
        ({"early_stopping": 1}, "early_stopping=1 must be true, false or"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be true or false"),
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})
