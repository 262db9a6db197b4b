"""Beam search over HTTP and through `AsyncLLM`'s process."""

import httpx
import pytest

PROMPT = "What is 17 + 25?"
SEARCH = {"model": "demo", "n": 3, "max_tokens": 8, "extra_body": {"use_beam_search": True}}


def test_a_search_has_the_likeliest_sequences_first(server):
    answer = server.client.completions.create(prompt=[PROMPT, "Once upon"], **SEARCH)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len({choice.text for choice in answer.choices[:3]}) == 3
    greedy = server.client.completions.create(model="demo", prompt=PROMPT, max_tokens=8, temperature=0)
    one = server.client.completions.create(prompt=PROMPT, **(SEARCH | {"n": 1}))
    assert one.choices[0].text == greedy.choices[0].text, "one beam is greedy search"
    again = server.client.completions.create(prompt=PROMPT, **SEARCH)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices[:3]]


def test_a_chat_takes_length_penalty_and_early_stopping(server):
    messages = [{"role": "user", "content": PROMPT}]
    extra = {"use_beam_search": True, "length_penalty": 0.5, "early_stopping": "never"}
    answer = server.client.chat.completions.create(
        messages=messages, **(SEARCH | {"max_tokens": 100, "extra_body": extra})
    )
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert "42" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None, "nobody asks for them"


def test_a_search_that_is_too_wide_is_a_400_that_names_n(server):
    body = {"prompt": PROMPT, "n": 40, "use_beam_search": True}
    error = httpx.post(f"{server.url}/v1/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("n", "invalid_value")
    assert "likeliest tokens of each beam" in error["message"]


def test_a_client_that_leaves_ends_its_search(server):
    body = {"prompt": PROMPT, "n": 4, "max_tokens": 2000, "ignore_eos": True, "use_beam_search": True}

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=1)
    server.wait_for(server.all_pages_are_free, what="free pages", seconds=20)
