"""OpenAI's reference, as its client has it, and vLLM's additions to it, field by field."""

import json

import httpx
import pytest
from anthropic.types.message_count_tokens_params import MessageCountTokensParams
from anthropic.types.message_create_params import MessageCreateParamsBase
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from jax_engine.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from jax_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from jax_engine.server.responses.protocol import ResponsesRequest

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
STORY = "Once upon a time"
USAGE = {"include_usage": True}

OURS = {
    ChatParams: ChatCompletionRequest,
    CompletionParams: CompletionRequest,
    ChatCompletionStreamOptionsParam: StreamOptions,
    ResponseCreateParamsBase: ResponsesRequest,
    MessageCreateParamsBase: MessagesRequest,
    MessageCountTokensParams: CountTokensRequest,
}


@pytest.mark.parametrize("reference", OURS, ids=lambda kind: OURS[kind].__name__)
def test_every_field_of_the_reference_is_known_by_name(reference):
    """One that is not served is refused by name, and not called unknown."""
    assert set(reference.__annotations__) <= set(OURS[reference].__struct_fields__)


def post(server, route, **body):
    return httpx.post(f"{server.url}{route}", json={"model": "demo", **body}, timeout=60).raise_for_status()


def chunks(server, route, **body):
    """The JSON of each event, without the [DONE]; and how long each was, in bytes."""
    parts = post(server, route, stream=True, **body).content.split(b"\n\n")
    assert parts[-2:] == [b"data: [DONE]", b""]
    return [json.loads(part.removeprefix(b"data: ")) for part in parts[:-2]], {len(part) + 2 for part in parts[:-2]}


CHAT = ("/v1/chat/completions", {"messages": QUESTION})
COMPLETION = ("/v1/completions", {"prompt": STORY, "max_tokens": 6})


@pytest.mark.parametrize(("route", "body"), [CHAT, COMPLETION], ids=["chat", "completion"])
def test_what_an_answer_says_of_the_server_stands_in_every_chunk(server, route, body):
    whole = post(server, route, service_tier="auto", **body).json()
    assert whole["system_fingerprint"].startswith("fp_")
    assert whole["service_tier"] == "default"
    streamed, _ = chunks(server, route, service_tier="auto", **body)
    for chunk in streamed:
        assert {name: chunk[name] for name in ("system_fingerprint", "service_tier")} == {
            name: whole[name] for name in ("system_fingerprint", "service_tier")
        }
    assert "service_tier" not in post(server, route, **body).json()


@pytest.mark.parametrize(("route", "body"), [CHAT, COMPLETION], ids=["chat", "completion"])
def test_each_chunk_may_have_the_counts_so_far(server, route, body):
    streamed, _ = chunks(server, route, stream_options={**USAGE, "continuous_usage_stats": True}, **body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in streamed]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert all(chunk["usage"]["total_tokens"] > chunk["usage"]["prompt_tokens"] > 0 for chunk in streamed)
    refused = httpx.post(
        f"{server.url}{route}", json={**body, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    )
    assert refused.json()["error"]["param"] == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize(("route", "body"), [CHAT, COMPLETION], ids=["chat", "completion"])
def test_obfuscated_chunks_tell_little_by_their_length(server, route, body):
    streamed, lengths = chunks(server, route, stream_options={"include_obfuscation": True}, **body)
    assert all("obfuscation" in chunk for chunk in streamed)
    assert all(length % 64 == 0 for length in lengths)
    plain, lengths = chunks(server, route, **body)
    assert not any("obfuscation" in chunk for chunk in plain)
    assert not all(length % 64 == 0 for length in lengths)


def test_events_of_responses_may_be_obfuscated_too(server):
    options = {"include_obfuscation": True}
    for event in server.client.responses.create(model="demo", input=STORY, stream=True, stream_options=options):
        assert ("obfuscation" in event.model_extra) is event.type.endswith(".delta")


def test_token_ids_of_completions(server):
    asked = {"prompt": [STORY, "Long ago"], "max_tokens": 5, "n": 2, "seed": 1, "return_token_ids": True}
    whole = post(server, "/v1/completions", **asked).json()["choices"]
    prompts = [post(server, "/tokenize", prompt=prompt).json()["tokens"] for prompt in asked["prompt"]]
    assert [choice["prompt_token_ids"] for choice in whole] == [prompts[0]] * 2 + [prompts[1]] * 2
    streamed, _ = chunks(server, "/v1/completions", **asked)
    ids, of_prompts = {}, {}
    for choice in (choice for chunk in streamed for choice in chunk["choices"]):
        ids.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
        if "prompt_token_ids" in choice:
            assert choice["index"] not in of_prompts, "only its first chunk has them"
            of_prompts[choice["index"]] = choice["prompt_token_ids"]
    assert ids == {choice["index"]: choice["token_ids"] for choice in whole}
    assert of_prompts == {choice["index"]: choice["prompt_token_ids"] for choice in whole}
    text = post(server, "/detokenize", tokens=ids[0]).json()["prompt"]
    assert text.startswith(whole[0]["text"])
    assert "token_ids" not in post(server, "/v1/completions", prompt=STORY).json()["choices"][0]


def test_token_ids_of_chats(server):
    whole = post(server, CHAT[0], return_token_ids=True, **CHAT[1]).json()
    assert len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    assert len(whole["choices"][0]["token_ids"]) == whole["usage"]["completion_tokens"]
    (first, *rest), _ = chunks(server, CHAT[0], return_token_ids=True, **CHAT[1])
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk for chunk in rest)
    ids = [token for chunk in rest for token in chunk["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]


def test_log_probabilities_of_a_prompt_come_with_the_first_chunk(server):
    asked = {"prompt": STORY, "max_tokens": 3, "prompt_logprobs": 1}
    whole = post(server, "/v1/completions", **asked).json()["choices"][0]["prompt_logprobs"]
    (first, *rest), _ = chunks(server, "/v1/completions", **asked)
    assert first["choices"][0]["prompt_logprobs"] == whole
    assert not any("prompt_logprobs" in chunk["choices"][0] for chunk in rest)
    (first, *_), _ = chunks(server, CHAT[0], prompt_logprobs=0, **CHAT[1])
    assert len(first["prompt_logprobs"]) == post(server, CHAT[0], **CHAT[1]).json()["usage"]["prompt_tokens"]
    line = post(server, "/generate_stream", prompt=STORY, max_tokens=3, prompt_logprobs=1).text.splitlines()[0]
    assert json.loads(line)["prompt_logprobs"] == whole


def test_a_beam_search_is_streamed_when_it_has_ended(server):
    asked = {"prompt": STORY, "max_tokens": 6, "n": 2, "use_beam_search": True}
    whole = post(server, "/v1/completions", **asked).json()
    streamed, _ = chunks(server, "/v1/completions", stream_options=USAGE, **asked)
    assert [chunk["choices"] for chunk in streamed[:-1]] == [[choice] for choice in whole["choices"]]
    counts = [answer["usage"]["completion_tokens"] for answer in (streamed[-1], whole)]
    assert counts[0] == counts[1]


def test_the_best_of_several_completions_have_the_likeliest_tokens(server):
    asked = {"prompt": STORY, "max_tokens": 8, "temperature": 1.2, "seed": 3, "logprobs": 0}
    candidates = post(server, "/v1/completions", n=6, **asked).json()["choices"]

    def mean(choice):
        values = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    ranked = sorted(candidates, key=mean, reverse=True)
    answer = post(server, "/v1/completions", n=2, best_of=6, **asked).json()
    assert [choice["text"] for choice in answer["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == sum(len(choice["logprobs"]["tokens"]) for choice in candidates)
    del asked["logprobs"]
    assert post(server, "/v1/completions", best_of=6, **asked).json()["choices"][0]["logprobs"] is None


def test_tokens_of_reasoning_are_counted_alike_on_every_route(server):
    whole = post(server, CHAT[0], return_token_ids=True, **CHAT[1]).json()
    count = whole["usage"]["completion_tokens_details"]["reasoning_tokens"]
    after = post(server, "/detokenize", tokens=whole["choices"][0]["token_ids"][count:]).json()["prompt"]
    assert after.startswith(whole["choices"][0]["message"]["content"])
    *_, last = chunks(server, CHAT[0], stream_options=USAGE, **CHAT[1])[0]
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    asked = {"input": QUESTION}
    response = post(server, "/v1/responses", **asked).json()
    assert response["usage"]["output_tokens_details"] == {"reasoning_tokens": count}
    message = post(server, "/v1/messages", max_tokens=100, messages=QUESTION).json()
    assert message["usage"]["output_tokens_details"] == {"thinking_tokens": count}
    assert "completion_tokens_details" not in post(server, COMPLETION[0], **COMPLETION[1]).json()["usage"]


def test_metadata_is_shown_again(server):
    answer = server.client.chat.completions.create(model="demo", messages=QUESTION, metadata={"a": "b"}, max_tokens=1)
    assert answer.metadata == {"a": "b"}


def test_the_examples_of_the_documentation_run(server):
    ran = []
    for path, methods in httpx.get(f"{server.url}/openapi.json").json()["paths"].items():
        for media in methods.get("post", {}).get("requestBody", {}).get("content", {}).values():
            if "example" in media:
                post(server, path, **media["example"])
                ran.append(path)
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"} <= set(ran)
