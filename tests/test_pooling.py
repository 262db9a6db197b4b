"""Vectors of prompts, held against the hidden states of `transformers`: in chunks, in company, cached, preempted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from adapters import write_adapter, write_base, write_merged

from jax_engine import LLM, LoRARequest, PoolingParams, RequestOutput, SamplingParams
from jax_engine.core.messages import Add, CoreOutput
from jax_engine.frontend.pooling_requests import finished, prepare_pooling, similarity, vector_of
from jax_engine.frontend.processor import PreparedRequest
from jax_engine.pooling_params import POOLING_TYPES

BUDGET, PAGE, VOCABULARY = 16, 8, 101
SHARED = [(7 * i + 3) % VOCABULARY for i in range(30)]
# Of one token, of a chunk and a bit, of several chunks; three begin alike.
PROMPTS = [[5], [9, 8, 7], SHARED[:17], [*SHARED, 1, 2, 3], [*SHARED, 4], [(31 * i) % VOCABULARY for i in range(50)]]
SETTINGS: dict[str, Any] = {
    "tokenizer": "demo",
    "max_num_seqs": 4,
    "max_num_batched_tokens": BUDGET,
    "block_size": PAGE,
    "max_model_len": 64,
    "enable_lora": True,
    "max_loras": 1,
    "compilation_cache_dir": "",
}
# Few step programs, for what has an engine of its own.
FEW: dict[str, Any] = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "enable_lora": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base")
    adapter = write_adapter(folder / "adapter", rank=4, seed=1, alpha=8)
    return {"base": str(base), "adapter": adapter, "merged": str(write_merged(folder / "merged", base, adapter))}


def hidden_states(model: str) -> list[np.ndarray]:
    """Of each prompt, [tokens, hidden size], behind the final norm."""
    reference = transformers.AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        return [reference(torch.tensor([prompt])).last_hidden_state[0].numpy() for prompt in PROMPTS]


@pytest.fixture(scope="module")
def states(folders: dict[str, str]) -> list[np.ndarray]:
    return hidden_states(folders["base"])


@pytest.fixture(scope="module")
def shared_llm(folders: dict[str, str]) -> Iterator[LLM]:
    with LLM(folders["base"], **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def small_llm(folders: dict[str, str]) -> Iterator[LLM]:
    page_bytes = 2 * 2 * 2 * PAGE * 8 * 4  # layers, keys and values, heads, tokens, dimensions, float32
    settings = FEW | {"kv_cache_memory_bytes": 9 * page_bytes, "scheduling_policy": "priority"}
    with LLM(folders["base"], **SETTINGS | settings) as llm:
        llm.encode([1], use_tqdm=False)  # from here on its program is there
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> LLM:
    assert shared_llm.reset_prefix_cache()
    return shared_llm


def pooled(states: np.ndarray, pooling_type: str) -> np.ndarray:
    return {"LAST": states[-1], "MEAN": states.mean(axis=0), "CLS": states[0]}[pooling_type]


def raw(pooling_type: str, **more: Any) -> PoolingParams:
    return PoolingParams(pooling_type=pooling_type, normalize=False, **more)


def assert_close(given: Any, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(given), wanted, rtol=1e-4, atol=1e-4)


def run_together(
    llm: LLM, pooling: list[PoolingParams], sampling: list[SamplingParams]
) -> tuple[list[np.ndarray], list[RequestOutput]]:
    """Vectors of the first prompts and completions of the last ones, all in the engine at once."""
    prepared: list[PreparedRequest] = []
    for params, prompt in zip(pooling, PROMPTS, strict=True):
        prepared.append(prepare_pooling(llm._inputs, next(llm._request_ids), prompt, params))
    for given, prompt in zip(sampling, reversed(PROMPTS), strict=False):
        prepared += llm._prepare([prompt], given, "prompts")
    prepared = [*prepared[::2], *prepared[1::2]]
    outputs = {output.request_id: output for output in llm._run(prepared, use_tqdm=False)}
    ordered = sorted(outputs.values(), key=lambda output: int(output.request_id))
    vectors = [vector_of(output, params) for output, params in zip(ordered, pooling, strict=False)]
    return vectors, ordered[len(pooling) :]


@pytest.mark.parametrize("pooling_type", POOLING_TYPES)
def test_vectors_are_those_of_transformers_in_chunks_and_with_a_warm_cache(
    llm: LLM, states: list[np.ndarray], pooling_type: str
) -> None:
    for is_warm in (False, True):
        outputs = llm.encode(PROMPTS, raw(pooling_type), use_tqdm=False)
        for output, prompt, wanted in zip(outputs, PROMPTS, states, strict=True):
            assert_close(output.outputs.data, pooled(wanted, pooling_type))
            assert output.prompt_token_ids == prompt
        hits = [output.num_cached_tokens for output in outputs]
        if pooling_type == "LAST" and is_warm:
            assert hits == [(len(prompt) - 1) // PAGE * PAGE for prompt in PROMPTS]
        elif pooling_type != "LAST":
            assert not any(hits), "all of the prompt has to be run"


def test_pooled_prompts_are_found_by_those_that_generate(llm: LLM) -> None:
    llm.encode(PROMPTS[-1], raw("MEAN"), use_tqdm=False)
    (output,) = llm.generate(PROMPTS[-1], SamplingParams(max_tokens=1), use_tqdm=False)
    assert output.num_cached_tokens == (len(PROMPTS[-1]) - 1) // PAGE * PAGE


def test_every_kind_goes_with_every_other_and_with_requests_that_generate(llm: LLM, states: list[np.ndarray]) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    sampling = [
        greedy,
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, repetition_penalty=1.5, logprobs=3),
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, prompt_logprobs=2),
        SamplingParams(seed=3, max_tokens=6, ignore_eos=True),
    ]
    alone = [llm.generate(p, s, use_tqdm=False)[0] for s, p in zip(sampling, reversed(PROMPTS), strict=False)]
    assert llm.reset_prefix_cache()
    pooling = [raw(POOLING_TYPES[index % 3]) for index in range(len(PROMPTS))]
    vectors, completions = run_together(llm, pooling, sampling)
    for params, vector, wanted in zip(pooling, vectors, states, strict=True):
        assert_close(vector, pooled(wanted, str(params.pooling_type)))
    assert [one.outputs[0].token_ids for one in completions] == [one.outputs[0].token_ids for one in alone]
    assert llm.get_metrics().compiles_in_request_path_total == 0


@pytest.mark.parametrize("pooling_type", POOLING_TYPES)
def test_a_request_that_is_preempted_gives_the_same(
    small_llm: LLM, states: list[np.ndarray], pooling_type: str
) -> None:
    core, before = small_llm._running_core(), small_llm.get_metrics().preemptions_total
    patient = prepare_pooling(small_llm._inputs, "patient", PROMPTS[-1], raw(pooling_type), priority=9)
    urgent = small_llm._prepare([PROMPTS[3], PROMPTS[2] * 2], SamplingParams(max_tokens=9), "prompts", [0, 0])
    outputs: list[CoreOutput] = []
    core.send(Add(list(patient.core_requests)))
    for _ in range(2):
        outputs += core.step().outputs
    core.send(Add([sequence for request in urgent for sequence in request.core_requests]))
    while core.has_work():
        outputs += core.step().outputs
    (vector,) = [output.pooled for output in outputs if output.pooled is not None]
    assert_close(finished(vector, raw(pooling_type)), pooled(states[-1], pooling_type))
    assert small_llm.get_metrics().preemptions_total > before


def test_an_adapter_gives_what_it_gives_merged(llm: LLM, folders: dict[str, str]) -> None:
    lora = LoRARequest("own", 1, folders["adapter"])
    outputs = llm.encode(PROMPTS, raw("MEAN"), use_tqdm=False, lora_request=lora)
    for output, wanted in zip(outputs, hidden_states(folders["merged"]), strict=True):
        assert_close(output.outputs.data, pooled(wanted, "MEAN"))


def test_a_deterministic_engine_gives_the_same_bits_in_any_company(folders: dict[str, str]) -> None:
    with LLM(folders["base"], **SETTINGS | FEW, deterministic=True) as llm:
        pooling = [raw("MEAN")] * len(PROMPTS)
        alone = [llm.encode(prompt, raw("MEAN"), use_tqdm=False)[0].outputs.data for prompt in PROMPTS]
        vectors, _ = run_together(llm, pooling, [SamplingParams(max_tokens=9)] * 3)
    assert [vector.tobytes() for vector in vectors] == [vector.tobytes() for vector in alone]


def test_embed_normalizes_and_cuts_first(llm: LLM, states: list[np.ndarray]) -> None:
    for dimensions in (None, 5):
        outputs = llm.embed(PROMPTS, pooling_params=PoolingParams(dimensions=dimensions), use_tqdm=False)
        for output, wanted in zip(outputs, states, strict=True):
            cut = wanted[-1][:dimensions]
            assert_close(output.outputs.embedding, cut / np.linalg.norm(cut))
            assert output.outputs.hidden_size == (dimensions or 32)


def test_the_score_is_the_cosine(llm: LLM, states: list[np.ndarray]) -> None:
    def cosine(one: int, other: int) -> float:
        first, second = states[one][-1], states[other][-1]
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    one_to_many = llm.score(PROMPTS[3], PROMPTS, use_tqdm=False)
    wanted = [cosine(3, other) for other in range(len(PROMPTS))]
    assert_close([output.outputs.score for output in one_to_many], np.array(wanted))
    pairs = llm.score(PROMPTS, PROMPTS[::-1], use_tqdm=False)
    wanted = [cosine(one, 5 - one) for one in range(len(PROMPTS))]
    assert_close([output.outputs.score for output in pairs], np.array(wanted))
    with pytest.raises(ValueError, match="data_1 has 2 entries and data_2 6"):
        llm.score(PROMPTS[:2], PROMPTS)


def test_a_prompt_is_cut_from_the_front(llm: LLM) -> None:
    (cut,) = llm.encode([90, 1, 2, 3], PoolingParams(truncate_prompt_tokens=2), use_tqdm=False)
    (whole,) = llm.encode([2, 3], use_tqdm=False)
    assert cut.prompt_token_ids == [2, 3]
    assert_close(cut.outputs.data, whole.outputs.data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling_type": "SUM"}, "pooling_type='SUM' must be one of LAST, MEAN, CLS"),
        ({"normalize": 1}, "normalize=1 must be true or false"),
        ({"dimensions": 0}, "dimensions=0"),
        ({"dimensions": 33}, "dimensions=33 must be at most 32, the model's hidden size"),
        ({"truncate_prompt_tokens": 64}, "truncate_prompt_tokens=64 must be at most 63"),
    ],
)
def test_what_cannot_be_is_refused_by_name(llm: LLM, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.encode([1, 2, 3], PoolingParams(**fields))


def test_the_engine_has_defaults() -> None:
    given = PoolingParams.of_engine({"pooling_type": "MEAN", "normalize": False, "dimensions": 7})
    assert PoolingParams().with_defaults(given) == given
    assert PoolingParams(dimensions=3, normalize=True).with_defaults(given).dimensions == 3
    assert PoolingParams.of_engine(None) == PoolingParams(pooling_type="LAST", normalize=True)
    wrongs = [({"pooling": "MEAN"}, "pooler_config has 'pooling'"), ({"dimensions": 0}, "pooler_config: dimensions=0")]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            PoolingParams.of_engine(wrong)


def test_a_score_is_never_more_than_one() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
    scores = [similarity(vector, 3 * vector) for vector in vectors]
    assert_close(scores, np.ones(200))
    assert max(scores) <= 1
    assert similarity(vectors[0], np.zeros(32, np.float32)) == 0
