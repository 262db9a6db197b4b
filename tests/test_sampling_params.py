"""Sampling parameters: vLLM's names and defaults, and an error for each wrong value that says what is right."""

import math

import pytest

from jax_engine import RepetitionDetectionParams, RequestOutputKind, SamplingParams


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.seed, params.max_tokens, params.min_tokens) == (None, 16, 0)
    assert (params.stop_strings, params.stop_token_ids) == ((), ())
    assert (params.ignore_eos, params.skip_special_tokens, params.include_stop_str_in_output) == (False, True, False)
    assert params.output_kind is RequestOutputKind.CUMULATIVE


@pytest.mark.parametrize("stop", ["END", ["END"], ("END",)], ids=type)
def test_stop_may_be_one_string_or_several(stop: object) -> None:
    assert SamplingParams(stop=stop).stop_strings == ("END",)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n=0 must be a whole number, between 1 and 64"),
        ({"n": True}, "n=True must be a whole number"),
        ({"n": 2.0}, r"n=2\.0 must be a whole number"),
        ({"temperature": -0.1}, r"temperature=-0\.1 must be a finite number, at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"temperature": math.inf}, "temperature=inf must be a finite number"),
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"top_p": 0}, "top_p=0 must be a finite number, above 0 and at most 1"),
        ({"top_p": 2}, "top_p=2 must be a finite number, above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": -2}, "top_k=-2 must be a whole number, at least -1"),
        ({"min_p": 1.5}, r"min_p=1\.5 must be a finite number, at least 0 and at most 1"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be a whole number"),
        ({"seed": 1.5}, r"seed=1\.5 must be a whole number"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number, at least 1"),
        ({"min_tokens": -1}, "min_tokens=-1 must be a whole number, at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 must be at most max_tokens=8"),
        ({"stop": [""]}, "stop has the entry ''; each must be a non-empty string"),
        ({"stop": [3]}, "stop has the entry 3; each must be a non-empty string"),
        ({"stop_token_ids": [-1]}, "stop_token_ids=-1 must be a whole number, at least 0"),
        (
            {"stop_token_ids": list(range(17)), "min_tokens": 1},
            "stop_token_ids has 17 entries; with min_tokens at most 16",
        ),
        (
            {"presence_penalty": 2.1},
            r"presence_penalty=2\.1 must be a finite number, at least -2 and at most 2; 0",
        ),
        ({"frequency_penalty": "x"}, r"frequency_penalty='x' must be a finite number, at least -2 and at most 2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be a finite number, above 0; 1 turns it off"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\]=101 must be a finite number, at least -100 and at most 100"),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a'; each must be a token id"),
        ({"logit_bias": {-1: 1}}, "logit_bias has the key -1; each must be a token id"),
        ({"logit_bias": [1]}, r"logit_bias=\[1\] must map token ids to numbers"),
        ({"logit_bias": dict.fromkeys(range(513), 1)}, "logit_bias has 513 entries; at most 512 are supported: drop"),
        ({"allowed_token_ids": []}, r"allowed_token_ids=\[\] leaves no token to draw; leave it out"),
        ({"allowed_token_ids": [1.5]}, r"allowed_token_ids=1\.5 must be a whole number, at least 0"),
        ({"bad_words": ["a", " "]}, "bad_words has the entry ' '; each must be a string, not blank: remove it"),
        ({"extra_args": {"scale": math.nan}}, r"extra_args\.scale=nan must be a finite number"),
        ({"ignore_eos": 1}, "ignore_eos=1 must be true or false"),
        ({"skip_special_tokens": None}, "skip_special_tokens=None must be true or false"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_name(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**given)  # type: ignore[arg-type]


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    assert SamplingParams.from_mapping({"top_k": 3}).top_k == 3
    with pytest.raises(ValueError, match="'temprature' is not supported; did you mean 'temperature'"):
        SamplingParams.from_mapping({"temprature": 0.5})
    with pytest.raises(ValueError, match="'beam_width' is not supported"):
        SamplingParams.from_mapping({"beam_width": 4})


@pytest.mark.parametrize(
    ("tokens", "sizes", "count", "found"),
    [
        ([1, 2, 3, 3, 3], (1, 1), 3, True),
        ([3, 3, 3, 1], (1, 1), 3, False),
        ([9, 1, 2, 1, 2], (0, 2), 2, True),
        ([9, 1, 2, 1, 2], (1, 1), 2, False),
        ([5, 5, 5, 5], (2, 2), 2, True),
        ([1, 2, 1, 2, 1], (2, 2), 3, False),
        ([1, 2, 3], (0, 0), 0, False),
    ],
)
def test_what_goes_round_in_circles(tokens, sizes, count, found):
    low, high = sizes
    detection = RepetitionDetectionParams(min_pattern_size=low, max_pattern_size=high, min_count=count)
    assert detection.found_in([7, 7, 7, *tokens], 3) == found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_pattern_size": 3, "min_count": 1}, "min_count=1 must be a whole number, between 2"),
        ({"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}, "min_pattern_size=4"),
        ({"max_pattern_size": -1}, "max_pattern_size=-1"),
        ({"pattern": 1}, "the field 'pattern'"),
    ],
)
def test_wrong_repetition_detection_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(repetition_detection=fields)


@pytest.mark.parametrize("kept", [0, -2, True, 1.5])
def test_wrong_truncation_is_refused(kept):
    with pytest.raises(ValueError, match="truncate_prompt_tokens="):
        SamplingParams(truncate_prompt_tokens=kept)
