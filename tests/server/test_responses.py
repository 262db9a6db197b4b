"""OpenAI's Responses API: the real `openai` client against the real server."""

import json
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

QUESTION = "What is 17 + 25?"
WEATHER = "What is the weather in Paris?"
TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
ENDLESS = {"input": "Tell me a story.", "max_output_tokens": 1500, "ignore_eos": True}


def create(server, **settings):
    return server.client.responses.create(**{"model": "demo", "input": QUESTION, "temperature": 0, **settings})


def post(server, **body):
    return httpx.post(f"{server.url}/v1/responses", json={"input": QUESTION, **body}, timeout=60)


def without_ids(items):
    return [item.model_dump(exclude={"id", "call_id"}) for item in items]


def test_an_answer_has_its_reasoning_and_its_text_in_items(server):
    answer = create(server, metadata={"topic": "sums"}, user="me", instructions="Be right.", max_output_tokens=300)
    reasoning, message = answer.output
    assert (reasoning.type, message.type) == ("reasoning", "message")
    assert reasoning.content[0].text
    assert "42" in answer.output_text
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.object, answer.model, answer.store, answer.background) == ("response", "demo", True, False)
    assert (answer.metadata, answer.user, answer.instructions) == ({"topic": "sums"}, "me", "Be right.")
    assert (answer.temperature, answer.max_output_tokens, answer.truncation) == (0, 300, "disabled")
    assert answer.text.format.type == "text"
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens >= 0
    assert answer.completed_at >= answer.created_at


def test_a_stream_is_the_same_answer_in_numbered_events(server):
    whole = create(server)
    events = list(create(server, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    merged = [kind for number, kind in enumerate(kinds) if number == 0 or kind != kinds[number - 1]]
    assert merged == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    first, last = events[0].response, events[-1].response
    assert (first.status, first.output, first.usage) == ("in_progress", [], None)
    assert (last.id, last.status) == (first.id, "completed")
    assert without_ids(last.output) == without_ids(whole.output)
    assert last.usage.output_tokens == whole.usage.output_tokens
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    added = [event for event in events if event.type == "response.output_item.added"]
    assert [event.output_index for event in added] == [0, 1]
    assert [event.item.id for event in added] == [item.id for item in last.output]
    for event in events:
        if event.type.endswith((".delta", ".done")) and "item_id" in event.model_fields_set:
            assert event.item_id == last.output[event.output_index].id


def test_the_clients_own_stream_helper(server):
    with server.client.responses.stream(model="demo", input=QUESTION) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(pieces) == final.output_text
    assert "42" in final.output_text


async def test_the_asynchronous_client(server):
    async with server.async_client as client:
        answer = await client.responses.create(model="demo", input=QUESTION)
        assert "42" in answer.output_text
        streamed = await client.responses.create(model="demo", input=QUESTION, stream=True)
        *_, last = [event async for event in streamed]
    assert last.response.output_text == answer.output_text


@pytest.mark.parametrize("stored", [True, False])
def test_a_function_is_called_and_its_result_used(server, stored):
    """A stored turn is continued by its id; of one that is not, the client sends all items again."""
    turn = [{"role": "user", "content": WEATHER}]
    calling = create(server, input=turn, tools=[TOOL], store=stored)
    call = calling.output[-1]
    assert (call.type, call.status, call.name) == ("function_call", "completed", "get_weather")
    assert json.loads(call.arguments) == {"city": "Paris"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny", "degrees": 21}'}
    if stored:
        told = create(server, input=[result], tools=[TOOL], previous_response_id=calling.id)
        listed = server.client.responses.input_items.list(told.id, order="asc").data
        assert [item.type for item in listed] == ["message", *(item.type for item in calling.output), result["type"]]
    else:
        told = create(server, input=[*turn, *calling.output, result], tools=[TOOL], store=False)
        with pytest.raises(openai.NotFoundError, match="it was not stored"):
            server.client.responses.retrieve(told.id)
    assert "sunny" in told.output_text
    assert "21" in told.output_text


RAIN = TOOL | {"name": "will_it_rain"}


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "will_it_rain"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "will_it_rain"}]},
    ],
    ids=["named", "allowed"],
)
def test_a_function_that_has_to_be_called_is_called(server, choice):
    answer = create(server, tools=[TOOL, RAIN], tool_choice=choice, max_output_tokens=200)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "will_it_rain"
    assert json.loads(call.arguments).keys() == {"city"}


def test_reasoning_is_handed_back_unseen(server):
    first = create(server, input="What is 5 + 6?", include=["reasoning.encrypted_content"], store=False)
    reasoning, message = first.output
    unseen = {"type": "reasoning", "summary": [], "id": reasoning.id, "encrypted_content": reasoning.encrypted_content}
    turns = [{"role": "user", "content": "What is 5 + 6?"}, None, message, {"role": "user", "content": QUESTION}]
    counts = []
    for item in (reasoning.to_dict(), unseen, {**unseen, "encrypted_content": None}):
        turns[1] = item
        counts.append(create(server, input=turns, store=False, max_output_tokens=1).usage.input_tokens)
    assert counts[0] == counts[1]
    assert create(server, input=QUESTION).output[0].encrypted_content is None


def test_a_streamed_call_gives_its_arguments_in_pieces(server):
    events = list(create(server, input=WEATHER, tools=[TOOL], stream=True))
    pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert len(pieces) > 1
    assert "".join(piece.delta for piece in pieces) == done.arguments
    assert json.loads(done.arguments) == {"city": "Paris"}
    assert events[-1].response.output[-1].arguments == done.arguments


def test_a_turn_goes_on_from_the_one_before(server):
    first = create(server, input="My name is Anna.")
    second = create(server, input="What is my name?", previous_response_id=first.id)
    assert "Anna" in second.output_text
    assert second.previous_response_id == first.id
    again = create(
        server,
        input=[
            {"role": "user", "content": "My name is Anna."},
            *first.output,
            {"role": "user", "content": "What is my name?"},
        ],
    )
    assert again.usage.input_tokens == second.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, previous_response_id="resp_none")
    assert caught.value.code == "previous_response_not_found"


def test_a_stored_response_is_read_listed_and_deleted(server):
    answer = create(server, input=[{"role": "user", "content": f"Number {number}"} for number in range(3)])
    assert server.client.responses.retrieve(answer.id) == answer
    page = server.client.responses.input_items.list(answer.id, limit=2)
    assert [item.content[0].text for item in page.data] == ["Number 2", "Number 1"]
    assert [item.content[0].text for item in page] == ["Number 2", "Number 1", "Number 0"]
    assert page.has_more
    with pytest.raises(openai.BadRequestError, match="background=true"):
        server.client.responses.cancel(answer.id)
    server.client.responses.delete(answer.id)
    for gone in (server.client.responses.retrieve, server.client.responses.delete, server.client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            gone(answer.id)
    page = httpx.get(f"{server.url}/v1/responses/{answer.id}/input_items?limit=1000")
    assert (page.status_code, page.json()["error"]["param"]) == (400, "limit")


def test_an_answer_in_the_background_is_asked_for_later(server):
    begun = create(server, background=True)
    assert begun.status in ("queued", "in_progress")
    server.wait_for(lambda: server.client.responses.retrieve(begun.id).status == "completed", what="completion")
    answer = server.client.responses.retrieve(begun.id)
    assert (answer.id, answer.background) == (begun.id, True)
    assert answer.output_text == create(server).output_text
    assert server.client.responses.cancel(begun.id).status == "completed", "too late"


def test_an_answer_in_the_background_can_be_cancelled(server):
    begun = post(server, background=True, **ENDLESS).json()["id"]
    server.wait_for(lambda: bool(server.client.responses.retrieve(begun).output), what="its first text")
    with pytest.raises(openai.BadRequestError, match="still being made"):
        create(server, previous_response_id=begun)
    assert server.client.responses.cancel(begun).status == "cancelled"
    cancelled = server.client.responses.retrieve(begun)
    assert {item.status for item in cancelled.output} <= {"completed", "incomplete"}
    assert (cancelled.status, cancelled.usage.output_tokens < 1500) == ("cancelled", True)
    server.wait_for(server.all_pages_are_free, what="its pages becoming free")


def test_a_stream_of_the_background_goes_on_without_its_client_and_can_be_followed_again(server):
    with create(server, background=True, stream=True) as stream:
        seen = [next(stream) for _ in range(5)]
    response_id = seen[0].response.id
    rest = list(server.client.responses.retrieve(response_id, stream=True, starting_after=4))
    assert [event.sequence_number for event in (*seen, *rest)] == list(range(5 + len(rest)))
    assert rest[-1].type == "response.completed"
    assert rest[-1].response.output_text == create(server).output_text
    with pytest.raises(openai.BadRequestError, match="is not streamed again"):
        server.client.responses.retrieve(create(server).id, stream=True)


def test_an_answer_that_is_cut_off_is_incomplete(server):
    answer = create(server, max_output_tokens=3)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[-1].status == "incomplete"
    *_, last = create(server, max_output_tokens=3, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_of_the_answers_text_alone(server, stream):
    include = ["message.output_text.logprobs"]
    answer = create(server, include=include, top_logprobs=2, stream=stream)
    if stream:
        events = list(answer)
        answer = events[-1].response
        parts = [event.logprobs for event in events if event.type == "response.output_text.delta"]
        assert [entry.token for part in parts for entry in part] == [
            entry.token for entry in answer.output[-1].content[0].logprobs
        ]
    entries = answer.output[-1].content[0].logprobs
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert "".join(entry.token for entry in entries) == answer.output_text


class Visit(BaseModel):
    city: Literal["Paris", "Rome"]
    far: bool


def test_an_answer_is_parsed_by_the_clients_own_model(server):
    answer = server.client.responses.parse(model="demo", input=QUESTION, text_format=Visit)
    assert isinstance(answer.output_parsed, Visit)
    assert answer.text.format.name == "Visit"


def test_a_conversation_that_is_too_long_loses_its_beginning_when_asked_to(server):
    turns = []
    for number in range(40):
        turns += [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": f"Answer {number}"}]
    turns = [{"role": "developer", "content": "Be right."}, *turns, {"role": "user", "content": QUESTION}]
    with pytest.raises(openai.BadRequestError, match="input makes a prompt of"):
        create(server, input=turns)
    answer = create(server, input=turns, truncation="auto", max_output_tokens=20)
    assert 1500 < answer.usage.input_tokens < 2048
    with pytest.raises(openai.BadRequestError, match="input makes a prompt of"):
        create(server, input="word " * 3000, truncation="auto")


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "http://localhost/cat.png"}]}
REFUSED = {
    "an image": ({"input": [IMAGE]}, "input[0].content[0].type"),
    "a server's item": ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0].type"),
    "a server's tool": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "a summary": ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    "what cannot be included": ({"include": ["file_search_call.results"]}, "include[0]"),
    "another server's reasoning": ({"input": [{"type": "reasoning", "encrypted_content": "?"}]}, "input[0]"),
    "a tool that is not there": ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    "an answer of nothing": ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "another name": ({"max_tokens": 3}, "max_tokens"),
    "no room": ({"max_output_tokens": 0}, "max_output_tokens"),
    "too cold": ({"temperature": -1}, "temperature"),
    "unsent alternatives": ({"top_logprobs": 3}, "top_logprobs"),
    "an unkept background": ({"background": True, "store": False}, "background"),
    "options of no stream": ({"stream_options": {}}, "stream_options"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_a_400_that_names_it(server, case):
    fields, param = REFUSED[case]
    response = post(server, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
