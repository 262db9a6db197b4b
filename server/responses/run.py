"""From a checked body of POST /v1/responses to its answer: whole, streamed, or made in the background."""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jax_engine.server.errors import ApiError
from jax_engine.server.gate import shutting_down
from jax_engine.server.in_flight import ShuttingDownError
from jax_engine.server.openai.answers import Answers, ChatAnswers
from jax_engine.server.openai.chat_prompt import FittedChat, fitted
from jax_engine.server.openai.chat_routes import PreparedChat, prepared_chat
from jax_engine.server.openai.extra_fields import renamed
from jax_engine.server.openai.frames import EVENT_STREAM
from jax_engine.server.openai.generation import STREAM_HEADERS, Generation, GenerationStream, generation
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.openai.reasoning_tokens import reasoning_counter
from jax_engine.server.responses.answers import LiveResponse, ResponseFrames, response_fields
from jax_engine.server.responses.items import checked_items, new_id
from jax_engine.server.responses.protocol import NAMES, ResponsesRequest
from jax_engine.server.responses.store import EventLog, ResponseStore, Stored
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings
from jax_engine.server.tracking import RequestRecord

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What it takes to run one response."""

    service: Service
    record: RequestRecord
    fit: FittedChat
    answers: Answers
    priority: int

    def stream(self, frames: ResponseFrames) -> GenerationStream:
        """The response as a stream."""
        return GenerationStream(
            self.service, self.record, [self.fit.prompt], self.fit.params, frames, self.answers, priority=self.priority
        )

    async def whole(self, live: LiveResponse, receive: Receive) -> None:
        """Run it to its end."""
        async with generation(
            self.service, self.record, [self.fit.prompt], self.fit.params, receive, priority=self.priority
        ) as running:
            await self._read(running, live)
        live.end()

    async def _read(self, running: Generation, live: LiveResponse) -> None:
        async for batch in running.batches():
            for number, output in batch:
                running.trackers[number].take(output)
                for completion in output.outputs:
                    logprobs = self.answers.logprobs(0, output, completion)
                    if completion.finish_reason is None:
                        exhaust(live.feed(completion.text, logprobs))
                    else:
                        exhaust(live.finish(completion.text, completion.finish_reason, logprobs))


async def answer_response(
    service: Service, store: ResponseStore, request: Request, asked: ResponsesRequest
) -> Response:
    """The response to a checked body."""
    record: RequestRecord = request.state.record
    record.adapter = service.adapter_of(asked.model)
    engine = service.engine()
    kept = is_kept(service.settings, asked)
    items = [*checked_items(earlier_items(store, asked)), *checked_items(listed(asked.input))]
    asked_chat = asked.chat(items)
    with renamed(NAMES):
        chat = await prepared_chat(service, asked_chat)
    try:
        fit = await fitted(engine, chat, name="input")
    except ApiError as error:
        if asked.truncation != "auto" or error.code != "context_length_exceeded":
            raise
        fit = await shortened(service, asked_chat, error)
    record.counter = reasoning_counter(chat.message_format, engine.token_texts)
    model = asked.model or service.settings.model_name
    fields = response_fields(asked, model=model, store=kept, params=fit.params)
    live = LiveResponse(
        new_id("resp"), fields, chat.message_format.parser(), record, encodes_reasoning=asked.encodes_reasoning
    )
    answers = (ChatAnswers if asked.shows_logprobs else Answers)(engine.token_texts, fit.params)
    run = Run(service, record, fit, answers, asked_chat.priority or 0)
    if asked.background:
        stored = store.keep(live, items)
        stored.log = EventLog()
        frames = ResponseFrames(live, ended=discard, obfuscate=asked.obfuscates)
        stored.task = asyncio.create_task(in_background(run, frames, stored, store), name=live.response_id)
        return LogStream(service, stored.log, 0) if asked.stream else json_response(live.content())
    keep = partial(store.keep, items=items) if kept else discard
    if asked.stream:
        return run.stream(ResponseFrames(live, ended=keep, obfuscate=asked.obfuscates))
    await run.whole(live, request.receive)
    keep(live)
    return json_response(live.content())


def is_kept(settings: ServerSettings, asked: ResponsesRequest) -> bool:
    """Whether the response is to be stored, as it is unless the client wants otherwise.

    Raises:
        ApiError: 400 for a wish that takes a store, where there is none. Each of several processes would have one of
            its own, and a client reaches any of them.
    """
    can = settings.response_store_bytes > 0 and settings.api_server_count == 1
    for name in ("store", "background", "previous_response_id"):
        if not can and getattr(asked, name):
            message = f"{name} needs stored responses, which this server has not; leave it out, or start it with "
            raise ApiError(
                400,
                message + "--api-server-count 1 and --response-store-bytes above 0",
                param=name,
                code="unsupported_parameter",
            )
    return can and asked.store is not False


def earlier_items(store: ResponseStore, asked: ResponsesRequest) -> list[dict[str, Any]]:
    """What the response before this one answered and said."""
    previous = asked.previous_response_id
    if previous is None:
        return []
    try:
        stored = store.get(previous)
    except ApiError as error:
        code = "previous_response_not_found"
        raise ApiError(400, error.message, param="previous_response_id", code=code) from None
    if stored.is_running:
        message = f"previous_response_id={previous!r} is still being made; wait until it has ended"
        raise ApiError(400, message, param="previous_response_id", code="invalid_value")
    return stored.conversation()


def listed(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An input as items."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


async def shortened(service: Service, asked: ChatCompletionRequest, error: ApiError) -> FittedChat:
    """The chat without as many of its first exchanges as it takes to fit; system messages stay.

    Raises:
        ApiError: `error`, when the last one alone does not fit.
    """
    begins = [number for number, message in enumerate(asked.messages) if message["role"] == "user"][1:]
    low, high, best = 0, len(begins), None
    while low < high:
        middle = (low + high) // 2
        kept = [
            message
            for number, message in enumerate(asked.messages)
            if number >= begins[middle] or message["role"] in ("system", "developer")
        ]
        chat: PreparedChat = await prepared_chat(service, msgspec.structs.replace(asked, messages=kept))
        try:
            best = await fitted(service.engine(), chat, name="input")
            high = middle
        except ApiError:
            low = middle + 1
    if best is None:
        raise error
    return best


async def in_background(run: Run, frames: ResponseFrames, stored: Stored, store: ResponseStore) -> None:
    """Make a response for whoever asks for it later."""
    assert stored.log is not None
    live = frames.live
    try:
        await run.stream(frames)({}, never, stored.log.send)
    except asyncio.CancelledError:  # by a client that cancels it, or at the server's end
        live.cancel()
        stored.log.append(b"", more=False)
    except (ApiError, ShuttingDownError) as error:  # before its first event
        refusal = error if isinstance(error, ApiError) else shutting_down()
        stored.log.append(frames.error(refusal), more=False)
    except Exception:  # nothing waits for this task: the log has it all
        logger.exception("response %s failed", live.response_id)
        refusal = ApiError(500, f"internal error; the server's log has it under {live.response_id}")
        stored.log.append(frames.error(refusal), more=False)
    finally:
        store.count(stored)


async def never() -> Message:
    """The messages of a client who never leaves."""
    return await asyncio.get_running_loop().create_future()


def discard(live: LiveResponse) -> None:
    """Keep nothing."""


def exhaust(events: Any) -> None:
    """Let events happen that nobody sees."""
    for _ in events:
        pass


class LogStream(Response):
    """The events of a response that is made in the background, from one of them on."""

    def __init__(self, service: Service, log: EventLog, start: int) -> None:
        super().__init__(media_type=EVENT_STREAM)
        self._service = service
        self._log = log
        self._start = start

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", EVENT_STREAM.encode()), *STREAM_HEADERS]
        async with self._service.in_flight.track(receive):
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for data in self._log.follow(self._start):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
