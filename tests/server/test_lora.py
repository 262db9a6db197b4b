"""Adapters over HTTP: listed as models, chosen by `model`, loaded and unloaded while the server runs."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from slow_adapters import slow_adapter

from jax_engine.adapters.adapter_files import adapter_folder

HELLO = [{"role": "user", "content": "Hello!"}]
PLAIN = "Hello! How can I help you?"
ANSWERS = {"demo": PLAIN, "shout": PLAIN.upper(), "farewell": f"{PLAIN} Have a nice day!"}


@pytest.fixture(scope="module")
def server(start_shared_server):
    """One place on each of two replicas' devices, two adapters: each request may have to wait for it."""
    return start_shared_server(
        *("--enable-lora", "--max-loras", "1", "--lora-modules", "shout=demo:shout", "farewell=demo:farewell"),
        *("--allow-runtime-lora-updating", "--api-server-count", "2", "--data-parallel-size", "2"),
        *("--served-model-name", "demo"),
        *("--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--kv-cache-memory-bytes", "32M"),
    )


def answer(server, model, **options):
    return server.client.chat.completions.create(model=model, messages=HELLO, temperature=0, max_tokens=40, **options)


def post(server, route, **body):
    return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=30)


def names(server):
    return [card["id"] for card in httpx.get(f"{server.url}/v1/models").json()["data"]]


def test_the_model_of_a_request_chooses_its_adapter(server):
    for _ in range(2):
        for model, text in ANSWERS.items():
            given = answer(server, model)
            assert (given.model, given.choices[0].message.content) == (model, text)


def test_a_stream_and_the_other_routes_choose_it_too(server):
    with answer(server, "shout", stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWERS["shout"]
    prompt = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    options = {"prompt": prompt, "temperature": 0, "max_tokens": 40, "model": "farewell"}
    completed = httpx.post(f"{server.url}/v1/completions", json=options, timeout=30).json()
    assert completed["choices"][0]["text"] == ANSWERS["farewell"]
    plain = httpx.post(f"{server.url}/generate", json=options, timeout=30).json()
    assert plain["text"] == [ANSWERS["farewell"]]


def test_adapters_are_models_with_a_parent(server):
    cards = {card["id"]: card for card in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert list(cards) == ["demo", "shout", "farewell"]
    assert [cards["shout"][field] for field in ("root", "parent")] == ["demo:shout", "demo"]
    assert httpx.get(f"{server.url}/v1/models/shout").json() == cards["shout"]
    with pytest.raises(openai.NotFoundError, match="this server has: demo, shout, farewell"):
        answer(server, "whisper")


def test_adapters_come_and_go_for_every_front_end(server):
    loaded = post(server, "load_lora_adapter", lora_name="loud", lora_path="demo:shout")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'loud' added successfully.")
    for _ in range(6):  # of both front ends
        assert answer(server, "loud").choices[0].message.content == ANSWERS["shout"]
    assert names(server) == ["demo", "shout", "farewell", "loud"]
    unloaded = post(server, "unload_lora_adapter", lora_name="loud")
    assert (unloaded.status_code, unloaded.text) == (200, "Success: LoRA adapter 'loud' removed successfully.")
    server.wait_for(lambda: all("loud" not in names(server) for _ in range(6)), what="its removal everywhere")
    assert post(server, "unload_lora_adapter", lora_name="loud").status_code == 404
    with pytest.raises(openai.NotFoundError):
        answer(server, "loud")


def test_answers_come_while_an_adapter_is_read(server, tmp_path):
    go_on = slow_adapter(adapter_folder("demo:shout"), folder := tmp_path / "slow")
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(post, server, "load_lora_adapter", lora_name="slow", lora_path=str(folder))
        for _ in range(6):  # of both replicas
            assert answer(server, "demo").choices[0].message.content == PLAIN
        assert not loading.done()
        go_on()
        assert loading.result().status_code == 200
    assert answer(server, "slow").choices[0].message.content == ANSWERS["shout"]
    assert post(server, "unload_lora_adapter", lora_name="slow").status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"lora_name": "shout", "lora_path": "demo:shout"}, "lora_name='shout' is taken by an adapter"),
        ({"lora_name": "demo", "lora_path": "demo:shout"}, "lora_name='demo' is the model's own name"),
        ({"lora_name": "new", "lora_path": "/nowhere"}, "lora_path='/nowhere' is not a folder"),
        ({"lora_name": "", "lora_path": "demo:shout"}, "lora_name='' must be a non-empty string"),
        ({"lora_name": "new"}, "lora_path is required"),
        ({"lora_name": "new", "lora_path": "demo:shout", "load_inplace": True}, "unknown parameter 'load_inplace'"),
    ],
    ids=str,
)
def test_what_cannot_be_loaded_is_refused(server, body, message):
    refused = post(server, "load_lora_adapter", **body)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]
    assert names(server) == ["demo", "shout", "farewell"]


def test_a_server_that_does_not_let_clients_says_so(start_server):
    running = start_server("--enable-lora", "--load-format", "dummy", ready=False)  # it need not be ready for that
    refused = post(running, "load_lora_adapter", lora_name="shout", lora_path="demo:shout")
    assert refused.status_code == 403
    assert "start it with --allow-runtime-lora-updating" in refused.json()["error"]["message"]


def test_an_adapter_that_is_wrong_ends_the_start(start_server, tmp_path):
    running = start_server("--enable-lora", "--lora-modules", f"mine={tmp_path}", ready=False)
    assert running.process.wait(60) == 2
    assert "has no adapter_config.json" in running.log().splitlines()[-1]
