"""Vectors and scores over HTTP: OpenAI's client, vLLM's and Cohere's shapes, and what is refused."""

import base64
import math

import httpx
import numpy as np
import openai
import pytest

from jax_engine.frontend.tokenizer import load_tokenizer
from jax_engine.loading.model_files import resolve_model_path

TEXTS = ["The cat sat on the mat.", "Water boils at 100 degrees.", "The cat sat on the mat"]
HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_model_path("demo"))


@pytest.fixture(scope="module")
def vectors(server):
    return [item.embedding for item in server.client.embeddings.create(model="demo", input=TEXTS).data]


def post(server, route, **body):
    return httpx.post(f"{server.url}{route}", json=body, timeout=60)


def close(first, second):
    return np.allclose(first, second, rtol=1e-4, atol=1e-5)


def test_openai_client_gets_vectors_of_length_one_and_the_usage(server, tokenizer, vectors):
    answer = server.client.embeddings.create(model="demo", input=TEXTS, user="me")  # asks for base64 by itself
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert (answer.object, answer.model, answer.data[0].object) == ("list", "demo", "embedding")
    num_tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
    for item, vector in zip(answer.data, vectors, strict=True):
        assert math.isclose(math.hypot(*item.embedding), 1, rel_tol=1e-5)
        assert close(item.embedding, vector)


def test_every_form_of_input_and_both_encodings_give_the_same(server, tokenizer, vectors):
    ids = [tokenizer.encode(text) for text in TEXTS]
    for given, wanted in ((TEXTS[0], vectors[:1]), (ids[1], vectors[1:2]), (ids, vectors)):
        as_numbers = server.client.embeddings.create(model="demo", input=given, encoding_format="float").data
        as_bytes = post(server, "/v1/embeddings", input=given, encoding_format="base64").json()["data"]
        for one, other, vector in zip(as_numbers, as_bytes, wanted, strict=True):
            decoded = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
            assert close(one.embedding, vector)
            assert close(decoded, vector)


def test_dimensions_are_the_first_ones_brought_to_length_one(server, vectors):
    (item,) = server.client.embeddings.create(model="demo", input=TEXTS[0], dimensions=8).data
    first = np.array(vectors[0][:8])
    assert close(item.embedding, first / np.linalg.norm(first))
    raw = post(server, "/v1/embeddings", input=TEXTS[0], normalize=False).json()["data"][0]["embedding"]
    assert close(np.array(raw) / np.linalg.norm(raw), vectors[0])
    assert not math.isclose(np.linalg.norm(raw), 1, rel_tol=1e-3)


def test_messages_and_truncated_prompts_are_what_their_tokens_are(server, tokenizer):
    ids = post(server, "/tokenize", messages=HELLO).json()["tokens"]
    of_chat = post(server, "/v1/embeddings", messages=HELLO).json()
    of_ids = post(server, "/pooling", input=ids).json()
    assert close(of_chat["data"][0]["embedding"], of_ids["data"][0]["data"])
    cut = post(server, "/v1/embeddings", input=TEXTS[0], truncate_prompt_tokens=3).json()
    assert cut["usage"]["prompt_tokens"] == 3
    tail = post(server, "/v1/embeddings", input=tokenizer.encode(TEXTS[0])[-3:]).json()
    assert close(cut["data"][0]["embedding"], tail["data"][0]["embedding"])


@pytest.mark.parametrize("route", ["/score", "/v1/score"])
def test_scores_are_cosines(server, vectors, route):
    products = np.array(vectors) @ np.array(vectors).T
    answer = post(server, route, model="demo", text_1=TEXTS[0], text_2=TEXTS).json()
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert close([item["score"] for item in answer["data"]], products[0])
    pairs = post(server, route, queries=TEXTS[:2], documents=TEXTS[1:]).json()["data"]
    assert close([item["score"] for item in pairs], [products[0, 1], products[1, 2]])


def test_documents_are_ordered_by_their_likeness(server, vectors):
    scores = np.array(vectors[1:]) @ np.array(vectors[0])
    query = {"model": "demo", "query": TEXTS[0], "documents": TEXTS[1:]}
    for route in ("/rerank", "/v1/rerank", "/v2/rerank"):
        results = post(server, route, **query).json()["results"]
        assert [result["index"] for result in results] == list(np.argsort(-scores))
        assert close([result["relevance_score"] for result in results], np.sort(scores)[::-1])
        shown = [result.get("document") for result in results]
        wanted = [{"text": TEXTS[1 + result["index"]]} for result in results]
        assert shown == (wanted if route != "/v2/rerank" else [None, None])
    (best,) = post(server, "/rerank", **query, top_n=1, return_documents=False).json()["results"]
    assert set(best) == {"index", "relevance_score"}


def test_vectors_come_while_others_generate(server, vectors):
    body = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        assert close(server.client.embeddings.create(model="demo", input=TEXTS).data[1].embedding, vectors[1])
        assert list(filter(None, lines))[-1] == "data: [DONE]"
    assert server.metric("jax_engine:compiles_in_request_path_total") == 0


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("/v1/embeddings", {}, "give either input or messages"),
        ("/v1/embeddings", {"input": []}, "input=[] must be a string"),
        ("/v1/embeddings", {"input": ""}, "prompt is empty"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format='int8' must be float or base64"),
        ("/v1/embeddings", {"input": "a", "dimensions": 10**6}, "must be at most"),
        ("/v1/embeddings", {"input": "a", "dimensions": 0}, "dimensions=0"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens=0 must be at least 1"),
        ("/v1/embeddings", {"input": "a", "continue_final_message": True}, "belongs to messages"),
        ("/v1/embeddings", {"input": [99999]}, "the model's token ids are 0 to"),
        ("/v1/embeddings", {"input": "a", "dimension": 3}, "did you mean 'dimensions'"),
        ("/score", {"text_1": "a"}, "give text_2, or documents or data_2"),
        ("/score", {"text_1": ["a", "b"], "text_2": "c"}, "text_1 has 2 entries and text_2 1"),
        ("/score", {"text_1": "a", "text_2": [1, 2]}, "text_2 must be a string or a list of strings"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n=-1 must be at least 0"),
        ("/classify", {"input": "a"}, "this model has no classification head"),
    ],
    ids=str,
)
def test_what_cannot_be_is_a_400_that_names_it(server, route, body, message):
    refused = post(server, route, **body)
    assert refused.status_code == 400
    assert message in refused.json()["error"]["message"]


def test_another_model_is_a_404(server):
    with pytest.raises(openai.NotFoundError):
        server.client.embeddings.create(model="other", input="a")
