"""OpenAI's Responses API: POST /v1/responses, and what may be done with a response afterwards."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, FastAPI, Query, Request
from starlette.responses import Response

from jax_engine.server.body import read_body
from jax_engine.server.errors import ApiError
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.responses.protocol import ResponsesRequest
from jax_engine.server.responses.run import LogStream, answer_response
from jax_engine.server.responses.store import EventLog, ResponseStore, Stored
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service

MAX_ITEMS = 100
ITEMS = 20  # shown when no number is asked for


def responses_router(service: Service) -> APIRouter:
    """The routes of the Responses API, with a store of their own."""
    store = ResponseStore(service.settings.response_store_bytes)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await store.close()

    router = APIRouter(tags=["OpenAI responses"], lifespan=lifespan)
    limit = service.settings.max_request_body_bytes

    @router.post("/v1/responses", openapi_extra=body_schema(ResponsesRequest, example={"input": "What is 17 + 25?"}))
    async def create(request: Request) -> Response:
        """Answer a conversation, whole, as a stream of events, or in the background."""
        asked = ResponsesRequest.from_body(await read_body(request, limit=limit))
        return await answer_response(service, store, request, asked)

    @router.get("/v1/responses/{response_id}")
    async def retrieve(
        response_id: str,
        stream: Annotated[bool, Query(description="follow one that is made in the background")] = False,
        starting_after: Annotated[int, Query(ge=-1, description="number of the last event that is known")] = -1,
    ) -> Response:
        """A stored response, or its events."""
        stored = store.get(response_id)
        if stream:
            return LogStream(service, log_of(stored, "stream", "is not streamed again"), starting_after + 1)
        return Response(stored.content, media_type="application/json")

    @router.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        """End a response that is made in the background; one that has ended stays as it is."""
        stored = store.get(response_id)
        log_of(stored, "response_id", "ends when its connection is closed")
        await stored.cancel()
        return Response(stored.content, media_type="application/json")

    @router.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Response:
        """Forget a response; one that is being made ends."""
        await store.remove(response_id).cancel()
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.get("/v1/responses/{response_id}/input_items")
    async def input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_ITEMS)] = ITEMS,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
        after: Annotated[str | None, Query(description="id of the item that they follow")] = None,
    ) -> Response:
        """What a response answers, the latest first unless asked otherwise."""
        return json_response(item_page(store.get(response_id), limit=limit, order=order, after=after))

    return router


def log_of(stored: Stored, param: str, instead: str) -> EventLog:
    """The events of a response that is made in the background; ApiError 400 for another, which is told `instead`."""
    if stored.log is None:
        message = f"a response that was not made with background=true {instead}"
        raise ApiError(400, message, param=param, code="invalid_value")
    return stored.log


def item_page(stored: Stored, *, limit: int, order: str, after: str | None) -> dict[str, object]:
    """OpenAI's list object of some input items."""
    items = msgspec.json.decode(stored.items)
    if order == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    if after is not None:
        if after not in ids:
            raise ApiError(400, f"after={after!r} is no item of this response", param="after", code="invalid_value")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return {
        "object": "list",
        "data": page,
        "first_id": ends[0],
        "last_id": ends[1],
        "has_more": len(items) > len(page),
    }
