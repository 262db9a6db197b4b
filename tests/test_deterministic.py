"""`deterministic=True`: a request's tokens, its keys and values and its logits are the same to the last bit, whatever
shares its steps, however its prompt is cut, found in the cache or computed, preempted or not, and after a restart.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from plans import Oracle, Untimed
from tiny_engine import TINY, TINY_MIXTURE, VOCAB_SIZE, core_request, placed_model

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Add, CoreRequest, TokenControls
from jax_engine.execution.row_blocks import by_blocks
from jax_engine.execution.step_program import run_model
from jax_engine.loading.loader import load_leaves
from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.ops import select_ops
from jax_engine.sharding.placed_model import StateSize

PAGE = 8
NUM_PAGES = 20  # of the engine: as many as one request of full length takes
CACHE_BYTES = NUM_PAGES * TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * TINY["head_dim"] * 4
MAX_MODEL_LEN = 160
DRAFTED = 5  # tokens in a step at most, where there is speculation
# Long enough for two chunks of cached tokens and several blocks of rows.
PROMPT = [(13 * i + 5) % VOCAB_SIZE for i in range(77)]
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "top_k": 50, "prng_key": (3, 5)}
ASKED = {"greedy": {}, "seeded": SAMPLED}


class Numbers(NamedTuple):
    """What a request leaves behind: its tokens, what it was told of their log-probabilities, and a hash of the keys and
    values of all but the last `DRAFTED + 1`, which may come in the step that ends it.
    """

    tokens: list[int]
    logprobs: list[list[float]]
    cached: str


def subject(kind: str) -> CoreRequest:
    return core_request("subject", PROMPT, max_tokens=24, controls=TokenControls(num_logprobs=2), **ASKED[kind])


def numbers(core: InProcessCore, asked: CoreRequest, others: Sequence[CoreRequest] = (), after: int = 0) -> Numbers:
    """Run a request, with others that come before it and at its step `after`."""
    core.send(Add([*others[1:], asked]))
    request = core._core.scheduler.requests[asked.request_id]
    kept, logprobs = np.zeros(0, np.float32), []
    num_computed = steps = 0
    while core.has_work():
        for output in core.step().outputs:
            if output.request_id == asked.request_id:
                logprobs += [each.logprobs for each in output.logprobs or ()]
        steps += 1
        if steps == after:
            core.send(Add(list(others[:1])))
        if request.pages and (count := min(request.num_computed, len(request.tokens))) >= num_computed:
            pages = np.asarray(core._core.runner.devices.state.cache.data)[:, request.pages]  # [L, M, 2, K, S, H]
            kept = pages.transpose(1, 4, 0, 2, 3, 5).reshape(-1, *pages.shape[:1], 2, *pages.shape[3::2])[:count].copy()
            num_computed = count
    tokens = request.tokens[request.num_prompt :]
    assert len(logprobs) == len(tokens)
    num_hashed = len(request.tokens) - 1 - DRAFTED
    assert num_computed >= num_hashed
    return Numbers(tokens, logprobs, hashlib.sha256(kept[:num_hashed].tobytes()).hexdigest())


def engine(folder: str, **changes: object) -> InProcessCore:
    """A small deterministic engine over random weights, compiled afresh."""
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 48, "block_size": PAGE, "max_model_len": MAX_MODEL_LEN}
    given = {"deterministic": True, "kv_cache_memory_bytes": CACHE_BYTES, **limits, **changes}
    return InProcessCore(EngineConfig(model=folder, load_format="dummy", compilation_cache_dir="", **given))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture(scope="module")
def core(folder: str) -> Iterator[InProcessCore]:
    core = engine(folder)
    yield core
    stats = core.stats()
    assert (stats.programs_planned, stats.compiles_in_request_path_total) == (2, 0)
    core.shutdown()


@pytest.fixture(scope="module")
def alone(core: InProcessCore) -> dict[str, Numbers]:
    """Each kind of request in an empty engine, with nothing in its cache."""
    results = {}
    for kind in ASKED:
        assert core.reset_prefix_cache()
        results[kind] = numbers(core, subject(kind))
    return results


@st.composite
def crowds(draw: st.DrawFn) -> list[CoreRequest]:
    """Up to five other requests of any length; some begin as the subject does, and its pages are theirs."""
    requests = []
    for index in range(draw(st.integers(0, 5))):
        shared, own = draw(st.integers(0, 60)), draw(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=40))
        asked = draw(st.sampled_from([{}, {"temperature": 0.7, "prng_key": (1, index)}]))
        requests.append(core_request(f"other {index}", PROMPT[:shared] + own, draw(st.integers(1, 40)), **asked))
    return requests


@pytest.mark.parametrize("kind", ASKED)
def test_in_any_company_as_alone(core, alone, kind):
    """Batches, cuts of the prompt by what others leave of the budget, cached beginnings and preemption, at random."""

    @settings(max_examples=15, deadline=None)
    @given(others=crowds(), after=st.integers(1, 20), forget=st.booleans())
    def check(others, after, forget):
        if forget:
            assert core.reset_prefix_cache()
        assert numbers(core, subject(kind), others, after) == alone[kind]

    check()


@pytest.mark.parametrize("kind", ASKED)
def test_after_being_preempted(core, alone, kind):
    """A request that came before grows until the subject has to give up its pages, and computes its tokens again."""
    before = core.stats().preemptions_total
    others = [core_request("late", [1], 1), core_request("earlier", PROMPT[40::-1], 100)]
    assert core.reset_prefix_cache()
    assert numbers(core, subject(kind), others) == alone[kind]
    assert core.stats().preemptions_total > before


@pytest.mark.parametrize("kind", ASKED)
def test_with_a_cached_beginning(core, alone, kind):
    before = core.stats().prefix_cache_hits_total
    for _ in range(2):
        assert numbers(core, subject(kind)) == alone[kind]
    assert core.stats().prefix_cache_hits_total >= before + len(PROMPT) // PAGE * PAGE


@pytest.fixture(scope="module", params=["ngram", "draft_model"])
def drafting(request: pytest.FixtureRequest, folder: str) -> Iterator[InProcessCore]:
    """Engines with drafts, in programs of their own: of what plain decoding says, some of it wrong, or of a model."""
    given = {"method": request.param, "num_speculative_tokens": DRAFTED}
    given |= {"model": folder} if request.param == "draft_model" else {}
    cache_bytes = CACHE_BYTES * (1 + (request.param == "draft_model"))
    few = {"max_num_seqs": 2} if request.param == "draft_model" else {}  # programs of the draft model
    core = engine(folder, speculative_config=given, kv_cache_memory_bytes=cache_bytes, **few)
    core._core.runner.compiled.wait()
    yield core
    assert core.stats().compiles_in_request_path_total == 0
    core.shutdown()


@pytest.mark.parametrize("kind", ASKED)
def test_behind_drafts_as_without(drafting, alone, kind):
    """In any company, whose drafts and the subject's are right or wrong, however many come of a step's budget."""
    drafts = drafting._core.scheduler.drafts
    assert drafts is not None
    drafts.times = Untimed((), ())
    before = drafting.stats().spec_accepted_tokens_total

    @settings(max_examples=10, deadline=None)
    @given(others=crowds(), after=st.integers(1, 20), chance=st.sampled_from([0.0, 0.6, 1.0]), seed=st.integers(0, 99))
    def check(others, after, chance, seed):
        assert drafting.reset_prefix_cache()
        if drafting._core.runner.draft is None:
            answers = {"subject": alone[kind].tokens} | {other.request_id: PROMPT for other in others}
            drafts.proposer = Oracle(drafting, answers, chance, Random(seed))
        assert numbers(drafting, subject(kind), others, after) == alone[kind]

    check()
    assert drafting.stats().spec_accepted_tokens_total > before + 20


class Steps:
    """The product's step up to the logits, over a cache of four sequences of which the first is the subject."""

    NUM_SEQUENCES, MAX_PAGES = 32, MAX_MODEL_LEN // PAGE

    def __init__(
        self, backend: str, hf: dict[str, Any] = TINY, *, num_tokens: int = 64, deterministic: bool = True
    ) -> None:
        placed = placed_model(backend, hf, page_size=PAGE, deterministic=deterministic)
        leaves = load_leaves(placed.structure, None, load_format="dummy")
        size = placed.row_block

        def step(cache, tokens, tables, starts, lengths):
            model = placed.structure.merge(leaves)
            table = SequenceTable.build(tables[None], starts, lengths, jnp.int32(0), num_tokens=num_tokens)
            cache, hidden = run_model(model, tokens, cache, table, size)
            last = hidden[jnp.maximum(starts[1:] - 1, 0)]
            if size is None:
                return cache, model.compute_logits(last)

            def logits(first, nothing):
                return nothing, model.compute_logits(lax.dynamic_slice_in_dim(last, first, size))

            return cache, by_blocks(logits, None, num_rows=self.NUM_SEQUENCES, size=size, used=jnp.sum(lengths > 0))[1]

        self._num_tokens = num_tokens
        self._step = jax.jit(step, donate_argnums=0)
        self._zero = lambda: placed.zero_state(StateSize(4 * self.MAX_PAGES, 1, 1)).cache

    def logits(self, cuts: list[int], others: list[list[tuple[int, int]]]) -> dict[int, bytes]:
        """The subject's logits at each cut, by position. `cuts` are where its ranges end, and each step has ranges
        (sequence, length) of other sequences, before and after the subject's.
        """
        cache, seen, done = self._zero(), {}, [0, 0, 0, 0]
        for start, stop, company in zip([0, *cuts], cuts, others, strict=False):
            ranges = [*company[::2], (0, stop - start), *company[1::2]]
            rows, tables, lengths = [], np.zeros((self.NUM_SEQUENCES, self.MAX_PAGES), np.int32), []
            for index, (sequence, length) in enumerate(ranges):
                rows += (PROMPT + PROMPT[::-1])[done[sequence] : done[sequence] + length]
                done[sequence] += length
                lengths.append(done[sequence])
                tables[index] = np.arange(self.MAX_PAGES) * 4 + sequence
            tokens = np.zeros(self._num_tokens, np.int32)
            tokens[: len(rows)] = rows
            starts = np.zeros(self.NUM_SEQUENCES + 1, np.int32)
            starts[1 : len(ranges) + 1] = np.cumsum([length for _, length in ranges])
            starts[len(ranges) + 1 :] = len(rows)
            lengths += [0] * (self.NUM_SEQUENCES - len(ranges))
            cache, logits = self._step(cache, tokens, tables, starts, np.asarray(lengths, np.int32))
            seen[stop] = np.asarray(logits)[len(company[::2])].tobytes()
        return seen


@pytest.fixture(
    scope="module",
    params=[("xla", TINY), ("reference", TINY), ("xla", TINY_MIXTURE)],
    ids=["xla", "reference", "mixture of experts"],
)
def steps(request: pytest.FixtureRequest) -> Steps:
    return Steps(*request.param)


@pytest.fixture(scope="module")
def token_by_token(steps: Steps) -> dict[int, bytes]:
    """The subject's logits at every position, from ranges of one token, alone."""
    return steps.logits(list(range(1, 151)), [[]] * 150)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_logits_do_not_depend_on_ranges_and_company(steps, token_by_token, data):
    """Against ranges of one token alone: longer ranges, anywhere in the step, beside ranges of other sequences."""
    cuts, others, done = [0], [], [0, 0, 0, 0]
    while cuts[-1] < 150 and len(cuts) < 12:
        own = data.draw(st.integers(1, min(40, 150 - cuts[-1])))
        company = [(other, data.draw(st.integers(1, 8))) for other in data.draw(st.permutations([1, 2, 3]))]
        company = [(other, length) for other, length in company if done[other] + length <= 150]
        for other, length in company:
            done[other] += length
        cuts.append(cuts[-1] + own)
        others.append(company)
    found = steps.logits(cuts[1:], others)
    assert found == {position: token_by_token[position] for position in found}


def test_without_it_the_shape_of_a_step_shows():
    """The test's own sense: a prompt in one step of 64 rows, and in steps of 8, has other bits."""
    large, small = (Steps("xla", num_tokens=size, deterministic=False) for size in (64, 8))
    assert large.logits([64], [[]])[64] != small.logits(list(range(8, 65, 8)), [[]] * 8)[64]


def test_a_sliding_window_is_refused_where_it_would_show():
    """The TPU kernel adds up a window in an order that depends on the range."""
    ops, _ = select_ops("pallas_tpu_interpret", platform="cpu", deterministic=True)
    table = SequenceTable.build(*(jnp.zeros(shape, jnp.int32) for shape in ((2, 1, 1), 2, 1, ())), num_tokens=2)
    cache = KVPages.zeros((1, 1, *ops.page_shape(2, 16, 8)), jnp.float32)
    with pytest.raises(ValueError, match=r"deterministic=True with attention_backend='pallas_tpu_interpret' is for"):
        ops.prepare(table, cache, windows=(0, 64), num_heads=4, head_dim=8, dtype=jnp.float32)


def report(folder: str) -> None:
    """A restart: each kind of request, alone in a new process that compiles for itself."""
    core = engine(folder)
    print(json.dumps({kind: numbers(core, subject(kind)) for kind in ASKED}))
    core.shutdown()


def test_after_a_restart(folder, alone):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent / "engine")])
    command = [sys.executable, "-c", "import sys, test_deterministic; test_deterministic.report(sys.argv[1])", folder]
    environment = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert {kind: Numbers(*values) for kind, values in printed.items()} == alone
