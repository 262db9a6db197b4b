"""What clients leave behind: nothing. And what one costs that stays, but does not read: no more than one that does."""

import asyncio
import contextlib
import json
import random
import socket
import time
from urllib.parse import urlsplit

import httpx

NUM_STALLED = 2  # completions of one stream, 1,900 tokens each: over 1 MB of events


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


def open_stream_and_stop_reading(server, body):
    """A connection that asked for a stream, with as little room for what comes as the system allows."""
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    address = urlsplit(server.url)
    stalled.connect((address.hostname, address.port))
    content = json.dumps(body).encode()
    # Every event repeats the request id: with a long one, fewer of them fill the system's own buffer.
    headers = {"Host": "test", "Connection": "close", "Content-Length": len(content), "X-Request-Id": "x" * 128}
    lines = ["POST /v1/completions HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    stalled.sendall("\r\n".join(lines).encode() + content)
    return stalled


def test_a_client_that_stops_reading_is_owed_little_and_slows_nobody(server):
    """Its tokens are generated and wait as numbers; of text, the server holds a connection's buffer and one chunk."""
    body = {"prompt": "Once upon a time", "max_tokens": 1900, "ignore_eos": True, "temperature": 0}
    body |= {"n": NUM_STALLED, "stream": True, "stream_options": {"include_usage": True}}
    with open_stream_and_stop_reading(server, body) as stalled:
        server.wait_for(lambda: server.metric("vllm:num_requests_running") == NUM_STALLED, what="running")
        start = time.monotonic()
        other = httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": 50, "n": 1}, timeout=60)
        assert other.text.endswith("data: [DONE]\n\n")
        assert server.metric("vllm:num_requests_running") >= NUM_STALLED, "it was answered beside the stalled ones"
        assert time.monotonic() - start < 30
        server.wait_for(server.all_pages_are_free, what="generating to the end, unread")
        stalled.settimeout(60)
        data = b"".join(iter(lambda: stalled.recv(1 << 16), b""))
    events = [part for part in data.decode().split("data: ") if part.startswith("{")]
    usage = json.loads(events[-1].split("\n\n")[0])["usage"]
    assert usage["completion_tokens"] == NUM_STALLED * 1900
    # What no buffer had room for came together, in one chunk for each completion.
    assert len(events) < usage["completion_tokens"] * 2 / 3, "the server has buffered an event for every token"
