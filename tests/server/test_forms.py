"""The form of an answer, by whichever name a client gives it."""

import json

import pytest

from jax_engine import SamplingParams, StructuredOutputsParams
from jax_engine.server.errors import ApiError
from jax_engine.server.openai.protocol import ChatCompletionRequest, PlainRequest

DEFAULTS = SamplingParams()
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAGS = {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f>"]}


def form(**fields) -> StructuredOutputsParams | None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()
    return ChatCompletionRequest.from_body(body).sampling_params(DEFAULTS).structured_outputs


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"response_format": {"type": "structural_tag"} | TAGS}, {"structural_tag": {"type": "structural_tag"} | TAGS}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},) * 2,
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": json.dumps(SCHEMA)}, {"json": json.dumps(SCHEMA)}),
        ({"guided_regex": "a+", "guided_decoding_backend": "guidance"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
        ({"structural_tag": json.dumps(TAGS)}, {"structural_tag": json.dumps(TAGS)}),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            {"json": SCHEMA, "whitespace_pattern": " ?"},
        ),
    ],
)
def test_every_name_of_a_form(fields, expected):
    expected = expected and expected.get("structured_outputs", expected)
    assert form(**fields) == (expected and StructuredOutputsParams(**expected))


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "guided_regex and guided_choice each give"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "drop all but one"),
        ({"response_format": {"type": "yaml"}}, "response_format", "must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format", "must be"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "skema": 1}}},
            "response_format.json_schema.skema",
            "unknown parameter",
        ),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs", "the field 'jsn'"),
        ({"structured_outputs": {}}, "structured_outputs", "none of its forms"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
        ({"structured_outputs": {"regex": 7}}, "structured_outputs.regex", "must be a string"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least one string"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}}, None, "is for JSON"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, None, "is for JSON with whitespace"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "needs guided_json"),
        ({"guided_regex": "a", "guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not supported"),
        ({"guided_regex": "a" * 20_000}, "structured_outputs.regex", "at most 16384"),
    ],
)
def test_what_is_no_form_is_a_400(fields, param, message):
    with pytest.raises(ApiError, match=message) as caught:
        form(**fields)
    assert caught.value.status == 400
    assert param is None or caught.value.param == param


def test_plain_routes_take_forms_in_both_places():
    def params(**fields):
        body = json.dumps({"prompt": "a", **fields}).encode()
        return PlainRequest.from_body(body).params(DEFAULTS, stream=False).structured_outputs

    assert params(guided_regex="a") == params(sampling_params={"structured_outputs": {"regex": "a"}})
    with pytest.raises(ApiError, match="both beside and inside"):
        params(guided_regex="a", sampling_params={"guided_regex": "a"})
