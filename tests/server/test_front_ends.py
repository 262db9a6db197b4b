"""Several front ends before one engine core: one server to its clients, which lives and ends as one."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from counting_model import CountingModel

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="finds the processes by /proc")
NUM_FRONT_ENDS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CountingModel:
    """Starts in seconds, and its answers are known."""
    return CountingModel.write(tmp_path_factory.mktemp("counting"), max_model_len=8192)


@pytest.fixture
def start(model, start_server) -> Callable:
    def start_front_ends(*options):
        small = ("--max-num-seqs", "8", "--max-num-batched-tokens", "8", "--kv-cache-memory-bytes", "8M")
        return start_server(str(model.folder), *small, "--api-server-count", str(NUM_FRONT_ENDS), *options)

    return start_front_ends


def pids_of(server, module):
    """The server's child processes that run `module`."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return [int(pid) for pid in children if module in Path(f"/proc/{pid}/cmdline").read_text()]


async def test_clients_see_one_server(model, start):
    server = start("--served-model-name", "counting", "--enable-admin-routes")
    prompt, count = model.prompt(5), 24

    async def answer(number):
        # A client each, so that each has a connection of its own.
        async with server.async_client as client:
            asked = {"model": "counting", "prompt": prompt, "max_tokens": count, "temperature": 0}
            if number % 2:
                return (await client.completions.create(**asked)).choices[0].text
            chunks = await client.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].text async for chunk in chunks])

    answers = await asyncio.gather(*(answer(number) for number in range(16)))
    assert set(answers) == {model.answer(5, count)}
    # A line is written when its answer is, which the client may have read by then.
    server.wait_for(lambda: server.log().count("POST /v1/completions 200") == 16, what="a line for each request")
    assert len(pids_of(server, "front_end")) == NUM_FRONT_ENDS
    # Whichever front end answers, it answers for all.
    for _ in range(8):
        assert server.metric("vllm:request_success_total", finished_reason="length") == 16
        assert server.metric("vllm:request_generation_tokens_sum") == 16 * count
        assert server.metric("vllm:e2e_request_latency_seconds_count") == 16
        assert server.metric("process_resident_memory_bytes") > 100e6
        assert httpx.get(f"{server.url}/engine_state").json()["view"]["totals"]["generation_tokens"] == 16 * count
    await unseeded_requests_differ(server)
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
    assert httpx.post(f"{server.url}/reset_prefix_cache").json() == {"reset": True}
    assert server.stop() == 0
    assert "Traceback" not in server.log()


async def unseeded_requests_differ(server):
    """Every front end counts its own requests: equal counts must not mean equal draws."""
    texts = []
    for _ in range(12):
        async with httpx.AsyncClient() as client:
            body = {"prompt": [20, 21], "max_tokens": 8, "temperature": 100.0}  # as good as even
            response = await client.post(f"{server.url}/v1/completions", json=body)
        texts.append(response.json()["choices"][0]["text"])
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(("victim", "why"), [("core_process", "the engine core"), ("front_end", "front end")])
def test_when_one_process_dies_the_server_says_so_and_ends(model, start, victim, why):
    server = start()
    results = []

    def post():
        body = {"prompt": model.prompt(4), "max_tokens": 8000, "temperature": 0, "stream": True, "ignore_eos": True}
        try:
            results.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).text)
        except httpx.TransportError:
            results.append(None)  # it was the victim's own

    clients = [threading.Thread(target=post) for _ in range(6)]
    for client in clients:
        client.start()
    server.wait_for(lambda: server.metric("vllm:num_requests_running") == len(clients), what="running")
    processes = [*pids_of(server, "front_end"), *pids_of(server, "core_process")]
    os.kill(pids_of(server, victim)[0], signal.SIGKILL)
    for client in clients:
        client.join()
    assert server.process.wait(60) == 1
    told = [json.loads(text.split("\n\n")[-3].removeprefix("data: ")) for text in results if text is not None]
    assert {answer["error"]["code"] for answer in told} <= {"engine_dead"}
    assert len(told) == len(clients) or victim == "front_end"
    last = server.log().splitlines()[-1]
    assert last.startswith("jax-engine serve: error: ")
    assert why in last
    assert "SIGKILL" in last
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()], "nothing may stay behind"


def test_a_model_that_does_not_exist_is_one_line(tmp_path, start_server):
    server = start_server(str(tmp_path / "no-model"), "--api-server-count", "2", ready=False)
    assert server.process.wait(60) == 2
    assert "does not exist" in server.log().splitlines()[-1]
    assert server.log().count("does not exist") == 1
    assert "Traceback" not in server.log()
