"""GET /, a page to chat and to see the engine at work; GET /engine_state, what it shows of the engine."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from msgspec.structs import asdict
from starlette.exceptions import HTTPException
from starlette.responses import Response

import jax_engine
from jax_engine.core.core_client import EngineDeadError
from jax_engine.core.engine_view import EngineView
from jax_engine.core.stats import EngineStats
from jax_engine.server.admin_routes import query
from jax_engine.server.errors import ApiError
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.operations_routes import condition
from jax_engine.server.page_files import page_files
from jax_engine.server.schemas import query_schema
from jax_engine.server.service import Service

VIEW_SECONDS = 2.0  # how long the core may take to answer, which a step that is long holds up

# Counters as a view has them: whoever looks twice knows the rates.
TOTALS = (
    *("steps_total", "prompt_tokens_total", "generation_tokens_total", "token_rows_total", "padding_tokens_total"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "host_cache_queries_total", "host_cache_hits_total"),
    *("spec_draft_tokens_total", "spec_accepted_tokens_total", "preemptions_total", "refused_requests_total"),
)


def page_router(service: Service) -> APIRouter:
    """The page and what it shows. Its files need no API key; what it asks for does."""
    router = APIRouter(tags=["page"])
    count = service.engine_config.data_parallel_size
    numbers = {"type": "integer", "minimum": 0, "maximum": count - 1, "default": 0}

    @router.get("/", include_in_schema=False)
    @router.get("/page/{name}", include_in_schema=False)
    async def page(request: Request, name: str | None = None) -> Response:
        """One of the page's files."""
        file = page_files().get("/" if name is None else f"/page/{name}")
        if file is None:
            raise HTTPException(404)
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    @router.get("/engine_state", openapi_extra=query_schema({"name": "engine", "schema": numbers}))
    async def engine_state(request: Request) -> Response:
        """The engine at this moment, from the time on when it starts: requests, KV pages, the latest steps, counters.
        Of several replicas, the one that `engine` names.

        `view` is null before the engine is ready, and where it does not answer within two seconds. A cell of the map
        counts pages with one user, with several, that hold a known prefix for none, and that hold nothing.
        """
        engine = engine_number(request, count)
        view = await look(service, engine)
        about = {"version": jax_engine.__version__, "created": service.created, "engine": engine, "engines": count}
        server = {**about, **condition(service)}
        return json_response({**server, "reason": reason(service), "view": view and as_json(view)})

    return router


def engine_number(request: Request, count: int) -> int:
    """Which replica is asked for; ApiError 400 where there is none of that number."""
    (text,) = query(request, "engine") or ["0"]
    if not text.isdecimal() or int(text) >= count:
        message = f"engine={text!r} must be from 0 to {count - 1}; this server has data_parallel_size={count}"
        raise ApiError(400, message, param="engine", code="invalid_value")
    return int(text)


async def look(service: Service, engine: int) -> EngineView | None:
    """A view of a replica's engine; None where there is none to look at."""
    try:
        return await asyncio.wait_for(service.engine().views[engine].latest(), VIEW_SECONDS)
    except (ApiError, EngineDeadError, TimeoutError):
        return None


def reason(service: Service) -> str | None:
    """Why requests are not served; None where they are."""
    try:
        service.check_ready()
    except ApiError as error:
        return error.message
    return None


def as_json(view: EngineView) -> dict[str, Any]:
    """A view with names for all of its figures."""
    stats = view.stats
    return {
        "time": view.time,
        "is_sleeping": view.is_sleeping,
        "requests": {
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "max_running": view.max_num_seqs,
            "first_running": [asdict(request) for request in view.running],
            "first_waiting": [asdict(request) for request in view.waiting],
        },
        "pages": {
            "total": stats.num_pages,
            "in_use": stats.num_pages_in_use,
            "cached": view.num_cached_pages,
            "page_size": stats.page_size,
            "pages_per_cell": view.pages_per_cell,
            "is_sampled": view.is_sampled,
            "cells": view.cells,
        },
        "host_pages": {"total": stats.num_host_pages, "in_use": stats.num_host_pages_in_use},
        "steps": [asdict(step) for step in view.steps],
        "totals": totals(stats),
    }


def totals(stats: EngineStats) -> dict[str, int]:
    """The counters that the page shows."""
    return {name.removesuffix("_total"): getattr(stats, name) for name in TOTALS}
