"""What clients leave behind: nothing."""

import asyncio
import contextlib
import random

import httpx


async def stream_tokens(client, base_url, number, *, abort_after):
    """Read a stream, leaving after `abort_after` chunks; returns whether it was read to the end."""
    body = {
        "prompt": f"Once upon a time {number}",
        "max_tokens": random.Random(number).randrange(20, 120),
        "stream": True,
        "ignore_eos": True,
    }
    chunks = 0
    async with client.stream("POST", f"{base_url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            chunks += line.startswith("data: {")
            if abort_after is not None and chunks > abort_after:
                return False
            if line == "data: [DONE]":
                return True
    raise AssertionError("the stream ended without [DONE]")


async def test_200_streams_with_random_aborts_leave_no_page_in_use(server):
    chance = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    pages_in_use = []

    async def watch():
        while True:
            pages_in_use.append(await asyncio.to_thread(server.metric, "jax_engine:kv_pages_in_use"))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    async with httpx.AsyncClient(limits=limits, timeout=240) as client:
        aborts = [chance.choice([None, None, 0, 1, chance.randrange(2, 20)]) for _ in range(200)]
        done = await asyncio.gather(
            *(stream_tokens(client, server.url, number, abort_after=after) for number, after in enumerate(aborts))
        )
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert done == [after is None for after in aborts]
    assert max(pages_in_use) > 0
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
    assert server.metric("jax_engine:compiles_in_request_path_total") == 0


def test_a_client_that_leaves_before_the_answer_frees_its_pages(server):
    """Not streamed: nothing is written that could fail, so the server has to watch the connection."""
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    body = {"prompt": ["Once upon a time"] * 2, "max_tokens": 1900, "ignore_eos": True}
    with contextlib.suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 2
    server.wait_for(lambda: "(the client left)" in server.log(), what="the log line")


def test_a_bad_second_prompt_stops_the_first(server):
    body = {"prompt": ["Once upon a time", ""], "max_tokens": 1900, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 400
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
