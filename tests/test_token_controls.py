"""What changes logits, from the user's parameters to the core's: checked against the model, words as tokens."""

from typing import Any

import pytest

from jax_engine import SamplingParams
from jax_engine.config import EngineConfig
from jax_engine.core.messages import Ready, TokenControls
from jax_engine.frontend.processor import InputProcessor, ModelText
from jax_engine.frontend.token_controls import bad_word_tokens

DEMO = ModelText.load(EngineConfig(load_format="dummy"))
EOS = DEMO.tokenizer.eos_token_id
LAST = DEMO.tokenizer.num_ids - 1
INFO = Ready(32, LAST + 1, 8, 16, processor_arguments={"strength": 1.0})


def controls_of(**params: Any) -> TokenControls | None:
    (sequence,) = InputProcessor(DEMO, INFO).prepare("r", [5], SamplingParams(**params)).core_requests
    return sequence.controls


def test_only_requests_that_ask_for_them_have_controls() -> None:
    """The others are as small as before, and run in the lesser sampling modes."""
    neutral: dict[str, Any] = {"presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": {}, "bad_words": []}
    assert controls_of(temperature=0.5, **neutral) is None
    assert controls_of(logit_bias={"7": 3}) == TokenControls(logit_bias={7: 3.0})
    assert controls_of(allowed_token_ids=[4, 5]) == TokenControls(allowed_token_ids=(4, 5))
    assert controls_of(frequency_penalty=1, repetition_penalty=2) == TokenControls(
        frequency_penalty=1.0, repetition_penalty=2.0
    )
    assert controls_of(extra_args={"strength": 2}) == TokenControls(processor_arguments={"strength": 2.0})


def test_bad_words_are_tokens_with_and_without_a_space_in_front() -> None:
    text = DEMO.tokenizer
    spaced = [word for word in ("the", "What is", "17", "sea", "a") if len(bad_word_tokens(word, text)) == 2]
    assert spaced, "some word of the demo model's has another token with a space in front"
    for word in spaced:
        bare, other = bad_word_tokens(word, text)
        assert (text.decode(list(bare)), text.decode(list(other))) == (word, f" {word}")
        assert (len(bare), bare[0] != other[0]) == (len(other), True)
        assert bad_word_tokens(f" {word}", text) == [bare, other]
    controls = controls_of(bad_words=spaced)
    assert controls is not None
    assert controls.bad_words == tuple(tokens for word in spaced for tokens in bad_word_tokens(word, text))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"logit_bias": {LAST + 1: 1}},
            f"logit_bias holds {LAST + 1}; the model's token ids are 0 to {LAST}: remove it",
        ),
        ({"allowed_token_ids": [5, LAST + 1]}, f"allowed_token_ids holds {LAST + 1}; the model's token ids are 0 to"),
        ({"bad_words": ["12345678901234567"]}, "of 17 tokens; at most 16 are supported: give a shorter part"),
        ({"bad_words": [f"{number:03}" for number in range(257)]}, "bad_words are 257 sequences .* at most 256"),
        ({"min_tokens": 1, "allowed_token_ids": [EOS]}, "min_tokens=1 holds back all of allowed_token_ids"),
        ({"extra_args": {"scale": 1}}, "the key 'scale', which no logits processor takes; there are strength: remove"),
    ],
    ids=str,
)
def test_controls_that_the_model_cannot_follow_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        controls_of(**params)
