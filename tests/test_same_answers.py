"""The built-in model answers the same alone, among 64 requests, with prompts cut up, and after preemption."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jax_engine import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=48)
QUESTIONS = [f"What is {first} + {second}?" for first in (17, 4, 30, 58) for second in range(2, 66, 4)]
ALONE = range(0, len(QUESTIONS), 13)


@contextmanager
def engine(**settings: int) -> Iterator[LLM]:
    with LLM(**settings) as llm:
        yield llm
        stats = llm.get_metrics()
        assert (stats.num_pages_in_use, stats.compiles_in_request_path_total) == (0, 0)


def answers(llm: LLM, questions: list[str]) -> list[list[int]]:
    conversations = [[{"role": "user", "content": question}] for question in questions]
    return [output.outputs[0].token_ids for output in llm.chat(conversations, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def together() -> list[list[int]]:
    """All 64 in one batch; on the way, some of them alone."""
    with engine() as llm:
        tokens = answers(llm, QUESTIONS)
        for index in ALONE:
            assert answers(llm, [QUESTIONS[index]]) == [tokens[index]]
    return tokens


def test_in_a_batch_of_64_as_alone(together):
    assert len(together) == 64
    assert len({tuple(tokens) for tokens in together}) > 50


def test_with_prompts_cut_into_chunks(together):
    with engine(max_num_seqs=16, max_num_batched_tokens=16) as llm:
        assert answers(llm, QUESTIONS) == together


def test_after_preemption(together):
    """Pages for 480 tokens, which 16 sequences of about 70 outgrow while they run."""
    page_bytes = 5 * 2 * 2 * 16 * 32 * 4
    with engine(max_num_seqs=16, max_model_len=128, kv_cache_memory_bytes=30 * page_bytes) as llm:
        assert answers(llm, QUESTIONS) == together
        assert llm.get_metrics().preemptions_total > 0
