"""Counting reasoning, with the built-in model's tokenizer."""

import pytest

from jax_engine.frontend.token_texts import TokenTexts
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.server.openai.message_parts import MessageFormat
from jax_engine.server.openai.reasoning_tokens import reasoning_counter
from jax_engine.server.parsers.hermes import HermesToolParser
from jax_engine.server.parsers.reasoning import ReasoningFormat

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("answer", ["It is 42.", "é日本", "< 3", CALL], ids=["text", "bytes", "a tag perhaps", "call"])
@pytest.mark.parametrize("reasoning", ["<think>17 + 25, 日本\n</think>\n\n", "<think></think>", ""])
def test_what_comes_before_the_answer_is_counted(reasoning, answer):
    tokenizer = load_tokenizer(resolve_model_path("demo"))
    form = MessageFormat(reasoning=ReasoningFormat(), tool_parser=HermesToolParser)
    counter = reasoning_counter(form, TokenTexts(tokenizer))
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (reasoning, answer))
    thought = len(before) if "17" in reasoning else 0
    assert counter.count(reasoning + answer, before + after) == thought
    if thought:
        assert counter.count(reasoning[:-10], before[:4]) == 4, "cut off while it thinks"


def test_a_model_that_does_not_reason_has_no_counter():
    assert reasoning_counter(MessageFormat(), TokenTexts(load_tokenizer(resolve_model_path("demo")))) is None
