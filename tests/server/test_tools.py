"""Tools end to end: the built-in model calls a function, the test runs it, and the model answers from its result."""

import json

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
