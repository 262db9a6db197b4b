"""Thinking before an answer: a form applies after it, and a budget ends it, token by token."""

import numpy as np
import pytest

from jax_engine import ReasoningParams, SamplingParams
from jax_engine.core.messages import ThinkingRequest
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.grammar.bitmasks import ids_of, pack_bits
from jax_engine.grammar.thinking import Thinking, thinking_request
from jax_engine.loading.model_files import resolve_model_path

EOS, START, END, BLANK, FORM, WORD = 3, 4, 5, 6, 7, 8
VOCAB = 64
FORM_MASK = pack_bits([FORM, 10], VOCAB)


def thinking(*, start=(START,), end=(END,), begins_inside=False, budget=None) -> Thinking:
    asked = ThinkingRequest(start, end, begins_inside, budget, blanks=(BLANK,))
    return Thinking(asked, VOCAB, (EOS,))


def allowed(state: Thinking, *tokens: int) -> set[int]:
    """What may come after these tokens, taken one at a time."""
    for token in tokens:
        assert token in ids_of(state.mask(FORM_MASK)), token
        assert state.take([token]) == []
    return set(map(int, ids_of(state.mask(FORM_MASK))))


ANY = set(range(VOCAB)) - {EOS}


def test_the_first_token_tells_whether_the_model_thinks():
    assert allowed(thinking()) == {START, FORM, 10}
    assert allowed(thinking(), START) == ANY
    assert allowed(thinking(begins_inside=True)) == ANY
    state = thinking()
    assert state.take([FORM, 9]) == [FORM, 9]
    assert state.is_over
    assert np.array_equal(state.mask(FORM_MASK), FORM_MASK)


def test_the_form_follows_the_end_and_a_few_blanks():
    state = thinking()
    assert allowed(state, START, WORD, FORM, END) == {BLANK, FORM, 10}
    assert allowed(state, BLANK) == {BLANK, FORM, 10}
    assert allowed(state, BLANK) == {FORM, 10}
    assert state.take([FORM]) == [FORM]
    assert state.take([BLANK, START]) == [BLANK, START]


def test_tokens_that_come_together_are_told_apart():
    state = thinking()
    state.mask(FORM_MASK)
    assert state.take([START, WORD, END, BLANK, FORM, WORD]) == [FORM, WORD]


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("begins_inside", [False, True])
def test_a_spent_budget_leaves_the_end_alone(budget, begins_inside):
    state = thinking(budget=budget, begins_inside=begins_inside)
    begun = [] if begins_inside else [START]
    assert allowed(state, *begun, *[WORD] * budget) == {END}
    assert allowed(state, END) == {BLANK, FORM, 10}
    early = thinking(budget=3, begins_inside=begins_inside)
    assert allowed(early, *begun, WORD, END) == {BLANK, FORM, 10}


def test_tags_of_several_tokens():
    """A beginning of the end within the budget is gone on with where that is spent: there are never more tokens."""
    state = thinking(start=(START, 20), end=(30, 31, 32), budget=3)
    assert allowed(state) == {START, FORM, 10}
    assert allowed(state, START) == {20}
    assert allowed(state, 20) == ANY
    assert allowed(state, WORD, 30) == ANY
    assert allowed(state, 30) == {31}, "not 30 again, nor another word"
    assert allowed(state, 31) == {32}
    assert allowed(state, 32) == {BLANK, FORM, 10}
    written = thinking(start=(FORM, 20))
    assert FORM in allowed(written)
    assert written.take([FORM]) == [FORM], "the form may begin so, and a tag of several tokens is only text"


def test_what_the_core_is_told():
    tokenizer = load_tokenizer(resolve_model_path("demo"))
    reasoning = ReasoningParams(begins_inside=True)
    assert thinking_request(SamplingParams(), tokenizer) is None
    assert thinking_request(SamplingParams(reasoning=reasoning), tokenizer) is None, "there is nothing to mind"
    told = thinking_request(SamplingParams(reasoning=reasoning, thinking_token_budget=5), tokenizer)
    assert told is not None
    assert (told.start, told.end, told.begins_inside, told.budget) == ((4,), (5,), True, 5)
    assert told.blanks
    assert thinking_request(SamplingParams(reasoning=reasoning, structured_outputs={"regex": "a"}), tokenizer)
    with pytest.raises(ValueError, match="thinking_token_budget=5 is for chats"):
        thinking_request(SamplingParams(thinking_token_budget=5), tokenizer)
    with pytest.raises(ValueError, match="thinking_token_budget=-1 must be"):
        SamplingParams(thinking_token_budget=-1)
