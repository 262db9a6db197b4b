"""Log-probabilities and beam searches: those of `transformers`, however the engine gets to them."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from jax_engine import LLM, BeamSearchParams, EngineConfig, Logprob, RequestOutput, SamplingParams
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path

VOCAB_SIZE = 1024
TOLERANCE = 1e-4
PROMPTS = [[(31 * i + 7 * k + 3) % VOCAB_SIZE for k in range(length)] for i, length in enumerate((40, 1, 13, 57))]
Model = transformers.PreTrainedModel


def beams(model: Model, prompt: list[int], width: int, **settings: Any) -> Any:
    """What `transformers` finds, with scores."""
    ids = torch.tensor([prompt])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A random model of two cache groups, every other layer with a window, and its folder. Two tokens that are likely
    after one of the prompts end sequences.
    """
    config = transformers.AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        layer_types=["sliding_attention", "full_attention"],
        use_sliding_window=True,
        sliding_window=12,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * (0.5 if parameter.ndim > 1 else 1)
    likely = beams(model, PROMPTS[2], 4, max_new_tokens=5).sequences[:, len(PROMPTS[2]) :]
    tokenizers_own = load_tokenizer(resolve_model_path("demo")).eos_token_id
    model.generation_config.eos_token_id = sorted({int(likely[1, 3]), int(likely[2, 2]), tokenizers_own})
    model.generation_config.pad_token_id = 0
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model_path("demo") / name, folder)
    return folder, model


@pytest.fixture(scope="module")
def settings(reference: tuple[Path, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Steps of at most 16 tokens, which cut most prompts, and pages for little more than the longest sequence."""
    return {
        "kv_cache_memory_bytes": 24 * 2 * 2 * 8 * 8 * 4,
        "model": str(reference[0]),
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 8,
        "compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
    }


@pytest.fixture(scope="module")
def llm(settings: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**settings) as llm:
        yield llm
        stats = llm.get_metrics()
        assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use) == (0, 0, 0)


def expected(model: Model, token_ids: list[int]) -> np.ndarray:
    """Log-probabilities of what follows each token of a sequence, in float64 from the logits on."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0].double()
    return np.asarray(torch.log_softmax(logits, dim=-1))


def check(position: dict[int, Logprob], wanted: np.ndarray, token: int, count: int) -> None:
    """Against one position's log-probabilities: the token's own first, then the `count` likeliest in order."""
    assert next(iter(position)) == token
    likeliest = np.argsort(-wanted)[:count]
    assert len(position) == count + (token not in likeliest)
    for other, entry in position.items():
        assert abs(entry.logprob - wanted[other]) < TOLERANCE
        assert entry.rank == (wanted >= wanted[other]).sum()
        assert entry.decoded_token is not None


def check_all(model: Model, output: RequestOutput, count: int) -> None:
    """Both kinds of a whole output, all its completions."""
    prompt = output.prompt_token_ids
    for completion in output.outputs:
        wanted = expected(model, prompt + completion.token_ids)
        assert completion.logprobs is not None and len(completion.logprobs) == len(completion.token_ids)
        for index, token in enumerate(completion.token_ids):
            check(completion.logprobs[index], wanted[len(prompt) + index - 1], token, count)
        own = [entry[token].logprob for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(own))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(prompt)
    assert output.prompt_logprobs[0] is None
    for index in range(1, len(prompt)):
        position = output.prompt_logprobs[index]
        assert position is not None
        check(position, wanted[index - 1], prompt[index], count)


def sampled(**params: Any) -> SamplingParams:
    return SamplingParams(
        **{"seed": 3, "max_tokens": 10, "ignore_eos": True, "logprobs": 3, "prompt_logprobs": 3, **params}
    )


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def test_they_are_those_of_transformers_in_chunks_and_in_company(llm: LLM, reference: tuple[Path, Model]) -> None:
    """Temperature, top-k and penalties change what is drawn, and none of the figures."""
    params = [
        sampled(temperature=0),
        sampled(temperature=2.0, top_k=50),
        sampled(logprobs=0, prompt_logprobs=0),
        sampled(logprobs=20, prompt_logprobs=20, top_p=0.9),
    ]
    for output, count in zip(generate(llm, PROMPTS, params), (3, 3, 0, 20), strict=True):
        check_all(reference[1], output, count)


def test_who_does_not_ask_gets_none_and_the_same_tokens(llm: LLM) -> None:
    asked, silent = generate(llm, [PROMPTS[0]] * 2, [sampled(), sampled(logprobs=None, prompt_logprobs=None)])
    assert silent.outputs[0].token_ids == asked.outputs[0].token_ids
    assert (silent.outputs[0].logprobs, silent.outputs[0].cumulative_logprob, silent.prompt_logprobs) == (None,) * 3
    (prompt_only,) = generate(llm, PROMPTS[0], sampled(logprobs=None))
    assert prompt_only.outputs[0].logprobs is None
    assert prompt_only.prompt_logprobs == asked.prompt_logprobs


def test_a_cached_prompt_is_computed_again_for_its_logprobs(llm: LLM, reference: tuple[Path, Model]) -> None:
    assert llm.reset_prefix_cache()
    generate(llm, PROMPTS[3], sampled(logprobs=None, prompt_logprobs=None))
    (scored,) = generate(llm, PROMPTS[3], sampled())
    assert scored.num_cached_tokens == 0
    check_all(reference[1], scored, 3)
    (answer,) = generate(llm, PROMPTS[3], sampled(prompt_logprobs=None))
    assert answer.num_cached_tokens == 56, "those of the answer alone need no more than its last token"
    assert answer.outputs[0].token_ids == scored.outputs[0].token_ids


def test_completions_of_one_prompt_have_their_own(llm: LLM, reference: tuple[Path, Model]) -> None:
    (output,) = generate(llm, PROMPTS[2], sampled(n=6))
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 6
    check_all(reference[1], output, 3)


def test_a_preempted_request_records_nothing_twice(llm: LLM, reference: tuple[Path, Model]) -> None:
    """Requests give way in the midst of prompts and answers."""
    before = llm.get_metrics().preemptions_total
    outputs = generate(llm, [*PROMPTS, PROMPTS[0]], sampled(max_tokens=40))
    assert llm.get_metrics().preemptions_total > before
    for output in outputs:
        check_all(reference[1], output, 3)


def test_deterministic_steps_give_the_same_bits_in_any_company(
    settings: dict[str, Any], reference: tuple[Path, Model]
) -> None:
    with LLM(**(settings | {"max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**20}), deterministic=True) as llm:
        together = generate(llm, PROMPTS, sampled())
        alone = [generate(llm, prompt, sampled())[0] for prompt in PROMPTS]
    for one, other in zip(together, alone, strict=True):
        assert one.prompt_logprobs == other.prompt_logprobs
        assert one.outputs == other.outputs
    check_all(reference[1], together[0], 3)


def test_more_than_max_logprobs_is_refused(llm: LLM) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        with pytest.raises(ValueError, match=rf"^{name}=21 must be at most max_logprobs=20"):
            generate(llm, "a", SamplingParams(**{name: 21}))
        with pytest.raises(ValueError, match=rf"^{name}=-1 must be at most max_logprobs=20, and -1 is the whole"):
            generate(llm, "a", SamplingParams(**{name: -1}))
        with pytest.raises(ValueError, match=rf"^{name}=-2 must be a whole number, at least -1"):
            SamplingParams(**{name: -2})
    with pytest.raises(ValueError, match=r"max_logprobs=-2 must be a whole number, between -1 and 1024"):
        EngineConfig(max_logprobs=-2)


def test_minus_one_is_the_whole_vocabulary(settings: dict[str, Any]) -> None:
    sizes = {"max_num_seqs": 1, "max_num_batched_tokens": 4, "compile_before_ready": False}
    with LLM(**(settings | sizes), max_logprobs=-1) as engine:
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=-1, prompt_logprobs=-1)
        (output,) = generate(engine, PROMPTS[2], params)
        few = generate(engine, PROMPTS[2], replace(params, logprobs=2, prompt_logprobs=None))[0].outputs[0]
    assert output.prompt_logprobs is not None and output.outputs[0].logprobs is not None and few.logprobs is not None
    for position in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs):
        assert position is not None
        assert sorted(position) == list(range(VOCAB_SIZE))
        assert abs(sum(math.exp(entry.logprob) for entry in position.values()) - 1) < 1e-5
    for some, whole in zip(few.logprobs, output.outputs[0].logprobs, strict=True):
        assert {token: whole[token] for token in some} == some
        assert len(some) == 2


SEARCHES = [
    {"length_penalty": 1.0},
    {"length_penalty": 0.0, "early_stopping": True},
    {"length_penalty": 0.3, "early_stopping": "never"},
    {"length_penalty": -1.0},
]


@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_beams_are_those_of_transformers(llm: LLM, reference: tuple[Path, Model], search: dict[str, Any]) -> None:
    """Several prompts side by side, some of whose beams end before the others."""
    model, width, max_tokens = reference[1], 4, 8
    ends = set(model.generation_config.eos_token_id)
    found = llm.beam_search(PROMPTS, BeamSearchParams(beam_width=width, max_tokens=max_tokens, **search))
    ended = 0
    for prompt, output in zip(PROMPTS, found, strict=True):
        wanted = beams(model, prompt, width, max_new_tokens=max_tokens, **search)
        np.testing.assert_allclose(
            [one.score for one in output.sequences], wanted.sequences_scores, atol=TOLERANCE, rtol=TOLERANCE
        )
        for one, row in zip(output.sequences, wanted.sequences[:, len(prompt) :].tolist(), strict=True):
            end = next((index for index, token in enumerate(row) if token in ends), None)
            assert one.tokens == prompt + row[:end]
            assert (one.finish_reason, one.stop_reason) == (("length", None) if end is None else ("stop", row[end]))
            assert len(one.logprobs) == len(one.tokens) - len(prompt)
            ended += end is not None
    assert ended > 0, "no beam has ended: this compares less than it says"


def test_beams_find_their_beginnings_in_the_cache(llm: LLM) -> None:
    """Each step computes a token a beam, and nothing again: pages that are not full are found, too."""
    assert llm.reset_prefix_cache()
    before = llm.get_metrics().prompt_tokens_total
    (output,) = llm.beam_search(PROMPTS[3], BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True))
    computed = llm.get_metrics().prompt_tokens_total - before
    assert {len(one.tokens) for one in output.sequences} == {len(PROMPTS[3]) + 8}
    assert computed == len(PROMPTS[3]) + 7 * 3


def test_a_search_that_the_engine_cannot_do_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ValueError, match=r"^beam_width=19 needs the 22 likeliest .* lower it to at most 17"):
        llm.beam_search("a", BeamSearchParams(beam_width=19, max_tokens=4))
    with pytest.raises(ValueError, match=r"^prompts\[1\]: max_tokens=88 and the prompt's 57 tokens exceed"):
        llm.beam_search([PROMPTS[0], PROMPTS[3]], BeamSearchParams(beam_width=2, max_tokens=88))
