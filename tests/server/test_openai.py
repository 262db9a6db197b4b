"""The real `openai` client against the real server."""

import json

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
STORY = "Once upon a time"


def token_counts(answer) -> tuple[int, int, int]:
    """Without what of the prompt was cached, which depends on the requests before it."""
    return (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)


def test_chat_answers_correctly(server):
    answer = server.client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    (choice,) = answer.choices
    assert "42" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "demo"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_chat_is_the_same_answer_in_pieces(server):
    whole = server.client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    with server.client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, usage_chunk = list(stream)
    first, *middle, last = [chunk.choices[0] for chunk in chunks]
    assert first.delta.role == "assistant"
    assert all(choice.delta.role is None and choice.finish_reason is None for choice in middle)
    for name in ("content", "reasoning_content", "reasoning"):
        streamed = "".join(getattr(choice.delta, name, None) or "" for choice in middle)
        assert streamed == getattr(whole.choices[0].message, name), name
    assert whole.choices[0].message.content == "17 + 25 = 42"
    assert "<think>" not in whole.choices[0].message.reasoning_content
    assert (last.finish_reason, last.delta.content) == ("stop", None)
    assert usage_chunk.choices == []
    assert token_counts(usage_chunk) == token_counts(whole)
    assert len({chunk.id for chunk in (*chunks, usage_chunk)}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_what_changes_logits_acts_on_every_route(server):
    """The answer's first token alone, then without it, then with it forbidden as a word."""

    def answer(**controls):
        settings = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_tokens": 6}
        message = server.client.chat.completions.create(**settings, **controls).choices[0].message
        return message.reasoning_content or message.content

    free = answer()
    first = free.split()[0]
    assert answer(logit_bias={"5": 100}) != free
    assert answer(frequency_penalty=2, extra_body={"repetition_penalty": 5}) != free
    assert not answer(extra_body={"bad_words": [first]}).startswith(first)
    body = {"prompt": STORY, "max_tokens": 4, "temperature": 0, "allowed_token_ids": [5]}
    once = httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": 1}).json()["choices"][0]["text"]
    for route in ("/v1/completions", "/generate"):
        text = httpx.post(f"{server.url}{route}", json=body).text
        assert json.dumps(once * 4)[1:-1] in text, route
    refused = httpx.post(f"{server.url}/v1/completions", json={**body, "extra_args": {"strength": 1}})
    assert refused.status_code == 400
    assert "no processor that takes any is registered" in refused.json()["error"]["message"]


def test_a_stream_without_include_usage_has_no_usage(server):
    stream = server.client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=4, stream=True)
    assert [chunk.usage for chunk in stream if chunk.usage] == []


def test_content_parts_and_developer_role(server):
    plain = [{"role": "system", "content": "Be brief.\nBe kind."}, *QUESTION]
    parts = [{"type": "text", "text": text} for text in ("Be brief.", "Be kind.")]
    same = [{"role": "developer", "content": parts}, {**QUESTION[0], "name": None}]
    answers = [
        server.client.chat.completions.create(model="demo", messages=messages, temperature=0, max_tokens=8)
        for messages in (plain, same)
    ]
    assert token_counts(answers[0]) == token_counts(answers[1])
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_tools_go_into_the_prompt_unless_none_may_be_chosen(server):
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }

    def prompt_tokens(**settings):
        answer = server.client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=1, **settings)
        return answer.usage.prompt_tokens

    bare = prompt_tokens()
    assert prompt_tokens(tools=[tool]) > bare
    assert prompt_tokens(tools=[tool], tool_choice="auto") > bare
    assert prompt_tokens(tools=[tool], tool_choice="none") == bare


def test_a_tool_conversation_with_nulls_is_accepted(server):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    answer = server.client.chat.completions.create(model="demo", messages=messages, max_tokens=4)
    assert answer.usage.completion_tokens >= 1


def test_continue_final_message_prefills_the_answer(server):
    prefix = [*QUESTION, {"role": "assistant", "content": "The answer is"}]
    extra = {"continue_final_message": True}
    answer = server.client.chat.completions.create(model="demo", messages=prefix, max_tokens=1, extra_body=extra)
    turn = server.client.chat.completions.create(model="demo", messages=prefix, max_tokens=1)
    assert answer.usage.prompt_tokens < turn.usage.prompt_tokens


def test_max_completion_tokens_limits_the_answer(server):
    answer = server.client.chat.completions.create(model="demo", messages=QUESTION, max_completion_tokens=3)
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_n_completions_of_several_prompts_have_their_own_indexes(server, stream):
    settings = {"model": "demo", "prompt": [STORY, "The capital"], "n": 3, "max_tokens": 5, "seed": 7}
    settings["extra_body"] = {"ignore_eos": True}
    answer = server.client.completions.create(**settings)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    assert answer.usage.completion_tokens == 30
    if stream:
        streamed = [""] * 6
        for chunk in server.client.completions.create(**settings, stream=True):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts


def test_all_forms_of_a_prompt(server):
    def text(prompt, **extra):
        choices = server.client.completions.create(
            model="demo", prompt=prompt, temperature=0, max_tokens=6, extra_body=extra
        ).choices
        return [choice.text for choice in choices]

    (alone,) = text(STORY)
    assert text([STORY, STORY]) == [alone, alone]
    (by_ids,) = text([300, 301, 302])
    assert text([[300, 301, 302], [300, 301, 302]]) == [by_ids, by_ids]
    assert text(STORY, add_special_tokens=True) == [alone]


def test_stop_string_ends_a_completion_before_it(server):
    whole = server.client.completions.create(model="demo", prompt=STORY, temperature=0, max_tokens=20).choices[0].text
    stop = whole[len(whole) // 2 :][:4]
    choice = server.client.completions.create(
        model="demo", prompt=STORY, temperature=0, max_tokens=20, stop=[stop]
    ).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    included = server.client.completions.create(
        model="demo",
        prompt=STORY,
        temperature=0,
        max_tokens=20,
        stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )
    assert included.choices[0].text == whole[: whole.index(stop) + len(stop)]


def test_a_seed_repeats_a_sampled_completion(server):
    settings = {"model": "demo", "prompt": STORY, "temperature": 1.5, "max_tokens": 12, "seed": 5}
    texts = {server.client.completions.create(**settings).choices[0].text for _ in range(3)}
    assert len(texts) == 1


def test_models_are_listed_under_every_name(server):
    assert [model.id for model in server.client.models.list()] == ["demo", "demo-alias"]
    card = server.client.models.retrieve("demo-alias")
    assert (card.object, card.owned_by) == ("model", "jax-engine")
    with pytest.raises(openai.NotFoundError, match="'gpt-5' does not exist"):
        server.client.models.retrieve("gpt-5")
    alias = server.client.completions.create(model="demo-alias", prompt=STORY, max_tokens=1)
    assert alias.model == "demo-alias"


def test_request_id_is_taken_and_returned(server):
    body = {"prompt": STORY, "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    server.wait_for(lambda: "id=mine-1" in server.log(), what="the log line")


def test_plain_routes(server):
    body = {"prompt": STORY, "max_tokens": 6, "sampling_params": {"temperature": 0}}
    whole = httpx.post(f"{server.url}/generate", json=body).raise_for_status().json()
    assert whole["finish_reason"] == ["length"]
    lines = [json.loads(line) for line in httpx.post(f"{server.url}/generate_stream", json=body).text.splitlines()]
    assert "".join(line["text"] for line in lines[:-1]) == whole["text"][0]
    assert [line["finish_reason"] for line in lines[:-1]][-1] == "length"
    assert lines[-1] == {"usage": whole["usage"]}
    assert httpx.post(f"{server.url}/generate", json={**body, "stream": True}).text.splitlines() != []


def cached_tokens(answer) -> int:
    return answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_usage_tells_what_came_from_the_cache(server, route):
    """Both routes, whole and streamed; the prompt is this test's own, and longer than four pages of 8."""
    words = f"{route}: " + " ".join(map(str, range(40)))

    def ask(**settings):
        settings = {"model": "demo", "max_tokens": 2, **settings}
        if route == "chat":
            return server.client.chat.completions.create(messages=[{"role": "user", "content": words}], **settings)
        return server.client.completions.create(prompt=words, **settings)

    first, again = ask(), ask()
    expected = (again.usage.prompt_tokens - 1) // 8 * 8
    assert expected >= 32
    assert cached_tokens(first) < expected
    assert cached_tokens(again) == expected
    *_, last = ask(stream=True, stream_options={"include_usage": True})
    assert cached_tokens(last) == expected
    salted = [ask(extra_body={"cache_salt": "mine"}) for _ in range(2)]
    assert [cached_tokens(answer) for answer in salted] == [0, expected]


def test_prefix_cache_metrics_and_reset(server):
    names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
    prompt = list(range(500, 550))
    server.wait_for(server.all_pages_are_free, what="earlier tests' requests ending")
    reset = httpx.post(f"{server.url}/reset_prefix_cache")
    assert (reset.status_code, reset.json()) == (200, {"reset": True})
    before = [server.metric(name) for name in names]
    answers = [server.client.completions.create(model="demo", prompt=prompt, max_tokens=1) for _ in range(2)]
    assert [cached_tokens(answer) for answer in answers] == [0, 48]

    def counted() -> bool:
        return [server.metric(name) - start for name, start in zip(names, before, strict=True)] == [100, 48]

    server.wait_for(counted, what="the counters", seconds=20)


def test_a_reset_is_refused_while_a_request_runs(server):
    body = {"prompt": STORY, "max_tokens": 400, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/generate_stream", json=body, timeout=60) as stream:
        lines = stream.iter_lines()  # kept: dropped, it would close the stream
        next(lines)
        refused = httpx.post(f"{server.url}/reset_prefix_cache")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "prefix_cache_in_use")


def test_metrics_count_what_was_served(server):
    before = server.metric("vllm:request_success_total", finished_reason="length")
    tokens = server.metric("vllm:request_generation_tokens_sum")
    server.client.completions.create(model="demo", prompt=STORY, max_tokens=5, n=2, extra_body={"ignore_eos": True})
    assert server.metric("vllm:request_success_total", finished_reason="length") == before + 2
    assert server.metric("vllm:request_generation_tokens_sum") == tokens + 10
    assert server.metric("jax_engine:compiles_in_request_path_total", model_name="demo", engine="0") == 0
    assert server.metric("vllm:cache_config_info", block_size="8") == 1


def test_an_answer_has_the_form_that_was_asked_for(server):
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "year": {"type": "integer", "minimum": 1, "maximum": 2000}},
        "required": ["city", "year"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "visit", "schema": schema}}
    create = server.client.chat.completions.create
    answer = create(model="demo", messages=QUESTION, response_format=response_format)
    (choice,) = answer.choices
    said = json.loads(choice.message.content)
    assert choice.finish_reason == "stop"
    assert said.keys() == {"city", "year"}
    assert said["city"] in ("Paris", "Rome")
    assert 1 <= said["year"] <= 2000
    streamed = create(model="demo", messages=QUESTION, stream=True, extra_body={"guided_choice": ["north", "south"]})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) in ("north", "south")
    plain = httpx.post(f"{server.url}/generate", json={"prompt": STORY, "guided_regex": "[0-9]{3}", "n": 2})
    assert all(text.isdecimal() and len(text) == 3 for text in plain.raise_for_status().json()["text"])


def test_a_grammar_that_cannot_be_followed_is_a_400_that_names_it(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.client.completions.create(
            model="demo", prompt=STORY, extra_body={"structured_outputs": {"regex": "(unclosed"}}, stream=True
        )
    assert caught.value.param == "structured_outputs.regex"
    assert "unclosed group" in caught.value.message
