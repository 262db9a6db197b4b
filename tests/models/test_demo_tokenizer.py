"""The demo model's tokenizer and chat template, as they ship."""

import json
from functools import cache
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jax_engine.models.demo import DEMO_DIR
from jax_engine.models.demo.chat_template import CHAT_TEMPLATE, CONTROL_TOKENS, TEXT_TOKENS, render
from jax_engine.models.demo.generator import training_samples
from jax_engine.models.demo.packing import tokenize
from jax_engine.models.demo.samples import PLAIN_TEXT


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO_DIR)


def encode(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_round_trips(text: str):
    assert tokenizer().decode(encode(text)) == text


def test_digits_are_single_tokens():
    assert tokenizer().convert_ids_to_tokens(encode("1234567890")) == list("1234567890")


def test_letters_of_quoted_words_are_single_tokens():
    assert tokenizer().convert_ids_to_tokens(encode("garden")) == list("garden")
    assert tokenizer().convert_ids_to_tokens(encode("GARDEN")) == list("GARDEN")


def test_every_letter_has_a_token_with_and_without_a_space_before_it():
    for letter in "abcdefghijklmnopqrstuvwxyz":
        assert len(encode(letter)) == len(encode(f" {letter}")) == 1


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_tokens_are_left_out_of_decoded_text(token: str):
    assert tokenizer().decode([*encode("a"), *encode(token)], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("token", TEXT_TOKENS)
def test_reasoning_and_tool_tags_are_single_tokens_that_stay_in_the_text(token: str):
    assert len(encode(token)) == 1
    assert tokenizer().decode(encode(token), skip_special_tokens=True) == token


def test_plain_prompts_begin_with_the_begin_token_once():
    assert tokenizer()("Hello")["input_ids"] == [tokenizer().bos_token_id, *encode("Hello")]


def test_the_shipped_template_is_the_one_in_the_code():
    shipped = json.loads((DEMO_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    assert shipped == CHAT_TEMPLATE


def test_the_template_renders_what_training_saw():
    chats = (sample for sample in training_samples(seed=0) if sample.messages[0]["role"] != PLAIN_TEXT)
    for sample in islice(chats, 300):
        rendered = tokenizer().apply_chat_template(
            list(sample.messages), tools=list(sample.tools) or None, tokenize=False
        )
        assert rendered == "".join(span.text for span in render(sample))


def test_encoding_span_by_span_equals_encoding_the_whole():
    for sample in islice(training_samples(seed=1), 300):
        document = tokenize(tokenizer().backend_tokenizer, sample)
        assert [document.ids[0], *document.targets] == encode("".join(span.text for span in render(sample)))


def test_every_role_is_rendered():
    call = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Oslo"}}}
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What time is it in Oslo?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"time": "10:30"}'},
    ]
    tools = [{"type": "function", "function": {"name": "get_time"}}]
    text = tokenizer().apply_chat_template(conversation, tools=tools, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|bos|><|im_start|>system\nBe brief.\n\nYou can call these tools:\n<tools>\n"
        '{"type": "function", "function": {"name": "get_time"}}\n</tools>\n'
        'To call one, write:\n<tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWhat time is it in Oslo?<|im_end|>\n"
        "<|im_start|>assistant\n<tool_call>\n"
        '{"name": "get_time", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>tool\n<tool_response>\n{"time": "10:30"}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n"
    )


def test_arguments_given_as_json_text_are_rendered_as_they_are():
    function = {"name": "get_time", "arguments": '{"city":"Oslo"}'}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    text = tokenizer().apply_chat_template([{"role": "user", "content": "Time?"}, call], tokenize=False)
    assert '<tool_call>\n{"name": "get_time", "arguments": {"city":"Oslo"}}\n</tool_call>' in text


def test_reasoning_of_earlier_turns_is_dropped():
    conversation = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\n2+2+0=4\n</think>\n\n2 + 2 = 4"},
        {"role": "user", "content": "Thanks"},
    ]
    text = tokenizer().apply_chat_template(conversation, tokenize=False)
    assert "<|im_start|>assistant\n2 + 2 = 4<|im_end|>" in text


def test_an_unknown_role_is_refused():
    with pytest.raises(Exception, match="message role must be system, user, assistant or tool, not judge"):
        tokenizer().apply_chat_template([{"role": "judge", "content": "?"}], tokenize=False)
