"""`--data-parallel-size`: several engines behind one front end are one server to its clients."""

import os
import signal
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from counting_model import CountingModel

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes by /proc")
NUM_REPLICAS = 2
PAGE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return CountingModel.write(tmp_path_factory.mktemp("counting"), max_model_len=8192)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory, launch_server):
    running = launch_server(
        tmp_path_factory.mktemp("server"),
        *(str(model.folder), "--served-model-name", "counting", "--data-parallel-size", str(NUM_REPLICAS)),
        *("--max-num-seqs", "8", "--max-num-batched-tokens", "16", "--kv-cache-memory-bytes", "8M"),
        *("--block-size", str(PAGE), "--enable-admin-routes"),
    )
    running.wait_for(running.is_ready, what="ready", seconds=240)
    yield running
    running.client.close()
    if running.process.poll() is None:
        running.stop()


def by_engine(server, name, **labels):
    return [server.metric(name, engine=str(engine), **labels) for engine in range(NUM_REPLICAS)]


def complete(server, prompt, max_tokens=4, **options):
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **options}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status().json()


def growth(server, name, before):
    return [now - then for now, then in zip(by_engine(server, name), before, strict=True)]


def test_requests_of_one_beginning_go_where_it_is_cached(model, server):
    steps, hits = by_engine(server, "jax_engine:steps_total"), by_engine(server, "vllm:prefix_cache_hits_total")
    ended = by_engine(server, "vllm:request_success_total", finished_reason="length")
    for turn in range(1, 6):
        answer = complete(server, model.prompt(turn * 8 * PAGE))
        assert answer["choices"][0]["text"] == model.answer(turn * 8 * PAGE, 4)
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
    worked = growth(server, "jax_engine:steps_total", steps)
    assert sorted(map(bool, worked)) == [False, True], "one replica did all of it"
    chosen = worked.index(max(worked))
    assert growth(server, "vllm:prefix_cache_hits_total", hits)[chosen] > 0
    finished = by_engine(server, "vllm:request_success_total", finished_reason="length")
    assert finished[chosen] - ended[chosen] == 5
    assert finished[1 - chosen] == ended[1 - chosen]


def test_prompts_of_one_request_are_spread(model, server):
    counts = by_engine(server, "vllm:request_generation_tokens_count")
    prompts = [model.token_ids[start : start + 5] for start in range(8)]
    answer = complete(server, prompts, n=2)
    assert len(answer["choices"]) == 16
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [model.answer(start + 5, 4) for start in range(8) for _ in range(2)]
    assert growth(server, "vllm:request_generation_tokens_count", counts) == [4, 4]


def test_what_is_drawn_does_not_depend_on_the_replica(server):
    used = by_engine(server, "vllm:request_generation_tokens_count")
    options = {"temperature": 100.0, "ignore_eos": True}  # as good as even
    seeded = [complete(server, [20], 8, seed=7, **options)["choices"][0]["text"] for _ in range(4)]
    assert min(growth(server, "vllm:request_generation_tokens_count", used)) > 0, "both replicas answered"
    assert len(set(seeded)) == 1
    unseeded = [complete(server, [20], 8, **options)["choices"][0]["text"] for _ in range(4)]
    assert len(set(unseeded)) == 4, "equal counts at two replicas must not mean equal draws"


def test_requests_on_all_replicas_are_aborted(model, server):
    results = []

    def post():
        results.append(complete(server, model.prompt(3), 8000, ignore_eos=True)["choices"][0]["finish_reason"])

    clients = [threading.Thread(target=post) for _ in range(6)]
    for client in clients:
        client.start()
    server.wait_for(lambda: by_engine(server, "vllm:num_requests_running") == [3, 3], what="running on both")
    busy = httpx.post(f"{server.url}/sleep")
    assert (busy.status_code, busy.json()["error"]["code"]) == (409, "engine_busy")
    assert httpx.post(f"{server.url}/abort_requests", json={}).status_code == 200
    for client in clients:
        client.join()
    assert Counter(results) == {"abort": 6}
    server.wait_for(server.all_pages_are_free, what="freeing all pages")


def test_all_replicas_sleep_and_wake_up_together(model, server):
    try:
        assert httpx.post(f"{server.url}/sleep").json() == {"is_sleeping": True}
        views = [httpx.get(f"{server.url}/engine_state?engine={engine}").json() for engine in range(NUM_REPLICAS)]
        assert [state["view"]["is_sleeping"] for state in views] == [True, True]
        refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": [1, 2], "max_tokens": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_asleep")
    finally:
        assert httpx.post(f"{server.url}/wake_up").json() == {"is_sleeping": False}
    assert httpx.get(f"{server.url}/is_sleeping").json() == {"is_sleeping": False}
    assert complete(server, model.prompt(9))["choices"][0]["text"] == model.answer(9, 4)
    assert httpx.post(f"{server.url}/reset_prefix_cache").json() == {"reset": True}


def test_one_sleeper_is_woken_again_when_another_is_busy(model, server):
    """One long request: the replica beside it is idle, and would sleep alone."""
    done = []
    client = threading.Thread(target=lambda: done.append(complete(server, model.prompt(3), 8000, ignore_eos=True)))
    client.start()
    server.wait_for(lambda: sum(by_engine(server, "vllm:num_requests_running")) == 1, what="running")
    assert httpx.post(f"{server.url}/sleep").status_code == 409
    assert httpx.get(f"{server.url}/is_sleeping").json() == {"is_sleeping": False}
    httpx.post(f"{server.url}/abort_requests", json={})
    client.join()
    assert done[0]["choices"][0]["finish_reason"] == "abort"


def test_each_replica_shows_itself(server):
    state = httpx.get(f"{server.url}/engine_state?engine=1").json()
    assert (state["engine"], state["engines"]) == (1, NUM_REPLICAS)
    assert state["view"]["totals"]["steps"] == server.metric("jax_engine:steps_total", engine="1")
    wrong = httpx.get(f"{server.url}/engine_state?engine=2")
    assert wrong.status_code == 400
    assert "must be from 0 to 1" in wrong.json()["error"]["message"]
    assert min(by_engine(server, "jax_engine:kv_pages")) > 0


def test_offline_inference_refuses_replicas():
    from jax_engine import LLM

    with pytest.raises(ValueError, match=r"data_parallel_size=2 is for servers .* must be 1 here; start a process"):
        LLM(data_parallel_size=2)


def test_when_a_replica_dies_the_server_says_which_and_ends(server):
    """The last test: nothing is left of the server."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    cores = [int(pid) for pid in children if "core_process" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(cores) == NUM_REPLICAS
    assert "Traceback" not in server.log()
    os.kill(cores[1], signal.SIGKILL)
    assert server.process.wait(60) == 1
    assert "the engine core 1 was ended by signal SIGKILL" in server.log().splitlines()[-1]
    assert not [pid for pid in cores if Path(f"/proc/{pid}").exists()], "nothing may stay behind"
