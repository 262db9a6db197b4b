"""Structural tags: what a format lets a model write, token by token."""

import pytest

from jax_engine import StructuredOutputsParams
from jax_engine.core.messages import Vocabulary
from jax_engine.frontend.tokenizer import Tokenizer, load_tokenizer
from jax_engine.grammar.grammars import grammar_text, new_matcher, special_token_ids
from jax_engine.loading.model_files import resolve_model_path

CALL = {
    "type": "tag",
    "begin": "<tool_call>\n",
    "content": {"type": "json_schema", "json_schema": {"enum": [1]}},
    "end": "</tool_call>",
}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
NUMBER = {"type": "tag", "begin": "<b>", "content": {"type": "regex", "pattern": "[0-9]/"}, "end": "</b>"}
ONE = "<tool_call>\n1</tool_call>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_model_path("demo"))


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer.as_json(), 1024, (3,))


def triggered(*tags, **settings):
    return {"type": "triggered_tags", "triggers": ["<tool_call>", "<a>"], "tags": list(tags), **settings}


def separated(*tags, **settings):
    return {"type": "tags_with_separator", "tags": list(tags), "separator": ";", **settings}


@pytest.mark.parametrize(
    ("form", "whole", "cut", "wrong"),
    [
        ({"type": "const_string", "value": 'a"\n</think>'}, ['a"\n</think>'], ['a"'], ["b"]),
        (
            {"type": "sequence", "elements": [TAG, NUMBER]},
            ["<a>x</</a><b>1/</b>"],
            ["<a>x", "<a></a><b>"],
            ["<a></a>x"],
        ),
        ({"type": "or", "elements": [CALL, {"type": "any_text"}]}, [ONE, "text <b>"], ["<tool_call>"], [ONE + "x"]),
        (triggered(CALL, TAG), ["", "text", f"a{ONE}b{ONE}", "<a>x</a>"], ["x<tool_call>"], ["<tool_call>\n2"]),
        (triggered(CALL, at_least_one=True), [ONE, f"a{ONE}b"], ["text"], []),
        (triggered(CALL, stop_after_first=True), ["text", f"a{ONE}"], [], [f"{ONE}x"]),
        (triggered(CALL, at_least_one=True, stop_after_first=True), [f"a{ONE}"], ["text"], [f"{ONE}x"]),
        (separated(CALL, NUMBER), ["", ONE, f"<b>1/</b>;{ONE}"], [f"{ONE};"], ["x", f"{ONE}{ONE}"]),
        (separated(CALL, at_least_one=True, stop_after_first=True), [ONE], [""], [f"{ONE};"]),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_what_a_format_allows(form, whole, cut, wrong, tokenizer, vocabulary):
    """Also where tags are tokens of their own, which are no text to a grammar."""
    params = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": form})
    grammar = grammar_text(params, special_token_ids(vocabulary))
    for text in (*whole, *cut, *wrong):
        matcher = new_matcher(grammar, vocabulary)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert (matcher.try_consume_tokens(ids) == len(ids)) is (text not in wrong), text
        assert matcher.is_accepting() is (text in whole) or text in wrong, text


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "nothing"}, "format must be an object whose type is one of"),
        ({"type": "or", "elements": []}, "format.elements must be a list of at least one entry"),
        ({"type": "or", "elements": [{"type": "const_string"}]}, r"format.elements\[0\].value must be a string"),
        ({"type": "tag", "begin": "a"}, "format must have begin, content, end"),
        (triggered({**TAG, "begin": "<c>"}), r"format.tags\[0\] begins with '<c>', and with none of the triggers"),
        ({"type": "json_schema", "json_schema": []}, "format.json_schema must be an object"),
    ],
)
def test_a_description_of_another_form_is_refused(form, words):
    params = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": form})
    with pytest.raises(ValueError, match=words):
        grammar_text(params, {})
