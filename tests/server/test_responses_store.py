"""What is kept of responses, and what becomes of their events, without an engine."""

import asyncio
import json

import pytest

from jax_engine.server.errors import ApiError
from jax_engine.server.openai.message_parts import MessageFormat
from jax_engine.server.parsers.reasoning import ReasoningFormat
from jax_engine.server.responses.answers import LiveResponse, OutputWriter
from jax_engine.server.responses.protocol import ResponsesRequest
from jax_engine.server.responses.run import is_kept
from jax_engine.server.responses.store import EventLog, ResponseStore
from jax_engine.server.settings import ServerSettings
from jax_engine.server.tracking import RequestRecord


def ended(name, text="hello"):
    live = LiveResponse(name, {"background": False}, MessageFormat().parser(), RequestRecord("r"))
    list(live.begin())
    list(live.finish(text, "stop", None))
    live.end()
    return live


def test_the_responses_used_longest_ago_make_room():
    size = ResponseStore(10**6).keep(ended("a"), []).num_bytes
    store = ResponseStore(3 * size)
    for name in "abc":
        store.keep(ended(name), [])
    store.get("a")
    store.keep(ended("d"), [])
    assert [name for name in "abcd" if name in store] == ["a", "c", "d"]
    store.keep(ended("e", "long" * size), [])
    assert [name for name in "abcde" if name in store] == [], "it fits in no place at all"
    with pytest.raises(ApiError, match="'e'"):
        store.get("e")


def begun(name):
    return LiveResponse(name, {"background": True}, MessageFormat().parser(), RequestRecord("r"))


async def test_a_response_that_is_being_made_stays_and_too_many_of_them_are_refused():
    store = ResponseStore(3 * ResponseStore(10**6).keep(begun("a"), []).num_bytes)
    running = [store.keep(begun(name), []) for name in "abc"]
    running[0].task = asyncio.create_task(asyncio.sleep(60))
    store.keep(ended("d"), [])
    assert [name for name in "abcd" if name in store] == ["a", "b", "c"]
    with pytest.raises(ApiError, match="too many responses are being made") as caught:
        store.keep(begun("e"), [])
    assert (caught.value.status, "e" in store) == (503, False)
    assert json.loads(store.get("a").content)["status"] == "queued"
    await store.close()
    assert running[0].task.cancelled()


async def test_events_are_followed_from_any_of_them_while_they_come():
    log = EventLog()

    async def follow(start):
        return b"".join([data async for data in log.follow(start)])

    log.append(b"event: a\n\nevent: b\n\n", more=True)
    followers = [asyncio.create_task(follow(start)) for start in (0, 1, 3)]
    await asyncio.sleep(0)
    log.append(b"event: c\n\n", more=True)
    await asyncio.sleep(0)
    log.append(b"event: d\n\n", more=False)
    whole = b"event: a\n\nevent: b\n\nevent: c\n\nevent: d\n\n"
    assert await asyncio.gather(*followers) == [whole, whole[10:], whole[30:]]
    assert await follow(9) == b""
    assert log.num_bytes == len(whole)


def test_a_store_takes_one_process_and_some_room():
    def kept(settings, **fields):
        return is_kept(settings, ResponsesRequest(input="a", **fields))

    assert kept(ServerSettings())
    assert not kept(ServerSettings(), store=False)
    for settings in (ServerSettings(api_server_count=2), ServerSettings(response_store_bytes=0)):
        assert not kept(settings)
        for field in ({"store": True}, {"background": True}, {"previous_response_id": "resp_1"}):
            with pytest.raises(ApiError, match="--api-server-count 1") as caught:
                kept(settings, **field)
            assert [caught.value.param] == list(field)


def test_blanks_between_reasoning_and_an_answer_make_no_item():
    writer = OutputWriter(MessageFormat(reasoning=ReasoningFormat()).parser(), encodes_reasoning=False)
    for piece in ("<think>a", "</think>", "\n", "\n"):
        list(writer.feed(piece, None))
    list(writer.finish("", None, "completed"))
    assert [item["type"] for item in writer.items] == ["reasoning"]
    assert writer.items[0]["content"][0]["text"] == "a"
