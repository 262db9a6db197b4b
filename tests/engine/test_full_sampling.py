"""The FULL sampling mode: every parameter against an independent reference, in every mix, and on its own row alone."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from sampling_reference import controlled_logits, distribution, drawn_tokens, uniform
from tiny_engine import TINY, VOCAB_SIZE, core_request, placed_model, run_requests

from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import NO_CONTROLS, CoreRequest, TokenControls
from jax_engine.execution.step_program import run_model
from jax_engine.grammar.bitmasks import pack_bits
from jax_engine.loading.loader import load_leaves
from jax_engine.models.kv_pages import SequenceTable
from jax_engine.sampling.full_sampling import unpack_bits
from jax_engine.sampling.top_k import CANDIDATES
from jax_engine.sharding.placed_model import StateSize

CONTROLS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.7},
    "negative presence": {"presence_penalty": -1.2},
    "frequency": {"frequency_penalty": 0.9},
    "negative frequency": {"frequency_penalty": -0.3},
    "repetition": {"repetition_penalty": 1.6},
    "low repetition": {"repetition_penalty": 0.7},
    "bias": {"logit_bias": {3: 100.0, 40: -100.0, 99: 98.5, 100: 99.9}},
    "allowed": {"allowed_token_ids": (3, 40, 64, 99, 100)},
    "bad words": {"bad_words": tuple((token,) for token in range(0, VOCAB_SIZE, 3))},
    "all": {
        "presence_penalty": 0.4,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.2,
        "logit_bias": {7: 2.0, 9: -3.0, 11: 1.5},
        "allowed_token_ids": tuple(range(5, 90)),
        "bad_words": ((7,), (8, 9)),
    },
}
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "prng_key": (3, 5)},
    "top-k": {"temperature": 1.3, "top_k": 9, "prng_key": (1, 7)},
    "top-p": {"temperature": 1.1, "top_p": 0.7, "min_p": 0.01, "prng_key": (2, 9)},
}


def prompt_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()


def asked(name: str, prompt: list[int], max_tokens: int, controls: dict[str, Any], **fields: Any) -> CoreRequest:
    return core_request(name, prompt, max_tokens, controls=TokenControls(**controls) if controls else None, **fields)


def matrix() -> list[CoreRequest]:
    """Every control alone, each with one way to draw, and every way to draw without controls."""
    requests = [
        asked(f"{name}, {draw}", prompt_of(row, 3 + 6 * row), 14, controls, **DRAWS[draw])
        for row, (name, controls) in enumerate(CONTROLS.items())
        for draw in ("greedy", list(DRAWS)[1 + row % 3])
    ]
    return requests + [asked(draw, prompt_of(50, 11), 14, {}, **given) for draw, given in DRAWS.items()]


class Model:
    """The tiny engine's model, without the engine."""

    def __init__(self) -> None:
        placed = placed_model("reference")
        leaves = load_leaves(placed.structure, None, load_format="dummy")
        num_pages = TINY["max_position_embeddings"] // 8
        size = StateSize(num_pages, 1, num_pages)

        def forward(tokens: jax.Array) -> jax.Array:
            model = placed.structure.merge(leaves)
            one, length = jnp.arange(num_pages)[None, None], tokens.shape[0]
            table = SequenceTable.build(
                one, jnp.array([0, length]), jnp.array([length]), jnp.int32(0), num_tokens=length
            )
            _, hidden = run_model(model, tokens, placed.zero_state(size).cache, table, None)
            return model.compute_logits(hidden)

        self._forward = jax.jit(forward)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """[tokens, vocabulary]: what follows each."""
        padded = np.zeros(96, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._forward(padded))[: len(tokens)]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def wanted_tokens(request: CoreRequest, row: np.ndarray, output: list[int]) -> set[int]:
    """Which token may follow `output` where the model's own logits are `row`."""
    controls = msgspec.structs.asdict(request.controls or NO_CONTROLS)
    changed = controlled_logits(row, request.prompt_token_ids, output, controls)
    if not request.temperature:
        return set(np.flatnonzero(changed >= changed.max() - 1e-4).tolist())
    # What few candidates have is cut before the draw, of others it is checked whether the drawn token is in it.
    before, behind = (request.top_p, 1.0) if 0 < request.top_k <= CANDIDATES[-1] else (1.0, request.top_p)
    shares = distribution(changed, request.temperature, request.top_k, before, request.min_p)
    position = len(request.prompt_token_ids) + len(output)
    return drawn_tokens(shares, behind, partial(uniform, request.prng_key, position))


@pytest.fixture(scope="module")
def alone(core: InProcessCore) -> dict[str, list[int]]:
    """Each request of the matrix in an engine with nothing else to do."""
    return {name: tokens for request in matrix() for name, tokens in run_requests(core, [request]).items()}


@pytest.mark.parametrize("request_id", [request.request_id for request in matrix()])
def test_every_token_is_what_the_parameters_say(request_id, alone, model):
    """The reference is told what came before each token, so that one close call does not hide the rest."""
    request = next(one for one in matrix() if one.request_id == request_id)
    tokens = alone[request_id]
    rows = model.logits([*request.prompt_token_ids, *tokens])[len(request.prompt_token_ids) - 1 :]
    for index, token in enumerate(tokens):
        assert token in wanted_tokens(request, rows[index], tokens[:index]), index


def test_each_control_changes_what_is_drawn(core, alone):
    """Else the test above could pass on requests that the controls do not touch."""
    for request in matrix():
        if request.controls and not request.temperature:
            plain = asked("plain", request.prompt_token_ids, 14, {})
            assert run_requests(core, [plain])["plain"] != alone[request.request_id], request.request_id


def test_all_of_them_in_one_batch_are_as_alone(core, alone):
    before = core.stats()
    assert run_requests(core, matrix()) == alone
    assert core.stats().compiles_in_request_path_total == before.compiles_in_request_path_total


def random_request(generator: np.random.Generator, name: str) -> CoreRequest:
    """Any of the controls, at any values, with any way to draw."""
    values = [item for given in CONTROLS.values() for item in given.items()]
    controls: dict[str, Any] = {field: value for field, value in values if generator.random() < 0.15}
    draw = DRAWS[str(generator.choice(list(DRAWS)))] | {"prng_key": (int(generator.integers(2**32)), 7)}
    ends: dict[str, Any] = {"stop_token_ids": tuple(generator.integers(0, VOCAB_SIZE, 2).tolist()), "min_tokens": 3}
    prompt = generator.integers(0, VOCAB_SIZE, generator.integers(1, 40)).tolist()
    return asked(
        name, prompt, int(generator.integers(3, 20)), controls, **draw, **(ends if generator.random() < 0.3 else {})
    )


@pytest.mark.parametrize("num_batches", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_random_batches_are_as_their_requests_alone(core, num_batches):
    generator = np.random.default_rng(num_batches)
    for batch in range(num_batches):
        requests = [random_request(generator, f"{batch}.{row}") for row in range(generator.integers(2, 9))]
        together = run_requests(core, requests)
        for request in requests:
            assert run_requests(core, [request])[request.request_id] == together[request.request_id], request


PAGE_BYTES = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * 8 * TINY["head_dim"] * 4
CORES = {
    "preempted": {"kv_cache_memory_bytes": 12 * PAGE_BYTES, "max_model_len": 96},
    "small chunks": {"max_num_batched_tokens": 6},
    "without prefix caching": {"enable_prefix_caching": False},
}


@pytest.fixture(params=CORES)
def other_core(request: pytest.FixtureRequest, make_core: Any) -> Iterator[InProcessCore]:
    core = make_core(**CORES[request.param])
    yield core
    assert bool(core.stats().preemptions_total) == (request.param == "preempted")


def test_counts_survive_preemption_caching_and_chunks(other_core, alone):
    """Twice, so that the second time finds the prompts in the cache."""
    for _ in range(2):
        assert run_requests(other_core, matrix()) == alone


def test_deterministic_engines_have_the_mode(make_core, model):
    core = make_core(deterministic=True, max_num_batched_tokens=64)
    together = run_requests(core, matrix())
    for request in matrix():
        assert run_requests(core, [request])[request.request_id] == together[request.request_id]
    assert core.stats().programs_planned == 2


def test_decodes_of_several_tokens_leave_controlled_requests_out(make_core):
    core = make_core(num_scheduler_steps=4)
    allowed = asked("allowed", [1, 2, 3], 9, {"allowed_token_ids": (3, 40)}, **DRAWS["sampled"])
    tokens = run_requests(core, [allowed, core_request("plain", [4, 5], 9)])
    assert set(tokens["allowed"]) <= {3, 40}
    assert [len(some) for some in tokens.values()] == [9, 9]


def test_bad_words_of_several_tokens_are_cut_at_their_last(core):
    """What a free request writes is forbidden in parts of one to four tokens; prompts do not count."""
    prompt = prompt_of(1, 20)
    free = run_requests(core, [asked("free", prompt, 12, {})])["free"]
    for length in (1, 2, 4):
        word = tuple(free[5 : 5 + length])
        first = next(index for index in range(12) if tuple(free[index : index + length]) == word)
        bad = asked("bad", prompt, 12, {"bad_words": (word, (VOCAB_SIZE - 1,) * 9)})
        tokens = run_requests(core, [bad])["bad"]
        assert tokens[: first + length - 1] == free[: first + length - 1]
        assert tokens[first + length - 1] != free[first + length - 1]
        assert all(tuple(tokens[index : index + length]) != word for index in range(12))
    elsewhere = asked("elsewhere", prompt, 12, {"bad_words": ((prompt[-1], free[0]),)})
    assert run_requests(core, [elsewhere])["elsewhere"] == free


def test_bits_are_packed_as_they_are_read():
    tokens = (0, 1, 31, 32, 63, 64, VOCAB_SIZE - 1)
    allowed = np.asarray(unpack_bits(jnp.asarray(pack_bits(tokens, VOCAB_SIZE))[None], VOCAB_SIZE))[0]
    assert np.flatnonzero(allowed).tolist() == list(tokens)
