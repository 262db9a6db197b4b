"""Speculative decoding on a tiny random model: the very tokens of plain decoding, whatever is drafted."""

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Oracle, Untimed
from tiny_engine import TINY, VOCAB_SIZE, collect, core_request

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Abort, Add, CoreOutput, CoreRequest, TokenControls, TokenLogprobs
from jax_engine.scheduling.request import Request
from jax_engine.speculation.drafting import Drafts
from jax_engine.speculation.ngram import NgramHistory
from jax_engine.speculation.proposers import NgramProposer
from jax_engine.speculation.speculative_config import SpeculativeConfig
from jax_engine.speculation.step_times import StepTimes

PAGE = 8
PAGE_BYTES = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * TINY["head_dim"] * 4
NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
FEW_PAGES = {"kv_cache_memory_bytes": 14 * PAGE_BYTES, "max_model_len": 96}
SEEDED = {"temperature": 1.0, "top_p": 0.9}


@pytest.fixture(scope="module")
def drafting(make_shared_core: Any) -> InProcessCore:
    core = make_shared_core(speculative_config=NGRAM, **FEW_PAGES, compile_before_ready=True)
    drafts_of(core).times = Untimed((), ())
    return core


def drafts_of(core: InProcessCore) -> Drafts:
    drafts = core._core.scheduler.drafts
    assert drafts is not None
    return drafts


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()


def tokens_of(outputs: Sequence[CoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.fixture(scope="module")
def requests(core: InProcessCore) -> list[CoreRequest]:
    """Greedy and seeded ones that end by a stop, an end of sequence or their length, amid what is drafted."""
    free = [
        core_request(f"free {index}", prompt(index % 4, 3 + 9 * (index % 5)), 24 + index, prng_key=(1, index), **how)
        for index, how in enumerate([{}, SEEDED] * 4)
    ]
    outputs = collect(core, free)
    ending = []
    for index, asked in enumerate(free):
        token = tokens_of(outputs[asked.request_id])[5 + 2 * index]
        given = {"temperature": asked.temperature, "top_p": asked.top_p, "prng_key": asked.prng_key}
        given |= {"eos_token_ids" if index % 3 else "stop_token_ids": (token,), "min_tokens": 9 * (index % 4 == 3)}
        ending.append(core_request(f"ending {index}", asked.prompt_token_ids, 40, needs_host=index == 5, **given))
    full = [
        core_request("logprobs", prompt(1, 12), 20, controls=TokenControls(num_logprobs=3)),
        core_request(
            "allowed", prompt(2, 12), 20, **SEEDED, controls=TokenControls(allowed_token_ids=tuple(range(40)))
        ),
    ]
    penalized = TokenControls(presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.3, logit_bias={3: 2.0})
    full.append(core_request("penalized", prompt(0, 12), 30, **SEEDED, controls=penalized))
    plain = tokens_of(outputs["free 0"])
    words = tuple(tuple(plain[start : start + length]) for start, length in ((3, 1), (5, 2), (9, 3), (14, 4)))
    full.append(core_request("bad words", prompt(0, 3), 24, controls=TokenControls(bad_words=words)))
    return [*free, *ending, *full, *(core_request(f"{count} tokens", prompt(9, 6), count) for count in (1, 2, 3))]


@pytest.fixture(scope="module")
def expected(core: InProcessCore, requests: list[CoreRequest]) -> dict[str, list[CoreOutput]]:
    return {name: outputs for request in requests for name, outputs in collect(core, [request]).items()}


def assert_same(found: dict[str, list[CoreOutput]], expected: dict[str, list[CoreOutput]]) -> None:
    for name, outputs in found.items():
        assert tokens_of(outputs) == tokens_of(expected[name]), name
        last, ours = expected[name][-1], outputs[-1]
        assert (ours.finish_reason, ours.stop_reason) == (last.finish_reason, last.stop_reason), name
        assert all(output.new_token_ids and output.finish_reason is None for output in outputs[:-1])
        assert_same_logprobs(logprobs_of(outputs), logprobs_of(expected[name]))


def logprobs_of(outputs: Sequence[CoreOutput]) -> list[TokenLogprobs]:
    return [logprobs for output in outputs for logprobs in output.logprobs or ()]


def assert_same_logprobs(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.rank, ours.token_ids) == (theirs.rank, theirs.token_ids)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def assert_idle(core: InProcessCore) -> None:
    stats = core.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use, stats.num_tokens_in_pages) == (0, 0, 0, 0)
    assert stats.compiles_in_request_path_total == 0


@pytest.fixture
def ngram(drafting: InProcessCore) -> Iterator[NgramProposer]:
    """The usual proposer, to be put back."""
    drafts = drafts_of(drafting)
    yield drafts.proposer
    drafts.proposer = NgramProposer(SpeculativeConfig.of(NGRAM))


@pytest.mark.parametrize("chance", [0.0, 0.6, 1.0])
def test_tokens_are_those_of_plain_decoding_whatever_is_drafted(drafting, requests, expected, ngram, chance):
    answers = {name: tokens_of(outputs) for name, outputs in expected.items()}
    before = drafting.stats()
    for seed in range(3):
        random = Random(seed)
        drafts_of(drafting).proposer = Oracle(drafting, answers, chance, random)
        some = random.sample(requests, len(requests) - 6)
        found: dict[str, list[CoreOutput]] = {request.request_id: [] for request in some}
        while some or drafting.has_work():
            if some and random.random() < 0.4:
                drafting.send(Add([some.pop() for _ in range(min(len(some), random.randint(1, 3)))]))
            for output in drafting.step().outputs:
                found[output.request_id].append(output)
        assert_same(found, expected)
        assert_idle(drafting)
    after = drafting.stats()
    drafted = after.spec_draft_tokens_total - before.spec_draft_tokens_total
    accepted = after.spec_accepted_tokens_total - before.spec_accepted_tokens_total
    assert drafted > 100
    assert (chance == 0 and accepted < drafted / 10) or accepted == pytest.approx(drafted, rel=0.75)
    assert chance < 1 or accepted > 0.9 * drafted
    assert after.preemptions_total > before.preemptions_total


@settings(max_examples=8, deadline=None)
@given(chosen=st.sets(st.integers(0, 22), min_size=1), random=st.randoms(use_true_random=False))
def test_ngrams_change_no_token_in_any_mix(drafting, requests, expected, chosen, random):
    some = [requests[index] for index in chosen]
    random.shuffle(some)
    assert_same(collect(drafting, some), expected)
    assert_idle(drafting)


def test_drafts_that_are_right_take_few_steps_and_are_counted(drafting, requests, expected, ngram):
    asked = requests[0]
    plain = tokens_of(expected[asked.request_id])
    drafts_of(drafting).proposer = Oracle(drafting, {asked.request_id: plain}, 1.0, Random(1))
    before = drafting.stats()
    outputs = collect(drafting, [asked])[asked.request_id]
    after = drafting.stats()
    assert tokens_of(outputs) == plain
    assert len(outputs) < 0.7 * len(plain)
    assert after.generation_tokens_total - before.generation_tokens_total == len(plain)
    drafts = after.spec_drafts_total - before.spec_drafts_total
    accepted = after.spec_accepted_tokens_total - before.spec_accepted_tokens_total
    assert accepted == len(plain) - len(outputs), "each step brings its drafts that were right and one token"
    by_position = after.spec_accepted_tokens_per_position_total
    assert len(by_position) == 5 and sorted(by_position, reverse=True) == list(by_position)
    assert 0 < drafts <= len(outputs)


def test_what_an_answer_with_drafts_leaves_in_the_cache_is_right(core, drafting, requests, expected, ngram):
    """Pages that wrong drafts have been in are found by the tokens that were kept."""
    answers = {name: tokens_of(outputs) for name, outputs in expected.items()}
    drafts_of(drafting).proposer = Oracle(drafting, answers, 0.5, Random(0))
    drafting.reset_prefix_cache()
    first = requests[0]
    answer = tokens_of(collect(drafting, [first])[first.request_id])
    drafts_of(drafting).proposer = ngram
    turn = core_request("turn", [*first.prompt_token_ids, *answer, 1, 2], 12)
    outputs = collect(drafting, [turn])["turn"]
    # All full pages but those that the last token, which was not run, would have filled.
    assert outputs[-1].num_cached_tokens == (len(first.prompt_token_ids) + len(answer) - 1) // PAGE * PAGE
    assert tokens_of(outputs) == tokens_of(collect(core, [turn])["turn"])


def test_an_abort_amid_drafts_frees_everything(drafting):
    asked = core_request("gone", prompt(0, 8), 60)
    drafting.send(Add([asked]))
    while True:
        drafting.step()
        pending = drafting._core._pending
        if pending is not None and pending.plan.num_draft_rows:
            break
    drafting.send(Abort(["gone"]))
    while drafting.has_work():
        assert not drafting.step().outputs
    assert_idle(drafting)


def history_of(tokens: list[int], *, shortest: int = 2, longest: int = 4) -> NgramHistory:
    history = NgramHistory(Request(core_request("r", tokens, 100), order=0), shortest=shortest, longest=longest)
    history.learn()
    return history


@pytest.mark.parametrize(
    ("tokens", "drafts", "match"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2], 2),
        ([1, 2, 3, 1, 2, 4, 1, 2], [4, 1, 2, 4], 2),  # the latest
        ([7, 1, 2, 3, 1, 2, 4, 7, 1, 2], [3, 1, 2, 4], 3),  # the longest
        ([5, 1, 2, 3, 4, 5, 6, 2, 3, 4], [5, 6, 2, 3], 3),
        ([1, 2, 1, 2], [1, 2, 1, 2], 2),  # goes on with what it says itself
        ([3, 3, 3], [3, 3, 3, 3], 2),
        ([1, 2, 3, 4], [], 0),
        ([1], [], 0),
    ],
    ids=str,
)
def test_what_followed_before_is_drafted(tokens, drafts, match):
    history = history_of(tokens)
    assert (history.propose(4), history.match) == (drafts, match)


def test_a_place_is_followed_while_it_agrees():
    history = history_of([1, 2, 3, 4, 5, 9, 1, 2])
    tokens = history.request.tokens
    outcomes = []
    for token in (3, 4, 6, 1, 2, 3):
        tokens.append(token)
        outcomes += history.learn()
    assert outcomes == [(2, True), (3, True), (4, False), (2, True)]
    assert history.propose(3) == [4, 6, 1], "after 1, 2 came 3, 4, and at last 6"


def test_a_long_prompt_is_taken_in_by_and_by():
    """It is no long pause before some token."""
    tokens = list(range(5000))
    history = history_of([*tokens, 0, 1])
    assert history.propose(2) == [2, 3], "its beginning is known at once"
    history = history_of([*tokens, 4000, 4001])
    steps = 0
    while not history.propose(1):
        history.request.tokens += [4000, 4001]
        history.learn()
        steps += 1
    assert 1 < steps < 20


def drafts_with_times(*, drafted: float) -> Drafts:
    """Drafts of one request that repeats itself, after steps of one millisecond, and of `drafted` with drafts."""
    drafts = Drafts(SpeculativeConfig.of(NGRAM), step_sizes=(1, 8), draft_sizes=(6, 48))
    request = Request(core_request("r", [1, 2, 3, 4] * 8, 200), order=0)
    for token in [1, 2, 3, 4] * 16:
        drafts.learn(request)
        request.append(token)
    request.slot, request.num_computed = 0, len(request.tokens) - 1
    for _ in range(8):
        drafts.times.observe(1, 0.001, drafted=False)
        drafts.times.observe(6, drafted, drafted=True)
    return drafts


@pytest.mark.parametrize(("drafted", "number"), [(0.0011, 5), (0.0030, 5), (0.0070, 0)])
def test_drafts_must_be_expected_to_pay_for_the_longer_step(drafted, number):
    assert len(drafts_with_times(drafted=drafted).choose(1, 100).get("r", ())) == number


def test_drafts_that_were_too_slow_are_tried_again_now_and_then():
    drafts, tried = drafts_with_times(drafted=0.012), 0
    for _ in range(10000):
        if drafts.choose(1, 100):
            tried += 1
            drafts.times.observe(6, 0.012, drafted=True)
    assert 2 < tried < 100, "which would take twice the time of as many tokens without"


def test_plain_steps_are_timed_first_and_then_drafts_are_tried():
    times = StepTimes((1,), (6,))
    for _ in range(4):
        assert times.ratio(6, 1) == math.inf
        times.observe(1, 0.001, drafted=False)
    for _ in range(4):
        assert times.ratio(6, 1) == 1
        times.observe(6, 0.002, drafted=True)
    assert times.ratio(6, 1) == pytest.approx(2)


def test_a_single_slow_step_is_forgotten():
    times = StepTimes((1,), (6,))
    for seconds in (0.5, 0.001, 0.001, 0.001, 0.9, 0.001, 0.001):
        times.observe(1, seconds, drafted=False)
        times.observe(6, 0.002, drafted=True)
    assert 1.7 < times.ratio(6, 1) < 2.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "eagle", "num_speculative_tokens": 2}, "speculative_config.method='eagle' must be one of ngram"),
        (
            {"method": "ngram"},
            "speculative_config.num_speculative_tokens=None must be a whole number, between 1 and 32",
        ),
        ({**NGRAM, "draft_tensor_parallel_size": 1}, "speculative_config has no 'draft_tensor_parallel_size' here"),
        ({**NGRAM, "prompt_lookup_min": 9}, "prompt_lookup_min=9 must be at most prompt_lookup_max=4"),
        ({**NGRAM, "prompt_lookup_max": 0}, "speculative_config.prompt_lookup_max=0 must be a whole number"),
        (4, "speculative_config=4 must be a dictionary"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(speculative_config=given)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"num_scheduler_steps": 2}, "num_scheduler_steps=2 must be 1 with speculative_config"),
        ({"max_num_seqs": 2, "max_num_batched_tokens": 5}, "must be less than max_num_batched_tokens=5"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(speculative_config=NGRAM, **others)


def test_lookups_are_as_long_as_asked_for():
    config = SpeculativeConfig.of({"method": "ngram", "num_speculative_tokens": 3})
    assert (config.prompt_lookup_min, config.prompt_lookup_max) == (5, 5)
    assert SpeculativeConfig.of({**NGRAM, "prompt_lookup_min": None}).prompt_lookup_min == 4
