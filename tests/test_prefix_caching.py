"""Prefix caching through `LLM` and `AsyncLLM`: the same tokens as without it, fewer computed, and all counted."""

import asyncio
import json
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tiny_engine import TINY

from jax_engine import LLM, AsyncLLM, EngineConfig, EngineDeadError, RequestOutput, SamplingParams
from jax_engine.loading.model_files import resolve_model_path

PAGE = 8
VOCAB_SIZE = 1024
SYSTEM = [(7 * i) % VOCAB_SIZE for i in range(43)]  # five full pages and a bit
QUESTIONS = [[*SYSTEM, 900 + i, 17 * i, 5] for i in range(6)]
LONE = [[(31 * i + 7 * k) % VOCAB_SIZE for k in range(3 + 9 * i)] for i in range(6)]


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "ignore_eos": True, **params})


def seeded(seed: int = 0, **params: Any) -> SamplingParams:
    return SamplingParams(**{"seed": seed, "max_tokens": 24, "ignore_eos": True, "top_p": 0.9, **params})


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY | {"vocab_size": VOCAB_SIZE}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model_path("demo") / name, folder)
    return {
        "model": str(folder),
        "load_format": "dummy",
        "max_model_len": 96,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": PAGE,
        "compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
    }


@pytest.fixture(scope="module")
def shared_llm(settings: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**settings) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """An engine with nothing in its cache."""
    assert shared_llm.reset_prefix_cache()
    yield shared_llm
    assert_idle(shared_llm)


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any]) -> Iterator[LLM]:
    """The same engine without prefix caching."""
    with LLM(**settings, enable_prefix_caching=False) as llm:
        yield llm
        stats = llm.get_metrics()
        assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (0, 0)


def assert_idle(llm: LLM) -> None:
    stats = llm.get_metrics()
    held = (stats.num_running, stats.num_waiting, stats.num_pages_in_use, stats.num_tokens_in_pages)
    assert held == (0, 0, 0, 0)
    assert stats.compiles_in_request_path_total == 0


def generate(llm: LLM, prompts: Sequence[Any], params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def cached(llm: LLM, prompt: Any, **params: Any) -> int:
    (output,) = generate(llm, [prompt], greedy(max_tokens=2, **params))
    return output.num_cached_tokens


def page_floor(length: int) -> int:
    return length // PAGE * PAGE


@pytest.mark.parametrize("length", [1, PAGE, PAGE + 1, 2 * PAGE, 64, 65, 94])
def test_a_repeated_prompt_is_cached_up_to_its_last_token(llm: LLM, length: int) -> None:
    prompt = list(range(100, 100 + length))
    assert cached(llm, prompt) == 0
    assert cached(llm, prompt) == page_floor(length - 1)


@pytest.mark.parametrize("params", [greedy(), seeded(3), seeded(4, n=3)], ids=["greedy", "seeded", "n=3"])
def test_tokens_are_those_without_caching(llm: LLM, plain: LLM, params: SamplingParams) -> None:
    """Prompts with a common beginning and without, more than the pages hold: all at once, again, then each twice."""
    prompts = [*QUESTIONS, *LONE]
    expected = tokens(generate(plain, prompts, params))
    assert tokens(generate(llm, prompts, params)) == expected
    assert tokens(generate(llm, prompts, params)) == expected
    for prompt, same in zip(prompts, expected, strict=True):
        generate(llm, [prompt], params)
        (again,) = generate(llm, [prompt], params)
        assert tokens([again]) == [same]
        assert again.num_cached_tokens == page_floor(len(prompt) - 1)


def test_prompts_cut_into_chunks_give_the_same_tokens(settings: dict[str, Any], plain: LLM) -> None:
    """Steps of four tokens, so that a prompt is found in part while it is being computed."""
    expected = tokens(generate(plain, QUESTIONS, greedy()))
    with LLM(**settings | {"max_num_batched_tokens": 4}) as llm:
        for _ in range(2):
            assert tokens(generate(llm, QUESTIONS, greedy())) == expected
        assert_idle(llm)


def test_preemption_gives_the_same_tokens(settings: dict[str, Any], plain: LLM) -> None:
    """Pages for one full sequence and a half: cached ones are given up, requests give way and come back."""
    page_bytes = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * TINY["head_dim"] * 4
    prompts = [*QUESTIONS, *LONE]
    with LLM(**settings, kv_cache_memory_bytes=18 * page_bytes) as llm:
        for params in (greedy(max_tokens=40), seeded(2, max_tokens=40)):
            expected = tokens(generate(plain, prompts, params))
            for _ in range(2):
                assert tokens(generate(llm, prompts, params)) == expected
        assert llm.get_metrics().preemptions_total > 0
        assert_idle(llm)


def test_a_shared_system_prompt_is_computed_once(llm: LLM) -> None:
    before = llm.get_metrics()
    first, *rest = [generate(llm, [question], greedy())[0] for question in QUESTIONS]
    assert first.num_cached_tokens == 0
    assert [output.num_cached_tokens for output in rest] == [page_floor(len(SYSTEM))] * len(rest)
    after = llm.get_metrics()
    asked, hits = sum(map(len, QUESTIONS)), page_floor(len(SYSTEM)) * len(rest)
    assert after.prefix_cache_queries_total - before.prefix_cache_queries_total == asked
    assert after.prefix_cache_hits_total - before.prefix_cache_hits_total == hits
    assert after.prompt_tokens_total - before.prompt_tokens_total == asked - hits


def test_the_next_turn_of_a_conversation_finds_the_answer_before_it(llm: LLM) -> None:
    (output,) = generate(llm, [SYSTEM], greedy(max_tokens=30))
    turn = [*SYSTEM, *output.outputs[0].token_ids]
    assert cached(llm, [*turn, 1, 2, 3]) == page_floor(len(turn) - 1)


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
def test_one_of_the_completions_computes_the_prompt(llm: LLM, plain: LLM, caching: bool) -> None:
    """Four run at once, all eight share it and compute its last token; the output counts what the first one found."""
    engine = llm if caching else plain
    before = engine.get_metrics()
    (output,) = generate(engine, [SYSTEM[:30]], seeded(1, n=8))
    after = engine.get_metrics()
    assert output.num_cached_tokens == 0
    assert after.prompt_tokens_total - before.prompt_tokens_total == 30 + 7
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 8


def test_salts_keep_prompts_apart(llm: LLM, plain: LLM) -> None:
    def salted(salt: str | None) -> dict[str, Any]:
        return {"prompt_token_ids": SYSTEM, "cache_salt": salt}

    found = [cached(llm, salted(salt)) for salt in ("a", "b", None, "a", "b", None)]
    assert found == [0, 0, 0, 40, 40, 40]
    text = {"prompt": "What is 17 + 25? Please think about it step by step.", "cache_salt": "a"}
    assert cached(llm, text) == 0
    assert cached(llm, text) > 0
    assert cached(llm, text | {"cache_salt": "b"}) == 0
    assert tokens(generate(llm, [salted("a")], greedy())) == tokens(generate(plain, [SYSTEM], greedy()))


@pytest.mark.parametrize("salt", ["", 5, ["a"]], ids=repr)
def test_a_salt_is_a_non_empty_string(llm: LLM, salt: object) -> None:
    with pytest.raises(ValueError, match=r"cache_salt=.* must be a non-empty string"):
        generate(llm, [{"prompt_token_ids": SYSTEM, "cache_salt": salt}], greedy())


def test_the_prompt_that_was_used_longest_ago_is_forgotten_first(settings: dict[str, Any]) -> None:
    """18 pages: three prompts of five and their answers fit, and a fourth takes the place of the oldest."""
    page_bytes = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * PAGE * TINY["head_dim"] * 4
    prompts = [[100 * i + k for k in range(5 * PAGE + 1)] for i in range(4)]
    with LLM(**settings, kv_cache_memory_bytes=18 * page_bytes) as llm:
        for prompt in prompts[:3]:
            assert cached(llm, prompt) == 0
        assert cached(llm, prompts[0]) == 5 * PAGE  # used again: now the second is the oldest
        assert cached(llm, prompts[3]) == 0
        assert cached(llm, prompts[0]) == cached(llm, prompts[3]) == 5 * PAGE
        assert cached(llm, prompts[2]) == 5 * PAGE
        assert 0 < cached(llm, prompts[1]) < 5 * PAGE, "its tail went, its head is there"


def test_a_reset_forgets_everything(llm: LLM) -> None:
    assert cached(llm, SYSTEM) == 0
    assert cached(llm, SYSTEM) == 40
    assert llm.reset_prefix_cache()
    assert cached(llm, SYSTEM) == 0


def test_a_long_cached_prompt_and_new_ones_share_a_step(llm: LLM, plain: LLM) -> None:
    """More cached pages than a small step's buffer has room for go to the device's block tables all the same."""
    prompts = [list(range(100 * i, 100 * i + 90)) for i in range(4)]
    params = greedy(max_tokens=6)
    expected = tokens(generate(plain, prompts, params))
    generate(llm, prompts[:3], params)
    again = generate(llm, prompts, params)
    assert tokens(again) == expected
    assert [output.num_cached_tokens for output in again] == [88, 88, 88, 0]


async def test_async_engine_resets_only_when_nothing_runs(settings: dict[str, Any]) -> None:
    engine = await AsyncLLM.start(EngineConfig(**settings))

    async def run(request_id: str, **params: Any) -> int:
        async for output in engine.generate({"prompt_token_ids": SYSTEM}, greedy(**params), request_id):
            number = output.num_cached_tokens
        return number

    assert [await run(f"r{i}") for i in range(2)] == [0, 40]
    stream = await engine.add_request("long", {"prompt_token_ids": SYSTEM}, greedy(max_tokens=50))
    await anext(stream)
    assert not await engine.reset_prefix_cache(), "a request holds pages"
    await engine.abort("long")
    assert [output.finished async for output in stream][-1]
    assert await run("later") == 40, "an aborted request's pages are kept, a refused reset forgets nothing"
    assert await asyncio.gather(engine.reset_prefix_cache(), engine.reset_prefix_cache()) == [True, True]
    assert await run("last") == 0
    await engine.shutdown()
    with pytest.raises(EngineDeadError):
        await engine.reset_prefix_cache()
