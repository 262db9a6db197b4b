"""Tools end to end: the built-in model calls a function, the test runs it, and the model answers from its result."""

import json

import httpx
import openai
import pydantic
import pytest

from jax_engine.models.demo.tasks_tools import TOOLS

SCHEMAS = {tool.name: tool.schema for tool in TOOLS}
FUNCTIONS = {
    "multiply": lambda a, b: {"result": a * b},
    "get_weather": lambda city: {"weather": "sunny", "degrees": 21},
}
SETTINGS = {"model": "demo", "temperature": 0, "max_tokens": 200}


def run(call) -> dict[str, str]:
    """What the function that the model calls returns, as a message."""
    result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
    return {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)}


@pytest.mark.parametrize(
    ("question", "tool", "answer"),
    [
        ("What is 312 times 7?", "multiply", "312 * 7 = 2184"),
        ("What is the weather in Paris?", "get_weather", "It is sunny in Paris with 21 degrees."),
    ],
)
def test_the_model_calls_a_function_and_answers_from_its_result(server, question, tool, answer):
    messages = [{"role": "user", "content": question}]
    offered = {**SETTINGS, "tools": [SCHEMAS[tool]]}
    first = server.client.chat.completions.create(messages=messages, **offered).choices[0]
    assert first.finish_reason == "tool_calls"
    assert first.message.content is None
    (call,) = first.message.tool_calls
    messages += [first.message, run(call)]
    second = server.client.chat.completions.create(messages=messages, **offered).choices[0]
    assert (second.message.content, second.finish_reason) == (answer, "stop")
    assert second.message.tool_calls is None


async def test_the_same_streamed_by_the_asynchronous_client(server):
    async with server.async_client as client:
        stream = await client.chat.completions.create(
            messages=[{"role": "user", "content": "What is 312 times 7?"}],
            tools=[SCHEMAS["multiply"]],
            stream=True,
            **SETTINGS,
        )
        choices = [chunk.choices[0] async for chunk in stream]
    pieces = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert "".join(choice.delta.content or "" for choice in choices) == ""
    assert [(piece.index, piece.function.name) for piece in pieces if piece.id] == [(0, "multiply")]
    arguments = [piece.function.arguments for piece in pieces]
    assert len(arguments) > 4, "they come as they are written"
    assert json.loads("".join(arguments)) == {"a": 312, "b": 7}
    assert choices[-1].finish_reason == "tool_calls"


def test_tools_that_are_not_offered_are_not_looked_for(server):
    settings = {"messages": [{"role": "user", "content": "What is 312 times 7?"}], **SETTINGS}
    choice = server.client.chat.completions.create(tools=[SCHEMAS["multiply"]], tool_choice="none", **settings).choices[
        0
    ]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
    assert "2184" in choice.message.content


def test_reasoning_can_be_left_out(server):
    settings = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], **SETTINGS}
    whole = (
        server.client.chat.completions.create(extra_body={"include_reasoning": False}, **settings).choices[0].message
    )
    assert (whole.content, whole.model_extra) == ("17 + 25 = 42", {})
    chunks = server.client.chat.completions.create(extra_body={"include_reasoning": False}, stream=True, **settings)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "17 + 25 = 42"
    assert not any(delta.model_extra for delta in deltas)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "color": {"enum": ["red", "green"]},
    },
    "required": ["name", "age", "color"],
    "additionalProperties": False,
}


def function(name: str, parameters: dict, **settings) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **settings}}


TICKET = function("book_ticket", {"type": "object", "properties": {"seat": {"type": "integer"}}, "required": ["seat"]})
REGISTER = function("register", PERSON)


def is_valid(call) -> bool:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "book_ticket":
        return isinstance(arguments["seat"], int)
    good = set(arguments) == {"name", "age", "color"} and len(arguments["name"]) <= 12
    return good and 18 <= arguments["age"] <= 99 and arguments["color"] in ("red", "green")


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "register"}}], ids=str)
def test_a_call_that_must_be_made_is_made_and_valid(server, choice, temperature):
    """The model knows neither function, and by itself would answer in words or with a function that it knows."""
    settings = {"model": "demo", "messages": [{"role": "user", "content": "What is 2 + 2?"}], "max_tokens": 120}
    settings |= {"tools": [TICKET, REGISTER], "tool_choice": choice, "temperature": temperature, "n": 2, "seed": 5}
    for settled in server.client.chat.completions.create(**settings).choices:
        if settled.finish_reason == "length":  # so many calls, or so long a number
            continue
        assert settled.finish_reason == "tool_calls"
        assert settled.message.content is None
        assert all(is_valid(call) for call in settled.message.tool_calls)
        if choice != "required":
            assert {call.function.name for call in settled.message.tool_calls} == {"register"}


def test_one_call_at_most(server):
    settings = {**SETTINGS, "messages": [{"role": "user", "content": "Hello"}], "tools": [REGISTER]}
    answer = server.client.chat.completions.create(
        tool_choice="required", parallel_tool_calls=False, stream=True, **settings
    )
    calls = [call for chunk in answer for call in chunk.choices[0].delta.tool_calls or ()]
    assert {call.index for call in calls} == {0}
    assert json.loads("".join(call.function.arguments for call in calls))["color"] in ("red", "green")


def test_a_strict_function_is_called_with_what_its_schema_allows_or_not_at_all(server):
    """Left to itself the model calls with a name as it stands in the question."""
    strict = function("get_weather", {"type": "object", "properties": {"city": {"enum": ["Rome"]}}}, strict=True)
    strict["function"]["parameters"] |= {"required": ["city"], "additionalProperties": False}
    settings = {**SETTINGS, "messages": [{"role": "user", "content": "What is the weather in Paris?"}]}
    loose = {"type": "function", "function": {**strict["function"], "strict": False}}
    said = {}
    for name, tool in {"strict": strict, "loose": loose}.items():
        (call,) = server.client.chat.completions.create(tools=[tool], **settings).choices[0].message.tool_calls
        said[name] = json.loads(call.function.arguments)
    assert said == {"strict": {"city": "Rome"}, "loose": {"city": "Paris"}}


def test_a_form_of_the_answer_leaves_room_for_calls(server):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    settings = {**SETTINGS, "messages": [{"role": "user", "content": "What is 312 times 7?"}], "response_format": form}
    called = server.client.chat.completions.create(tools=[SCHEMAS["multiply"]], **settings).choices[0]
    assert called.finish_reason == "tool_calls"
    assert json.loads(called.message.tool_calls[0].function.arguments) == {"a": 312, "b": 7}
    barred = {"tools": [SCHEMAS["multiply"]], "extra_body": {"logit_bias": {"6": -100}}}  # <tool_call>
    assert "n" in json.loads(server.client.chat.completions.create(**settings, **barred).choices[0].message.content)


@pytest.mark.parametrize(
    ("tool", "settings", "param", "words"),
    [
        (function("f", {"properties": {"a": {"type": "nonsense"}}}), {"tool_choice": "required"}, "tools", "'f'"),
        (function("f", {"properties": {"a": {"type": "nonsense"}}}, strict=True), {}, "tools", "'f'"),
        (REGISTER, {"tool_choice": "required", "use_beam_search": True, "max_tokens": 5}, "use_beam_search", "form"),
        (function("f", {}, strict=True), {"guided_grammar": 'start: "a"'}, "tool_choice", "grammar"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(server, tool, settings, param, words):
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TICKET, tool], **settings}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


class Sum(pydantic.BaseModel):
    result: int


class Multiply(pydantic.BaseModel):
    """Multiply two numbers."""

    a: int
    b: int


def test_parse_gives_objects_of_the_users_own_classes(server):
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    parse = server.client.chat.completions.parse
    assert isinstance(parse(messages=question, response_format=Sum, **SETTINGS).choices[0].message.parsed, Sum)
    tools = [openai.pydantic_function_tool(Multiply, name="multiply")]
    asked = [{"role": "user", "content": "What is 312 times 7?"}]
    settings = {**SETTINGS, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    (call,) = parse(messages=asked, **settings).choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Multiply)


SUM = [{"role": "user", "content": "What is 17 + 25?"}]


@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("stream", [False, True])
def test_thinking_ends_where_its_budget_does(server, budget, stream):
    """Exactly there, and the answer follows; beside requests without one."""
    free = {**SETTINGS, "messages": SUM, "logprobs": True}
    limited = {**free, "stream": stream, "extra_body": {"thinking_token_budget": budget}}
    answer = server.client.chat.completions.create(n=2, **limited)
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    tokens = [
        entry.token for choice in choices if choice.index == 0 and choice.logprobs for entry in choice.logprobs.content
    ]
    assert tokens.index("<think>") == 0
    assert tokens.index("</think>") == budget + 1
    assert tokens[-1] == "<|im_end|>"
    assert server.client.chat.completions.create(**free).choices[0].message.content == "17 + 25 = 42"


def test_a_budget_that_is_not_reached_changes_nothing(server):
    settings = {**SETTINGS, "messages": SUM}
    free, limited = (
        server.client.chat.completions.create(**settings, extra_body=extra).choices[0].message
        for extra in ({}, {"thinking_token_budget": 150})
    )
    assert (free.content, free.reasoning) == (limited.content, limited.reasoning)


def test_a_form_applies_after_the_thinking(server):
    settings = {**SETTINGS, "messages": SUM, "extra_body": {"guided_regex": r"17 \+ 25 = [0-9]{2} \."}}
    free = server.client.chat.completions.create(**{**settings, "extra_body": {}}).choices[0].message
    held = server.client.chat.completions.create(**settings).choices[0].message
    assert (held.content, held.reasoning) == ("17 + 25 = 42 .", free.reasoning)
    cut = server.client.chat.completions.create(
        **{**settings, "extra_body": {**settings["extra_body"], "thinking_token_budget": 2}}
    ).choices[0]
    assert cut.message.content.startswith("17 + 25 = ")
    assert cut.finish_reason == "stop"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "thinking_token_budget": 5}, "thinking_token_budget"),
        ("/v1/chat/completions", {"messages": SUM, "thinking_token_budget": -1}, "thinking_token_budget"),
        ("/v1/chat/completions", {"messages": SUM, "reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_what_does_not_go_with_thinking_is_refused_by_name(server, route, body, param):
    response = httpx.post(server.url + route, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
