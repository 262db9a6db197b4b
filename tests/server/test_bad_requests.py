"""Bad input over HTTP to the real engine: each gets a clear error while another request streams on unharmed."""

import json
import socket
import threading

import httpx
import pytest

STORY = "Once upon a time"

# (fields of a /v1/completions body, words of the message, param)
BAD_FIELDS = {
    "empty prompt": ({"prompt": ""}, "prompt is empty", "prompt"),
    "no prompt": ({"prompt": []}, "not empty", "prompt"),
    "prompt over the limit": ({"prompt": "one two three " * 5000}, "max_model_len", "prompt"),
    "max_tokens beyond the context": ({"max_tokens": 10**6}, "max_model_len", "max_tokens"),
    "negative token id": ({"prompt": [1, -5]}, "token ids are 0 to", "prompt_token_ids"),
    "token id past the vocabulary": ({"prompt": [10**6]}, "token ids are 0 to", "prompt_token_ids"),
    "token id past 64 bits": ({"prompt": [10**30]}, "whole numbers", None),
    "negative temperature": ({"temperature": -1}, "temperature=-1", "temperature"),
    "top_p of 0": ({"top_p": 0}, "top_p=0", "top_p"),
    "top_p of 2": ({"top_p": 2}, "top_p=2", "top_p"),
    "n of 0": ({"n": 0}, "n=0", "n"),
    "second of two prompts": ({"prompt": [STORY, ""]}, "prompt 1: prompt is empty", "prompt"),
    "bad stop": ({"stop": [""]}, "non-empty string", "stop"),
    "wrong type": ({"temperature": "hot"}, "expected `float | null`, got `str`", "temperature"),
    "unknown parameter": ({"temprature": 1}, "did you mean 'temperature'?", "temprature"),
    "priority under fcfs": ({"priority": 1}, "priority=1 needs scheduling_policy='priority'", "priority"),
    "more logprobs than there are": ({"logprobs": 21}, "must be at most max_logprobs=20", "logprobs"),
    "not there yet": ({"suffix": "a"}, 'suffix="a" is not supported yet', "suffix"),
}
BAD_BODIES = {
    "malformed JSON": (b'{"model": ', 400, "not valid JSON"),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400, "not valid UTF-8"),
    "no object": (b"[1, 2]", 400, "must be a JSON object"),
    "nested too deeply": (b'{"prompt": ' + b"[" * 100_000, 400, "nested too deeply"),
    "too large": (b'{"model": "' + b"a" * 2**20 + b'"}', 413, "more than 1048576 bytes"),
}


@pytest.fixture
def bystander(server):
    """A request that streams all through a test, and must come out as it does alone."""
    settings = {
        "model": "demo",
        "prompt": STORY,
        "temperature": 0,
        "max_tokens": 300,
        "extra_body": {"ignore_eos": True},
    }
    alone = server.client.completions.create(**settings).choices[0].text
    pieces = []

    def read():
        pieces.extend(chunk.choices[0].text for chunk in server.client.completions.create(**settings, stream=True))

    thread = threading.Thread(target=read)
    thread.start()
    yield
    thread.join()
    assert "".join(pieces) == alone


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_field_is_a_400_that_names_it(server, case):
    fields, words, param = BAD_FIELDS[case]
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": STORY, "max_tokens": 4, **fields})
    error = response.json()["error"]
    assert response.status_code == 400
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


def test_all_of_them_at_once_leave_another_request_unharmed(server, bystander):
    for fields, _, _ in BAD_FIELDS.values():
        for stream in (False, True):
            body = {"prompt": STORY, "max_tokens": 4, "stream": stream, **fields}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 400
    for body, status, _ in BAD_BODIES.values():
        assert httpx.post(f"{server.url}/v1/completions", content=body).status_code == status


@pytest.mark.parametrize("route", ["/v1/completions", "/generate", "/generate_stream"])
@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_body(server, case, route):
    body, status, words = BAD_BODIES[case]
    response = httpx.post(f"{server.url}{route}", content=body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_nan_is_no_json_but_is_named_all_the_same(server):
    response = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "a", "temperature": NaN}')
    assert response.status_code == 400
    assert "temperature=nan must be a finite number" in response.json()["error"]["message"]


def test_unknown_model(server):
    response = httpx.post(f"{server.url}/v1/completions", json={"model": "gpt-5", "prompt": STORY})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "demo, demo-alias" in response.json()["error"]["message"]


def test_a_body_that_grows_past_the_limit_without_declaring_it(server):
    def endless():
        for _ in range(100):
            yield b'{"prompt": "' + b"a" * 2**16

    response = httpx.post(f"{server.url}/v1/completions", content=endless())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_template_error_is_a_400(server):
    body = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"tokenize": True}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "chat_template_kwargs"


def test_unsupported_content_part(server):
    part = {"type": "image_url", "image_url": {"url": "http://localhost/cat.png"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    error = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["error"]
    assert "image_url" in error["message"]
    assert error["param"] == "messages[0].content"


def test_what_is_no_http_does_not_stop_the_server(server):
    host, port = server.url.removeprefix("http://").split(":")
    for junk in (
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\n\r\n{",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(junk)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_errors_tell_nothing_of_the_machine(server):
    for fields, _, _ in BAD_FIELDS.values():
        text = json.dumps(httpx.post(f"{server.url}/v1/completions", json={"prompt": STORY, **fields}).json())
        assert "Traceback" not in text
        assert ".py" not in text
