"""The tokenizer's own routes, and the count of requests that are being answered."""

import json

import httpx
import pytest

from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path
from jax_engine.server.openai.tokenizer_routes import described

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model_path("demo"))


def post(server, route, **body):
    return httpx.post(f"{server.url}{route}", content=json.dumps(body), timeout=30)


def test_a_text_becomes_tokens_and_back(server, tokenizer):
    answer = post(server, "/tokenize", model="demo", prompt="Once upon a time").json()
    tokens = tokenizer.encode("Once upon a time")
    assert answer == {"count": len(tokens), "max_model_len": 2048, "tokens": tokens, "token_strs": None}
    assert post(server, "/detokenize", tokens=tokens).json() == {"prompt": tokenizer.decode(tokens)}
    bare = post(server, "/tokenize", prompt="Once", add_special_tokens=False, return_token_strs=True).json()
    assert bare["tokens"] == tokenizer.encode("Once", add_special_tokens=False)
    assert bare["token_strs"] == [tokenizer.token(token) for token in bare["tokens"]]


def test_a_chat_has_the_tokens_that_the_model_is_given(server, tokenizer):
    counted = post(server, "/tokenize", messages=HELLO).json()
    completion = server.client.chat.completions.create(model="demo", messages=HELLO, max_tokens=1)
    assert counted["count"] == completion.usage.prompt_tokens
    without = post(server, "/tokenize", messages=HELLO, add_generation_prompt=False).json()
    assert tokenizer.decode(counted["tokens"]) == tokenizer.decode(without["tokens"]) + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("/tokenize", {}, "give either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "give either prompt or messages"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt belongs to messages"),
        ("/tokenize", {"prompt": "a", "return_tokens": True}, "did you mean 'return_token_strs'"),
        ("/tokenize", {"messages": []}, "must be a list of at least one message"),
        ("/detokenize", {"tokens": [-1]}, "the model's token ids are 0 to 1023"),
        ("/detokenize", {"tokens": [2**40]}, "the model's token ids are 0 to 1023"),
        ("/detokenize", {}, "tokens is required"),
    ],
    ids=str,
)
def test_what_is_wrong_is_a_400_that_names_it(server, route, body, message):
    refused = post(server, route, **body)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]


def test_another_model_is_a_404(server):
    assert post(server, "/tokenize", model="other", prompt="a").status_code == 404


def test_the_tokenizer_is_shown_only_where_that_is_switched_on(server):
    refused = httpx.get(f"{server.url}/tokenizer_info")
    assert refused.status_code == 403
    assert "--enable-tokenizer-info-endpoint" in refused.json()["error"]["message"]


def test_what_is_shown_of_the_tokenizer_is_json_without_paths(tokenizer):
    shown = described(tokenizer, chat_template=None)
    assert json.loads(json.dumps(shown)) == shown
    assert (shown["eos_token"], shown["chat_template"]) == ("<|im_end|>", tokenizer.hugging_face.chat_template)
    assert str(resolve_model_path("demo")) not in json.dumps(shown)
    assert described(tokenizer, chat_template="{{ messages }}")["chat_template"] == "{{ messages }}"


def test_the_load_is_the_number_of_requests_being_answered(server):
    def load():
        return httpx.get(f"{server.url}/load").json()["server_load"]

    server.wait_for(lambda: load() == 0, what="nothing to do")
    body = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30):
        server.wait_for(lambda: load() == 1, what="a request")
    server.wait_for(lambda: load() == 0, what="its end")
