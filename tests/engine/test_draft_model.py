"""A draft model: the very tokens of plain decoding, and it has seen all that it goes on from."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
from fake_device import FakeDevice, check_pages
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Untimed, limits, token_at, tokens_of
from tiny_engine import TINY, VOCAB_SIZE, collect, core_request, run_requests

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Abort, Add, CoreRequest, TokenControls
from jax_engine.loading.loader import load_leaves
from jax_engine.scheduling.request import Request
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import Chunk, StepPlan
from jax_engine.speculation.draft_proposer import ModelProposer
from jax_engine.speculation.drafting import Drafts
from jax_engine.speculation.proposers import Proposal
from jax_engine.speculation.speculative_config import SpeculativeConfig

PAGE = 8
SEEDED = {"temperature": 1.0, "top_p": 0.9}
SPECULATION = {"method": "draft_model", "num_speculative_tokens": 4, "model": "somewhere"}


def drafts_of(core: InProcessCore) -> Drafts:
    drafts = core._core.scheduler.drafts
    assert drafts is not None
    return drafts


@pytest.fixture(scope="module")
def drafting(make_shared_core: Any, tiny_model: Path) -> InProcessCore:
    """An engine whose draft model is the model itself, unless it is given other weights (`unrelated`)."""
    core = make_shared_core(
        speculative_config=SPECULATION | {"model": str(tiny_model)},
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=96,
        kv_cache_memory_bytes=18 * 2 * TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * 8 * 4,
        compile_before_ready=True,
    )
    drafts_of(core).times = Untimed((), ())
    return core


@pytest.fixture
def unrelated(drafting: InProcessCore) -> Iterator[InProcessCore]:
    """The engine with other weights in its draft model."""
    model = drafting._core.runner.draft
    assert model is not None
    draft, leaves = model.target.draft, model.weights.leaves
    assert draft is not None
    model.weights.leaves = load_leaves(
        draft.structure, None, load_format="dummy", sharding_of=draft.sharding_of, seed=1, progress=False
    )
    drafts_of(drafting).proposer = proposer(Stubborn)
    yield drafting
    model.weights.leaves = leaves
    drafts_of(drafting).proposer = proposer()


class Stubborn(ModelProposer):
    """Drafts on, whatever has come of it."""

    def propose(self) -> list[Proposal]:
        for sequence in self._sequences.values():
            sequence.hits = sequence.tries = 100.0
        return super().propose()


def proposer(kind: type[ModelProposer] = ModelProposer) -> ModelProposer:
    config = SpeculativeConfig.of(SPECULATION)
    return kind(config, page_size=PAGE, token_budget=16, max_len=96, shares_pages=True)


def prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()


@pytest.fixture(scope="module")
def requests() -> list[CoreRequest]:
    penalties = TokenControls(presence_penalty=0.5, frequency_penalty=0.2, repetition_penalty=1.3, num_logprobs=2)
    return [
        *(core_request(f"greedy {n}", prompt(n % 2, 3 + 9 * n), 30 + n) for n in range(4)),
        *(core_request(f"drawn {n}", prompt(n, 20), 30, prng_key=(1, n), **SEEDED) for n in range(3)),
        core_request("penalized", prompt(0, 12), 30, controls=penalties),
        core_request("two", prompt(5, 2), 2),
    ]


@pytest.fixture(scope="module")
def expected(drafting: InProcessCore, requests: list[CoreRequest]) -> dict[str, list[int]]:
    """By the same engine, without drafts."""
    scheduler = drafting._core.scheduler
    drafts, scheduler.drafts = scheduler.drafts, None
    tokens = {name: tokens for asked in requests for name, tokens in run_requests(drafting, [asked]).items()}
    scheduler.drafts = drafts
    assert drafting.reset_prefix_cache()
    return tokens


def accepted(core: InProcessCore, requests: list[CoreRequest], expected: dict[str, list[int]]) -> tuple[int, int]:
    """How many tokens were drafted for these requests and kept; their tokens are those expected."""
    before = core.stats()
    found = run_requests(core, requests)
    after = core.stats()
    assert found == {name: expected[name] for name in found}
    assert (after.num_running, after.num_pages_in_use, after.compiles_in_request_path_total) == (0, 0, 0)
    drafted = after.spec_draft_tokens_total - before.spec_draft_tokens_total
    return drafted, after.spec_accepted_tokens_total - before.spec_accepted_tokens_total


def test_a_draft_model_that_is_the_model_is_nearly_always_right(drafting, requests, expected):
    """Prompts in several chunks, cached ones, two at a time with two waiting, preemption, greedy and sampled."""
    plain = [asked for asked in requests if asked.controls is None]
    for _ in range(2):
        drafted, kept = accepted(drafting, plain, expected)
        assert drafted > 100
        assert kept > 0.95 * drafted


def test_penalties_that_the_draft_model_does_not_know_are_heeded(drafting, requests, expected):
    drafted, kept = accepted(drafting, [requests[0], requests[7]], expected)
    assert 5 < kept < drafted


def test_an_unrelated_draft_model_changes_no_token(unrelated, requests, expected):
    assert unrelated.reset_prefix_cache()
    drafted, kept = accepted(unrelated, requests, expected)
    assert drafted > 200
    assert kept < 0.2 * drafted


def test_sampled_tokens_have_the_distribution_of_plain_decoding(unrelated, drafting):
    """The second token of many seeds, as drawn with drafts and without, in a chi-square test of two samples."""
    asked = [core_request(f"{n}", prompt(7, 9), 4, temperature=1.5, top_k=6, prng_key=(3, n)) for n in range(150)]
    with_drafts = [tokens[1] for tokens in run_requests(unrelated, asked).values()]
    scheduler = drafting._core.scheduler
    drafts, scheduler.drafts = scheduler.drafts, None
    others = [msgspec.structs.replace(one, prng_key=(4, n)) for n, one in enumerate(asked)]
    without = [tokens[1] for tokens in run_requests(drafting, others).values()]
    scheduler.drafts = drafts
    counts = np.array(
        [[column.count(token) for token in {*with_drafts, *without}] for column in (with_drafts, without)]
    )
    common = counts[:, counts.sum(axis=0) >= 10]
    table = np.concatenate([common, (150 - common.sum(axis=1))[:, None]], axis=1).astype(float)
    table = table[:, table.sum(axis=0) > 0]
    half = table.sum(axis=0) / 2
    statistic, freedom = float(((table - half) ** 2 / half).sum()), table.shape[1] - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom), "beyond four deviations"


def test_an_abort_amid_drafts_frees_everything(drafting):
    drafting.send(Add([core_request("gone", prompt(0, 8), 60)]))
    while (pending := drafting._core._pending) is None or not pending.plan.num_draft_rows:
        drafting.step()
    drafting.send(Abort(["gone"]))
    while drafting.has_work():
        assert not drafting.step().outputs
    assert drafting.stats().num_pages_in_use == 0


def test_what_was_drafted_for_comes_several_tokens_at_a_time(drafting, requests, expected):
    outputs = collect(drafting, requests[1:2])[requests[1].request_id]
    assert len(outputs) < 0.5 * len(expected[requests[1].request_id])


class DraftCache:
    """Pages that hold, for each token, the whole sequence up to it, as the draft model was given it."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.places: dict[tuple[int, int], tuple[int, ...]] = {}

    def run(self, chunk: Chunk, drafts: list[int]) -> None:
        whole = (*chunk.request.tokens[: chunk.fill.stop], *drafts[:-1])
        for position in range(len(whole)):
            index, offset = divmod(position, self.page_size)
            place = chunk.request.pages[index], offset
            if position < chunk.fill.start:
                assert self.places[place] == whole[: position + 1], "it goes on from what it has not seen"
            self.places[place] = whole[: position + 1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), enable_prefix_caching=st.booleans())
def test_the_draft_model_has_seen_all_that_it_goes_on_from(seed, enable_prefix_caching):
    """With pages shared, evicted, given to others, and rolled back."""
    random = Random(seed)
    bounds = limits(
        num_pages=random.choice([14, 24, 48]), draft_context=60, enable_prefix_caching=enable_prefix_caching
    )
    scheduler = Scheduler(bounds, SpeculativeConfig.of(SPECULATION))
    assert scheduler.drafts is not None
    scheduler.drafts.times = Untimed((), ())
    device, cache = FakeDevice(bounds), DraftCache(bounds.page_size)
    device.num_undone = 2
    starts = [[random.randrange(1000) for _ in range(random.randint(4, 20))] for _ in range(3)]
    asked = [
        core_request(f"r{n}", [*random.choice(starts), *range(n % 3 * 5)], random.randint(1, 24)) for n in range(12)
    ]
    chance = random.choice([0.3, 0.8, 1.0])
    while asked or scheduler.has_work:
        while asked and random.random() < 0.4:
            scheduler.add(asked.pop())
        plan = scheduler.schedule(can_draft=random.random() < 0.8)
        if plan is None:
            continue
        chunks = []
        for chunk in plan.chunks:
            first, name = chunk.start + 1, chunk.request.asked.request_id
            drafts = [
                token_at(name, first + offset) if random.random() < chance else 1001
                for offset in range(len(chunk.drafts))
            ]
            if chunk.fill:
                cache.run(chunk, drafts)
            chunks.append(msgspec.structs.replace(chunk, drafts=drafts))
        plan = StepPlan(chunks, plan.copies)
        device.run(plan)
        scheduler.commit(plan, tokens_of(plan))
        check_pages(scheduler, 1)


def test_requests_that_are_hard_to_guess_are_let_alone_and_tried_again():
    guesses, request = proposer(), Request(core_request("r", [1, 2, 3], 10_000), order=0)
    request.slot = 0
    guesses.learn(request)
    while guesses.propose():
        guesses.judge(request, 0, 4)
        guesses.learn(request)
    num_steps = 0
    while not guesses.propose():
        guesses.rest()
        guesses.learn(request)
        num_steps += 1
    assert 20 < num_steps < 9_999


def test_a_draft_model_of_another_vocabulary_is_refused(make_core, tmp_path):
    (tmp_path / "config.json").write_text(msgspec.json.encode(TINY | {"vocab_size": 64}).decode())
    message = r"speculative_config.model='.*' has a vocabulary of 64 tokens, and the model '.*' one of 101"
    with pytest.raises(ValueError, match=message):
        make_core(speculative_config=SPECULATION | {"model": str(tmp_path)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "speculative_config.model=None must be the draft model's folder or name"),
        ({"prompt_lookup_max": 4}, "speculative_config.prompt_lookup_max=4 belongs to the method 'ngram'"),
        ({"method": "ngram"}, "speculative_config.model='somewhere' belongs to the method 'draft_model'"),
        ({"draft_tensor_parallel_size": 1}, "speculative_config has no 'draft_tensor_parallel_size' here"),
        ({"num_speculative_tokens": 0}, "speculative_config.num_speculative_tokens=0 must be a whole number"),
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(speculative_config=SPECULATION | given)
