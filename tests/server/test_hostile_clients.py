"""Hostile clients beside good ones: 500 requests that mean harm, or know no better, while 50 streams run."""

import asyncio
import json
import random
import socket
import struct
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

NUM_GOOD = 50
NUM_HOSTILE = 500
AT_ONCE = 25
PATHS = ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/v1/responses", "/v1/messages")
MOST_GROWTH = 32 * 2**20  # bytes that the process may hold more than after a first round of the same


def post(body, path="/v1/completions", *, headers=(), length=None):
    """The bytes of a request."""
    length = len(body) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "host: test", "connection: close", f"content-length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*pieces):
    head = "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    return head.encode() + b"".join(pieces)


def field(chance, value):
    """A body with a value where it does not belong."""
    names = ("max_tokens", "temperature", "n", "stop", "logit_bias", "seed", "logprobs", "stream", "response_format")
    names += ("messages", "prompt", "tools", "input", "structured_outputs", "stream_options", "bad_words", "top_k")
    return json.dumps({"prompt": "a", "messages": [{"role": "user", "content": "a"}], chance.choice(names): value})


WRONG = (
    None,
    True,
    -1,
    10**30,
    1e308,
    "\0",
    "x" * 10_000,
    [],
    {},
    [[[]]],
    {"a": {"b": {}}},
    [None],
    ["\ud800"],
    -(2**63),
)
HUGE = ("9" * 10_000, "1e999999", "-0." + "0" * 5000 + "1", "NaN", "-Infinity", "1" + "0" * 400)
EVIL_FORMS = (
    {"regex": "(a+)+$" * 50},
    {"regex": "(" * 5000},
    {"grammar": "start: start start"},
    {"grammar": "start: " + "a " * 10_000},
    {"choice": ["x" * 1000] * 1000},
    {"json": {"$ref": "#"}},
    {"json": {"allOf": [{"$ref": "#/allOf/0"}]}},
)
# Each makes what one client sends: bytes, or several of them with a pause between. A client leaves after the last one
# unless it waits for an answer.
HOSTILE = {
    "broken JSON": lambda chance: post(b'{"prompt": "a", ' * chance.randrange(1, 9), chance.choice(PATHS)),
    "deep nesting": lambda chance: post(chance.choice((b"[", b'{"a":')) * 100_000, chance.choice(PATHS)),
    "nesting in a field": lambda chance: post(b'{"prompt": "a", "tools": ' + b"[" * 900 + b"]" * 900 + b"}"),
    "huge numbers": lambda chance: post(
        b'{"prompt": "a", "max_tokens": 1, "temperature": %b}' % chance.choice(HUGE).encode()
    ),
    "wrong types": lambda chance: post(field(chance, chance.choice(WRONG)).encode(), chance.choice(PATHS)),
    "invalid UTF-8": lambda chance: post(b'{"prompt": "\xff\xc0\xaf"}', chance.choice(PATHS)),
    "no UTF-8 at all": lambda chance: post(chance.randbytes(1000), chance.choice(PATHS)),
    "evil forms": lambda chance: post(
        json.dumps({"prompt": "a", "max_tokens": 1, "structured_outputs": chance.choice(EVIL_FORMS)}).encode()
    ),
    "too long a prompt": lambda chance: post(json.dumps({"prompt": [5] * 100_000}).encode()),
    "too large a body": lambda chance: post(b"a" * 2**21),
    "a slow body": lambda chance: [post(b'{"prom', length=1000), *[b"p"] * 20],
    "a body that ends early": lambda chance: [post(b'{"prompt": "a"', length=1000)],
    "a head that ends early": lambda chance: [b"POST /v1/completions HTTP/1.1\r\nhost: te"],
    "silence": lambda chance: [b"", b"", b""],
    "a flood of headers": lambda chance: post(b"{}", headers=[f"x-{number}: y" for number in range(2000)]),
    "a flood in one header": lambda chance: post(b"{}", headers=["x: " + "y" * 10**6]),
    "two lengths": lambda chance: post(b"{}", headers=["content-length: 5"]),
    "a negative length": lambda chance: post(b"{}", length=-1),
    "a length and chunks": lambda chance: post(b"0\r\n\r\n", headers=["transfer-encoding: chunked"]),
    "bad chunks": lambda chance: chunked(b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunks of a byte": lambda chance: chunked(*[b"1\r\na\r\n"] * 5000, b"0\r\n\r\n"),
    "another's files": lambda chance: (
        b"GET /../../../etc/passwd%00 HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"
    ),
    "a header that forges another": lambda chance: post(b"{}", headers=["x-request-id: a\rset-cookie: b"]),
    "many requests in one": lambda chance: (
        b"GET /v1/models HTTP/1.1\r\nhost: test\r\n\r\n" * 50 + b"GET /version HTTP/1.1\r\nconnection: close\r\n\r\n"
    ),
    "no HTTP": lambda chance: chance.randbytes(chance.randrange(1, 2000)) + b"\r\n\r\n",
}


async def attack(address, chance, kind):
    """Be one client of that kind; returns the status of each answer that it got."""
    made = HOSTILE[kind](chance)
    reader, writer = await asyncio.open_connection(*address)
    try:
        for piece in [made] if isinstance(made, bytes) else made:
            writer.write(piece)
            if not isinstance(made, bytes):
                await asyncio.sleep(0.05)
        ending = chance.choice(("wait", "half-close", "reset")) if isinstance(made, bytes) else "reset"
        if ending == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return []
        if ending == "half-close":
            writer.write_eof()
        answer = b""
        async with asyncio.timeout(60):
            while piece := await reader.read(2**16):
                answer += piece
        return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]
    except (ConnectionError, BrokenPipeError):
        return []
    finally:
        writer.close()


async def attacks(address, count, first=0):
    """Many of them, of all kinds; returns the statuses that each kind got."""
    places = asyncio.Semaphore(AT_ONCE)
    statuses = {kind: set() for kind in HOSTILE}
    kinds = list(HOSTILE)

    async def one(number):
        async with places:
            kind = kinds[number % len(kinds)]
            statuses[kind].update(await attack(address, random.Random(number), kind))

    await asyncio.gather(*(one(first + number) for number in range(count)))
    return statuses


async def stream(http, prompt):
    """The text of a stream, read to its end."""
    body = {"prompt": prompt, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "stream": True}
    text = ""
    async with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line:
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    raise AssertionError("the stream ended without [DONE]")


def resident_bytes(server):
    """Memory of the server's process, which is what clients talk to; the core's grows while programs compile."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads memory from /proc")
async def test_good_streams_do_not_notice_hostile_clients(server):
    url = urlsplit(server.url)
    address = (url.hostname, url.port)
    prompts = [f"Once upon a time there was a {noun}" for noun in ("dog", "cat", "king", "bird", "girl")]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=240) as http:
        alone = {prompt: await stream(http, prompt) for prompt in prompts}
        await attacks(address, 2 * len(HOSTILE))  # after which the process has grown to what such clients take
        before = resident_bytes(server)
        good = [asyncio.create_task(stream(http, prompts[number % 5])) for number in range(NUM_GOOD)]
        statuses = await attacks(address, NUM_HOSTILE)
        texts = await asyncio.gather(*good)
        assert [text == alone[prompts[number % 5]] for number, text in enumerate(texts)] == [True] * NUM_GOOD
        assert (await http.get("/health")).json()["status"] == "ready"
    assert {kind: [status for status in got if status >= 500] for kind, got in statuses.items()} == {
        kind: [] for kind in HOSTILE
    }
    refused = [kind for kind, got in statuses.items() if any(400 <= status < 500 for status in got)]
    assert len(refused) > len(HOSTILE) / 2, statuses
    grown = resident_bytes(server) - before
    assert grown < MOST_GROWTH
    server.wait_for(server.all_pages_are_free, what="freeing all pages")
    assert "Traceback" not in server.log()
