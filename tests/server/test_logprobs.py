"""Log-probabilities over HTTP: the `openai` client, streams, echoed prompts, and the plain route."""

import math

import httpx
import pytest

PROMPT = "What is 17 + 25?"
QUESTION = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 6}


def test_a_chat_has_them_token_by_token(server):
    answer = server.client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY)
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert len(content) == answer.usage.completion_tokens
    shown = bytes(byte for entry in content for byte in entry.bytes).decode()
    assert shown.startswith("<think>\n" + choice.message.reasoning_content), "also what is no part of the message"
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the likeliest"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-5


def test_a_streamed_chat_has_the_same(server):
    settings = {"messages": QUESTION, "logprobs": True, "top_logprobs": 2, **GREEDY}
    whole = server.client.chat.completions.create(**settings).choices[0].logprobs.content
    streamed = []
    for chunk in server.client.chat.completions.create(**settings, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert streamed == whole


@pytest.mark.parametrize("echo", [False, True])
def test_completions_have_parallel_lists_whole_and_streamed(server, echo):
    settings = {"prompt": [PROMPT, "Once upon"], "logprobs": 2, "echo": echo, "n": 2, "seed": 1, **GREEDY}
    settings["temperature"] = 1
    answer = server.client.completions.create(**settings)
    streamed = [{"text": "", "tokens": [], "text_offset": [], "token_logprobs": []} for _ in answer.choices]
    for chunk in server.client.completions.create(**settings, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index]["text"] += choice.text
        for name in ("tokens", "text_offset", "token_logprobs") if choice.logprobs else ():
            streamed[choice.index][name] += getattr(choice.logprobs, name)
    for choice, parts in zip(answer.choices, streamed, strict=True):
        logprobs = choice.logprobs
        assert parts["text"] == choice.text
        for name in ("tokens", "text_offset", "token_logprobs"):
            assert parts[name] == getattr(logprobs, name)
        assert (logprobs.token_logprobs[0] is None) is echo
        for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert token.startswith("<|") or choice.text.startswith(token, offset)
    if echo:
        assert [choice.text.startswith("Once upon") for choice in answer.choices] == [False, False, True, True]


def test_an_echoed_prompt_scores_as_it_does_when_it_is_drawn(server):
    """The same tokens, once drawn and once given."""
    drawn = server.client.completions.create(prompt=PROMPT, logprobs=0, **GREEDY).choices[0]
    text = PROMPT + drawn.text
    echoed = server.client.completions.create(prompt=text, logprobs=0, echo=True, model="demo", max_tokens=1).choices[0]
    scored = dict(zip(echoed.logprobs.text_offset, echoed.logprobs.token_logprobs, strict=True))
    first, value = len(PROMPT), drawn.logprobs.token_logprobs[0]
    assert scored[first] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_max_tokens_of_zero_scores_the_prompt_alone(server, stream):
    settings = {"model": "demo", "prompt": PROMPT, "logprobs": 1, "echo": True, "stream": stream}
    answer = server.client.completions.create(max_tokens=0, **settings)
    (choice,) = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    longer = server.client.completions.create(max_tokens=1, **(settings | {"stream": False})).choices[0]
    assert choice.logprobs.token_logprobs == longer.logprobs.token_logprobs[:-1]
    if not stream:
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (0, len(choice.logprobs.tokens))
    refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "max_tokens": 0})
    assert refused.status_code == 400 and "max_tokens=0" in refused.text


def test_vllms_prompt_logprobs_are_by_token_id(server):
    body = {"prompt": PROMPT, "prompt_logprobs": 1, **GREEDY}
    (choice,) = httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status().json()["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert all({"logprob", "rank", "decoded_token"} == set(entry) for place in others for entry in place.values())
    chat = {"messages": QUESTION, "prompt_logprobs": 0, **GREEDY}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat).raise_for_status().json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]


def test_the_plain_route_has_vllms_dictionaries(server):
    body = {"prompt": PROMPT, "logprobs": 1, "prompt_logprobs": 0, **GREEDY}
    answer = httpx.post(f"{server.url}/generate", json=body).raise_for_status().json()
    assert [len(one) for one in answer["logprobs"]] == [answer["usage"]["completion_tokens"]]
    assert [len(one) for one in answer["prompt_logprobs"]] == [answer["usage"]["prompt_tokens"]]
    lines = httpx.post(f"{server.url}/generate_stream", json=body | {"prompt_logprobs": None}).text.splitlines()
    assert len(lines) > 1 and '"logprobs":[{' in "".join(lines)
