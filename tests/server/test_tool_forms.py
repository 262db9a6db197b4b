"""The form that a model is held to when it must call: each parser reads back what the form allows, and it is valid."""

import json
import random

import pytest

from jax_engine import StructuredOutputsParams
from jax_engine.core.messages import Vocabulary
from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.grammar.bitmasks import ids_of
from jax_engine.grammar.grammars import grammar_text, make_mask, new_matcher, special_token_ids
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.server.errors import ApiError
from jax_engine.server.openai.message_parts import MessageFormat, whole_message
from jax_engine.server.parsers.names import TOOL_PARSERS
from jax_engine.server.parsers.schema_values import types_of

TRIP = {
    "type": "object",
    "properties": {
        "sure": {"type": "boolean"},
        "city": {"enum": ["Paris", 'a "b"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 30},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"tag": {"enum": [True, None, "x"]}},
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = (("plan_trip", TRIP), ("get_time", NOTHING))
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS]
TOKENIZER = load_tokenizer(resolve_model_path("demo"))
EOS = 3


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(TOKENIZER.as_json(), 1024, (EOS,))


def walks(vocabulary: Vocabulary, form: dict, count: int) -> list[str]:
    """Texts of tokens drawn at random among those that a form allows, to their ends."""
    params = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": form})
    start = new_matcher(grammar_text(params, special_token_ids(vocabulary)), vocabulary)
    blank = {TOKENIZER.encode(text, add_special_tokens=False)[0] for text in (" ", "\n", "\t", "\r", "  ", "\n\n")}
    texts = []
    for seed in range(count):
        matcher, rng, tokens = start.deep_copy(), random.Random(seed), []
        while True:
            allowed = [int(token) for token in ids_of(make_mask(matcher, vocabulary.size))]
            if EOS in allowed and (len(allowed) == 1 or rng.random() < 0.5):
                break
            allowed = [token for token in allowed if token != EOS]
            told = [token for token in allowed if token not in blank] or allowed
            tokens.append(rng.choice(told))
            assert matcher.consume_token(tokens[-1])
            assert len(tokens) < 2000
        texts.append(TOKENIZER.decode(tokens))
    return texts


def is_valid(name: str, arguments: dict) -> bool:
    if name == "get_time":
        return arguments == {}
    right = arguments["city"] in ("Paris", 'a "b"') and 1 <= arguments["days"] <= 30
    right = right and arguments.get("sure", True) in (True, False)
    return right and all(tag in (True, None, "x") for tag in arguments.get("tags", []))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_calls_that_the_form_allows_are_read_back_and_valid(name, parallel, vocabulary):
    parser, called = TOOL_PARSERS[name], set()
    for text in walks(vocabulary, parser.calls(SCHEMAS, parallel=parallel), 12):
        message = whole_message(MessageFormat(tool_parser=parser, tools=TOOLS).parser().finish(text))
        assert message.content == "", text
        assert message.tool_calls, text
        assert parallel or len(message.tool_calls) == 1, text
        assert all(is_valid(call.name, json.loads(call.arguments)) for call in message.tool_calls), text
        called |= {call.name for call in message.tool_calls}
    assert called == {"plan_trip", "get_time"}


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_text_is_free_where_a_call_may_be_made(name, vocabulary):
    params = StructuredOutputsParams(
        structural_tag={"type": "structural_tag", "format": TOOL_PARSERS[name].text_and_calls(SCHEMAS, parallel=True)}
    )
    grammar = grammar_text(params, special_token_ids(vocabulary))
    call = TOOL_PARSERS[name].calls(SCHEMAS[1:], parallel=True)
    for text, ends in (("", True), ("Some text, (as such) {1}.", True), (walks(vocabulary, call, 1)[0], True)):
        matcher = new_matcher(grammar, vocabulary)
        assert matcher.consume_tokens(TOKENIZER.encode(text, add_special_tokens=False)), text
        assert matcher.is_accepting() is ends, text


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "number"}, {"type": "null"}, True]}, {"number", "null"}),
        ({"type": 5, "anyOf": "x", "oneOf": [{"type": [[]]}]}, set()),
        (True, set()),
        (None, set()),
    ],
)
def test_the_types_that_a_schema_speaks_of(schema, types):
    assert types_of(schema) == types


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("qwen3_coder", {"properties": {"a": {"type": "string", "pattern": "x"}}}),
        ("qwen3_coder", {"properties": {}, "minProperties": 1}),
        ("pythonic", {"allOf": []}),
    ],
)
def test_what_a_form_cannot_say_of_arguments_is_refused(name, schema):
    with pytest.raises(ApiError, match="the parameters of the tool 'f' cannot be enforced in the form") as caught:
        TOOL_PARSERS[name].call("f", schema)
    assert caught.value.status == 400
