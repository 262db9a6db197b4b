"""A server with a bound on what is in flight and priorities: who is turned away, who goes first."""

import threading
import time

import httpx
import openai
import pytest

ENDLESS = {"prompt": "Once upon a time", "max_tokens": 700, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def server(start_server):
    return start_server(
        *("--max-num-queued-reqs", "3", "--scheduling-policy", "priority", "--max-num-seqs", "2"),
        *("--kv-cache-memory-bytes", "64M"),
    )


def post(server, path="v1/completions", **fields):
    return httpx.post(f"{server.url}/{path}", json={**ENDLESS, **fields}, timeout=120)


def test_a_full_server_says_when_to_come_back_and_the_urgent_go_first(server):
    ended = {}

    def ask(name, **fields):
        ended[name] = (post(server, **fields).status_code, time.monotonic())

    busy = [threading.Thread(target=ask, args=(f"busy {index}",), kwargs={"priority": 1}) for index in range(2)]
    for thread in busy:
        thread.start()
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == 2, what="running")
    for fields in ({"n": 2}, {"prompt": ["a", "b"]}, {"prompt": ["a", "b"], "stream": True}):
        refused = post(server, **fields)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "queue_overflow")
        assert "max_num_queued_reqs=3" in error["message"]
    with pytest.raises(openai.InternalServerError, match="max_num_queued_reqs=3"):
        server.client.completions.create(model="demo", prompt="a", n=2)
    assert post(server, "generate", n=4).status_code == 400, "so many never fit"

    ask("urgent", max_tokens=20, priority=-1)
    assert len(ended) == 1, "it took a slot from one of the two, and ended before both"
    for thread in busy:
        thread.join()
    assert {status for status, _ in ended.values()} == {200}
    assert server.metric("jax_engine:requests_refused_total") == 8
    assert server.metric("vllm:num_preemptions_total") == 1
    assert server.metric("vllm:request_success_total", finished_reason="abort") == 0
