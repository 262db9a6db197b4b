"""The real `anthropic` client against the real server."""

import json
from typing import Literal

import anthropic
import httpx
import pytest
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ASKING = {"model": "demo", "max_tokens": 256}  # the built-in model is greedy unless told otherwise
NO_TOKENS = {"output_tokens", "cache_read_input_tokens", "input_tokens"}


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def events(server, **body):
    """(name, data) of each event of a stream, as it was sent."""
    response = httpx.post(f"{server.url}/v1/messages", json={**ASKING, **body, "stream": True}, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    for part in response.text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_an_answer_has_its_thinking_and_its_text_in_blocks(claude):
    message = claude.messages.create(messages=QUESTION, **ASKING)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert "42" in message.content[1].text
    assert "<think>" not in message.content[1].text
    assert (message.role, message.type, message.model) == ("assistant", "message", "demo")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.id == f"msg_{message._request_id}"
    usage = message.usage
    counted = claude.messages.count_tokens(model="demo", messages=QUESTION).input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted
    assert usage.output_tokens > 0


def test_a_stream_is_the_same_message_in_events(claude, server):
    whole = claude.messages.create(messages=QUESTION, **ASKING)
    with claude.messages.stream(messages=QUESTION, **ASKING) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[-1].text
    kinds = ("type", "text", "thinking")
    shown = [[{kind: getattr(block, kind, None) for kind in kinds} for block in m.content] for m in (final, whole)]
    assert shown[0] == shown[1]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens

    sent = list(events(server, messages=QUESTION))
    assert all(data["type"] == name for name, data in sent)
    shape = [(name, data.get("index"), data.get("delta", {}).get("type")) for name, data in sent]
    merged = [item for number, item in enumerate(shape) if number == 0 or item != shape[number - 1]]
    assert merged == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert sent[0][1]["message"]["content"] == []
    assert sent[0][1]["message"]["usage"].keys() >= NO_TOKENS
    assert sent[-2][1]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_used(claude, streamed):
    def answer(messages):
        if not streamed:
            return claude.messages.create(messages=messages, tools=[TOOL], **ASKING)
        with claude.messages.stream(messages=messages, tools=[TOOL], **ASKING) as stream:
            return stream.get_final_message()

    calling = answer(WEATHER)
    assert calling.stop_reason == "tool_use"
    (call,) = [block for block in calling.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("get_weather", {"city": "Paris"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": '{"weather": "sunny", "degrees": 21}'}
    told = answer([*WEATHER, {"role": "assistant", "content": calling.content}, {"role": "user", "content": [result]}])
    assert told.stop_reason == "end_turn"
    assert "sunny" in told.content[-1].text
    assert "21" in told.content[-1].text


def test_a_tool_that_has_to_be_called_is_called(claude):
    choice = {"type": "any", "disable_parallel_tool_use": True}
    message = claude.messages.create(messages=QUESTION, tools=[TOOL], tool_choice=choice, **ASKING)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (call.name, call.input.keys()) == ("get_weather", {"city"})
    assert message.stop_reason == "tool_use"


def test_a_streamed_call_gives_its_input_in_pieces_of_json(server):
    sent = list(events(server, messages=WEATHER, tools=[TOOL]))
    (begun,) = [data for name, data in sent if data.get("content_block", {}).get("type") == "tool_use"]
    pieces = [
        data["delta"]["partial_json"]
        for name, data in sent
        if data.get("delta", {}).get("type") == "input_json_delta" and data["index"] == begun["index"]
    ]
    assert begun["content_block"]["input"] == {}
    assert len(pieces) > 1
    assert json.loads("".join(pieces)) == {"city": "Paris"}


async def test_the_asynchronous_client_streams(server):
    asking = anthropic.AsyncAnthropic(base_url=server.url, api_key="unused", max_retries=0)
    async with asking as client, client.messages.stream(messages=QUESTION, **ASKING) as stream:
        pieces = [text async for text in stream.text_stream]
    assert len(pieces) > 1
    assert "42" in "".join(pieces)


def test_why_an_answer_ended(claude):
    def ending(**settings):
        message = claude.messages.create(**{**ASKING, "messages": QUESTION, **settings})
        return message.stop_reason, message.stop_sequence

    assert ending(max_tokens=2) == ("max_tokens", None)
    assert ending(stop_sequences=["4"]) == ("stop_sequence", "4")
    endless = {"ignore_eos": True}
    prompt = [{"role": "user", "content": "word " * 2000}]
    assert ending(messages=prompt, max_tokens=10**6, extra_body=endless) == ("model_context_window_exceeded", None)


def test_an_answer_that_was_begun_goes_on(claude):
    begun = {"role": "assistant", "content": "The capital of France is"}
    counts = [
        claude.messages.count_tokens(model="demo", messages=messages) for messages in ([*QUESTION, begun], QUESTION)
    ]
    assert counts[0].input_tokens > counts[1].input_tokens
    message = claude.messages.create(messages=[*QUESTION, begun], **{**ASKING, "max_tokens": 1})
    assert message.usage.output_tokens == 1


def test_the_system_text_and_the_tools_are_counted(claude):
    def count(**settings):
        return claude.messages.count_tokens(model="demo", messages=QUESTION, **settings).input_tokens

    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert count() < count(system="Be brief.") == count(system=blocks)
    assert count() < count(tools=[TOOL])


def test_thinking_is_left_out_where_it_is_not_wanted(claude, server):
    for thinking in ({"type": "disabled"}, {"type": "adaptive", "display": "omitted"}):
        message = claude.messages.create(messages=QUESTION, thinking=thinking, **ASKING)
        assert [block.type for block in message.content] == ["text"]
    kinds = {data.get("delta", {}).get("type") for _, data in events(server, messages=QUESTION, thinking=thinking)}
    assert kinds == {None, "text_delta"}


def test_thinking_has_a_budget(claude):
    free = claude.messages.create(messages=QUESTION, thinking={"type": "adaptive"}, **ASKING)
    held = claude.messages.create(messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 5}, **ASKING)
    thoughts = [message.content[0].thinking for message in (free, held)]
    assert thoughts[0].startswith(thoughts[1])
    assert 0 < len(thoughts[1]) < len(thoughts[0])
    assert held.usage.output_tokens_details.thinking_tokens < free.usage.output_tokens_details.thinking_tokens
    assert held.content[-1].type == "text"


class Visit(BaseModel):
    city: Literal["Paris", "Rome"]
    far: bool


def test_an_answer_has_the_form_that_was_asked_for(claude):
    message = claude.messages.parse(messages=QUESTION, output_format=Visit, **ASKING)
    assert isinstance(message.parsed_output, Visit)


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://localhost/cat.png"}}
REFUSED = {
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type='image'"),
    "a server's tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools[0].type='web_search_",
    ),
    "no limit": ({"max_tokens": None}, "max_tokens"),
    "a call without its result": (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]},
        "its tool_result must follow",
    ),
    "a user's thinking": (
        {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "", "signature": ""}]}]},
        "belongs into a message of role 'assistant'",
    ),
    "an unknown field": ({"stop_sequence": ["a"]}, "did you mean 'stop_sequences'?"),
    "a bad stop sequence": ({"stop_sequences": [""]}, "stop_sequences"),
    "too high": ({"temperature": -1}, "temperature=-1"),
    "a negative budget": ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens=-1"),
    "an effort that the template does not read": ({"output_config": {"effort": "low"}}, "output_config.effort="),
    "a container": ({"container": "abc"}, 'container="abc" is not supported'),
    "too much": ({"messages": [{"role": "user", "content": "one two " * 5000}]}, "messages makes a prompt of"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_anthropics_words(server, case, stream):
    fields, words = REFUSED[case]
    body = {"max_tokens": 4, "messages": QUESTION, "stream": stream, **fields}
    response = httpx.post(f"{server.url}/v1/messages", json=body)
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert words in response.json()["error"]["message"]


def test_the_client_knows_our_errors(claude):
    with pytest.raises(anthropic.NotFoundError, match="'claude' does not exist") as caught:
        claude.messages.create(model="claude", max_tokens=1, messages=QUESTION)
    assert caught.value.request_id
