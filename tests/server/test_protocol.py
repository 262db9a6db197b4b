"""What a body may say, without an engine."""

import json
from dataclasses import replace

import pytest

from jax_engine.frontend.beam_search import BeamSearchParams
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.forms import FormFields
from jax_engine.server.openai.protocol import (
    NEUTRAL,
    WITHOUT_EFFECT,
    ChatCompletionRequest,
    CompletionRequest,
    PlainRequest,
    SamplingFields,
)

DEFAULTS = SamplingParams()
USER = {"role": "user", "content": "hi"}


def completion(**fields):
    return CompletionRequest.from_body(json.dumps({"prompt": "a", **fields}).encode())


def chat(**fields):
    return ChatCompletionRequest.from_body(json.dumps({"messages": [USER], **fields}).encode())


def refusal(make, **fields):
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    return caught.value


def test_every_field_is_of_sampling_neutral_harmless_or_used_by_name():
    """A field in none of these groups would be accepted and ignored."""
    used = {"model", "stream", "stream_options", "prompt", "messages", "best_of", "add_special_tokens", "cache_salt"}
    used |= {"priority", "vllm_xargs", "tools", "tool_choice", "max_completion_tokens", "echo", "top_logprobs"}
    used |= {"parallel_tool_calls", "include_reasoning", "reasoning_effort", "chat_template"}
    used |= {"return_token_ids", "use_beam_search", "length_penalty", "early_stopping"}
    used |= {"add_generation_prompt", "continue_final_message", "chat_template_kwargs"}
    groups = used | set(NEUTRAL) | set(WITHOUT_EFFECT) | set(SamplingFields.__struct_fields__)
    fields = {*CompletionRequest.__struct_fields__, *ChatCompletionRequest.__struct_fields__}
    assert fields == groups


def test_sampling_fields_are_those_of_sampling_params():
    own = {*SamplingParams.__dataclass_fields__} - {"output_kind", "reasoning"}
    other_names = {*FormFields.__struct_fields__} - {"structured_outputs"}
    assert set(SamplingFields.__struct_fields__) - other_names == own


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_feature_that_is_not_there_is_refused_unless_it_is_off(name):
    make = completion if name in CompletionRequest.__struct_fields__ else chat
    for value in (None, *NEUTRAL[name]):
        make(**{name: value})
    error = refusal(make, **{name: {"something": "else"}})
    assert error.param == name
    assert error.code == "unsupported_parameter"
    assert f"{name}=" in error.message


def test_true_is_not_one_and_zero_is_not_false():
    assert refusal(completion, store=0).param == "store"
    assert refusal(chat, logprobs=0).param == "logprobs"
    assert refusal(completion, logprobs=False).param == "logprobs"


def test_logprobs_are_a_number_in_completions_and_a_switch_with_a_number_in_chats():
    def asked(made):
        params = made.sampling_params(DEFAULTS)
        return params.logprobs, params.prompt_logprobs

    assert asked(completion()) == (None, None)
    assert asked(completion(logprobs=0)) == (0, None)
    assert asked(completion(logprobs=3, prompt_logprobs=1)) == (3, 1)
    assert asked(completion(logprobs=3, echo=True)) == (3, 3), "an echoed prompt has them too"
    assert asked(completion(echo=True)) == (None, None)
    assert asked(chat(logprobs=True)) == (0, None)
    assert asked(chat(logprobs=True, top_logprobs=4, prompt_logprobs=2)) == (4, 2)
    assert asked(chat(logprobs=False)) == asked(chat(top_logprobs=0)) == (None, None)
    assert "needs logprobs=true" in refusal(chat, top_logprobs=4).message
    assert refusal(chat, echo=True).param == "echo"
    assert asked(completion(prompt_logprobs=1, stream=True)) == (None, 1)
    assert asked(completion(best_of=3)) == (0, None), "which are the best is seen from them"


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_bookkeeping_is_accepted(name):
    assert chat(**{name: "anything"}).sampling_params(DEFAULTS) == chat().sampling_params(DEFAULTS)


def test_a_beam_search_takes_what_acts_on_it_and_nothing_else():
    def search(form=completion, **fields):
        asked = form(**fields)
        return asked.beam_search_params(asked.sampling_params(DEFAULTS))

    assert search() is search(use_beam_search=False) is None
    expected = BeamSearchParams(beam_width=3, max_tokens=5, length_penalty=2.0, early_stopping="never")
    given = {"n": 3, "max_tokens": 5, "length_penalty": 2, "early_stopping": "never", "top_p": 1, "temperature": 0}
    assert search(use_beam_search=True, **given) == search(form=chat, use_beam_search=True, **given) == expected
    for field in ({"top_k": 5}, {"temperature": 0.5}, {"logprobs": 1}, {"stop": "a"}, {"seed": 1}):
        (name,) = field
        assert refusal(search, use_beam_search=True, n=2, **field).param == name
    assert refusal(search, length_penalty=2).param == "length_penalty"
    assert search(length_penalty=1, early_stopping=False) is None, "what a search would do by itself"
    assert refusal(search, use_beam_search=True, early_stopping="soon").param == "early_stopping"
    assert refusal(search, form=chat, use_beam_search=True).param == "max_tokens"


def test_null_takes_the_models_default():
    base = SamplingParams(temperature=0.6, top_k=20)
    params = completion(temperature=None, top_k=5, stop=None).sampling_params(base)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.6, 5, 16)


def test_chat_goes_on_to_the_end_of_the_context_unless_limited():
    assert chat().sampling_params(DEFAULTS).max_tokens is None
    assert chat(max_tokens=5).sampling_params(DEFAULTS).max_tokens == 5
    assert chat(max_completion_tokens=6).sampling_params(DEFAULTS).max_tokens == 6
    assert chat(max_completion_tokens=6, max_tokens=6).sampling_params(DEFAULTS).max_tokens == 6
    assert "differ" in refusal(chat, max_completion_tokens=6, max_tokens=5).message
    with pytest.raises(ApiError, match="max_tokens=0"):
        chat(max_completion_tokens=0).sampling_params(DEFAULTS)


def test_output_kind_follows_stream():
    assert completion(stream=True).sampling_params(DEFAULTS).output_kind is RequestOutputKind.DELTA
    assert completion().sampling_params(DEFAULTS).output_kind is RequestOutputKind.FINAL_ONLY


def test_best_of_chooses_among_more_completions():
    assert completion(best_of=1).sampling_params(DEFAULTS).n == 1
    assert completion(best_of=3, n=3).sampling_params(DEFAULTS).logprobs is None, "nothing is chosen"
    assert completion(best_of=3, n=2).sampling_params(DEFAULTS).n == 3
    for fields in ({"n": 3}, {"stream": True}, {"echo": True}, {"use_beam_search": True, "max_tokens": 3}):
        assert refusal(completion, best_of=2, **fields).param == "best_of"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"max_token": 1}, "max_token", "did you mean 'max_tokens'?"),
        ({"zzzz": 1}, "zzzz", "unknown parameter 'zzzz'"),
        ({"stream": True, "stream_options": {"include_use": True}}, "stream_options.include_use", "'include_usage'"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
        ({"cache_salt": ""}, "cache_salt", "must be a non-empty string"),
        ({"cache_salt": 5}, "cache_salt", "got `int`"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", "expected `int`, got `str`"),
        ({"n": 1.5}, "n", "got `float`"),
        ({"priority": "high"}, "priority", "got `str`"),
        ({"n": True}, "n", "got `bool`"),
    ],
)
def test_wrong_fields_are_named(fields, param, words):
    error = refusal(completion, **fields)
    assert error.param == param
    assert words in error.message


def test_a_salt_goes_with_every_prompt():
    assert completion(prompt=["a", "b"], cache_salt="s").prompts() == [
        {"prompt": "a", "cache_salt": "s"},
        {"prompt": "b", "cache_salt": "s"},
    ]
    assert completion(prompt=[1, 2], cache_salt="s").prompts() == [{"prompt_token_ids": [1, 2], "cache_salt": "s"}]
    assert completion(prompt="a", cache_salt=None).prompts() == ["a"]


def test_missing_fields_are_named():
    with pytest.raises(ApiError, match="prompt is required"):
        CompletionRequest.from_body(b"{}")
    with pytest.raises(ApiError, match="messages is required"):
        ChatCompletionRequest.from_body(b"{}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"prompt": "a"', "not valid JSON"),
        (b'{"prompt": "a"} x', "not valid JSON"),
        (b'"prompt"', "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature: number out of range"),
        (b'{"prompt": NaN', "not valid JSON"),
        (b'{"prompt": "a", "suffix": NaN, "temprature": 1}', "did you mean 'temperature'?"),
    ],
)
def test_broken_bodies(body, words):
    with pytest.raises(ApiError) as caught:
        CompletionRequest.from_body(body)
    assert words in caught.value.message


def test_nan_and_infinity_are_named():
    for text in ("NaN", "Infinity", "-Infinity"):
        asked = CompletionRequest.from_body(f'{{"prompt": "a", "temperature": {text}}}'.encode())
        with pytest.raises(ApiError) as caught:
            asked.sampling_params(DEFAULTS)
        assert caught.value.param == "temperature"


def test_prompt_forms():
    assert completion(prompt="a").prompts() == ["a"]
    assert completion(prompt=["a", "b"]).prompts() == ["a", "b"]
    assert completion(prompt=[1, 2]).prompts() == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompts() == [[1], [2, 3]]
    assert completion(prompt=["a", [1]]).prompts() == ["a", [1]]
    bare = completion(prompt=["a", [1]], add_special_tokens=False).prompts()
    assert bare == [{"prompt": "a", "add_special_tokens": False}, [1]]


@pytest.mark.parametrize("prompt", [None, [], 5, {}, [True], [1, "a"], [[1], [None]], [1.5]])
def test_anything_else_is_no_prompt(prompt):
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt).prompts()
    assert caught.value.param == "prompt"


def test_tools_are_rendered_or_left_out():
    tool = {"type": "function", "function": {"name": "f"}}
    assert chat(tools=[tool]).template_arguments()["tools"] == [tool]
    assert chat(tools=[tool], tool_choice="auto").template_arguments()["tools"] == [tool]
    assert chat(tools=[tool], tool_choice="none").template_arguments()["tools"] is None
    assert chat(tools=[]).template_arguments()["tools"] is None


def test_a_tool_choice_says_which_functions_may_or_must_be_called():
    tools = [{"type": "function", "function": {"name": name}} for name in "fgh"]
    named = {"type": "function", "function": {"name": "g"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tools[2], tools[0]]}}

    def chosen(tools, choice):
        choice = chat(tools=tools, tool_choice=choice).choice()
        return choice.mode, "".join(function["name"] for function in choice.functions)

    assert chosen(tools, None) == chosen(tools, "auto") == ("auto", "fgh")
    assert chosen(tools, "required") == ("required", "fgh")
    assert chosen(tools, named) == ("required", "g")
    assert chosen(tools, allowed) == ("auto", "hf")
    assert chosen(tools, "none") == chosen(None, "auto") == chosen([], None) == ("none", "")
    unknown = {"type": "function", "function": {"name": "nowhere"}}
    for choice in (unknown, "always", {"type": []}, {"type": "function", "function": {"name": []}}, {}):
        assert refusal(chat, tools=tools, tool_choice=choice).param == "tool_choice"
    for choice in ("required", named, allowed):
        assert "no tools" in refusal(chat, tool_choice=choice).message


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({}, "tools[0].type"),
        ({"type": "custom"}, "tools[0].type"),
        ({"type": "function", "function": {}}, "tools[0].function"),
        ({"type": "function", "function": {"name": ""}}, "tools[0].function"),
        ({"type": "function", "function": {"name": "f", "strict": "yes"}}, "tools[0].function.strict"),
        ({"type": "function", "function": {"name": "f", "parameters": []}}, "tools[0].function.parameters"),
        (
            {"type": "function", "function": {"name": "f", "parameters": {"properties": [1]}}},
            "tools[0].function.parameters.properties",
        ),
        (
            {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 1}}}},
            "tools[0].function.parameters.properties",
        ),
        (
            {"type": "function", "function": {"name": "f", "parameters": {"required": "a"}}},
            "tools[0].function.parameters.required",
        ),
        (
            {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}},
            "tools[0].function.parameters",
        ),
    ],
)
def test_bad_tools_are_named(tool, param):
    with pytest.raises(ApiError) as caught:
        chat(tools=[tool]).template_arguments()
    assert caught.value.param == param


def test_generation_prompt_gives_way_to_a_message_to_continue():
    assert chat().template_arguments()["add_generation_prompt"] is True
    assert chat(continue_final_message=True).template_arguments()["add_generation_prompt"] is False
    assert chat(add_generation_prompt=False).template_arguments()["add_generation_prompt"] is False
    assert refusal(chat, continue_final_message=True, add_generation_prompt=True).param == "continue_final_message"


def test_a_message_needs_content_or_tool_calls():
    with pytest.raises(ApiError) as caught:
        chat(messages=[USER, {"role": "user", "content": None}]).conversation()
    assert caught.value.param == "messages[1].content"


def test_plain_request_takes_sampling_parameters_in_either_place_but_not_both():
    def plain(**fields):
        asked = PlainRequest.from_body(json.dumps({"prompt": "a", **fields}).encode())
        return asked.params(DEFAULTS, stream=False)

    assert plain(top_k=3, sampling_params={"min_p": 0.1, "max_tokens": None}) == plain(top_k=3, min_p=0.1)
    assert refusal(plain, top_k=3, sampling_params={"top_k": 4}).param == "top_k"
    assert "did you mean 'top_k'" in refusal(plain, sampling_params={"top_kk": 4}).message
    assert refusal(plain, suffix="").param == "suffix"


CONTROLS = {
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.2,
    "logit_bias": {"7": -100, "8": 2.5},
    "allowed_token_ids": [7, 8],
    "bad_words": ["never"],
    "extra_args": {"strength": 2},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_what_changes_logits_is_taken_by_every_route(name):
    expected = replace(DEFAULTS, **{name: CONTROLS[name]})
    for make in (completion, chat):
        assert getattr(make(**{name: CONTROLS[name]}).sampling_params(DEFAULTS), name) == getattr(expected, name)
    plain = PlainRequest.from_body(json.dumps({"prompt": "a", name: CONTROLS[name]}).encode())
    assert getattr(plain.params(DEFAULTS, stream=False), name) == getattr(expected, name)


def test_arguments_of_processors_have_vllms_name_too():
    assert chat(vllm_xargs={"strength": 2}).sampling_params(DEFAULTS).extra_args == {"strength": 2}
    assert refusal(chat, vllm_xargs={"a": 1}, extra_args={"a": 1}).param == "vllm_xargs"
    assert (
        refusal(lambda **given: chat(**given).sampling_params(DEFAULTS), logit_bias={"7": 101}).param == "logit_bias[7]"
    )


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature=-1 must be positive", "temperature"),
        ("messages[2].content has a part of type 'image_url'", "messages[2].content"),
        ("prompt is empty; give one", "prompt"),
        ("the chat template failed", None),
    ],
)
def test_param_is_the_field_that_a_message_begins_with(message, param):
    assert bad_request(ValueError(message)).param == param
