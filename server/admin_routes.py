"""POST /sleep, /wake_up, /abort_requests, /start_profile and /stop_profile, GET /is_sleeping; as vLLM names them."""

from collections.abc import Awaitable, Callable

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from jax_engine.async_llm import AsyncLLM
from jax_engine.core.admin_client import EngineBusyError
from jax_engine.core.core_client import EngineDeadError
from jax_engine.server.body import read_body
from jax_engine.server.errors import ApiError, bad_request, unavailable
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.schemas import body_schema, query_schema
from jax_engine.server.service import Service
from jax_engine.server.validation import decode, unknown_parameter

LEVEL = {"name": "level", "schema": {"type": "integer", "enum": [1, 2], "default": 1}}
TAGS = {"name": "tags", "schema": {"type": "array", "items": {"enum": ["weights", "kv_cache"]}}}
# The clients' ids, in front of which some answers' ids have more.
ID_PREFIXES = ("cmpl-", "chatcmpl-", "resp_", "msg_", "embd-", "pool-", "score-", "rerank-")


class AbortRequests(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /abort_requests: ids of requests (`X-Request-Id`) or of their answers; null or left out: all."""

    request_ids: list[str] | None = None


def admin_router(service: Service) -> APIRouter:
    """Routes for operators: they refuse without `--enable-admin-routes`, those for profiles without `--profile-dir`."""
    router = APIRouter(tags=["administration"])
    limit = service.settings.max_request_body_bytes

    def engine(*, flag: str, is_on: bool) -> AsyncLLM:
        if not is_on:
            raise ApiError(403, f"this server does not let clients do that; start it with {flag}", code="route_is_off")
        return service.engine()

    def admin() -> AsyncLLM:
        return engine(flag="--enable-admin-routes", is_on=service.settings.enable_admin_routes)

    def profiled() -> AsyncLLM:
        return engine(flag="--profile-dir DIR", is_on=service.engine_config.profile_dir is not None)

    @router.post("/sleep", openapi_extra=query_schema(LEVEL))
    async def sleep(request: Request) -> Response:
        """Give up the devices' memory: weights go to host memory (level=1) or are dropped (2), KV pages are dropped."""
        running = admin()
        (level,) = query(request, "level") or ["1"]
        await done(lambda: running.admin.sleep(int(level) if level.isdecimal() else -1))
        return json_response({"is_sleeping": True})

    @router.post("/wake_up", openapi_extra=query_schema(TAGS))
    async def wake_up(request: Request) -> Response:
        """Have the memory again, or one of `tags=weights` and `tags=kv_cache`."""
        running = admin()
        await done(lambda: running.admin.wake_up(query(request, "tags", several=True) or None))
        return json_response({"is_sleeping": await running.admin.is_sleeping()})

    @router.get("/is_sleeping")
    async def is_sleeping() -> Response:
        """Whether requests are refused since the engine sleeps."""
        return json_response({"is_sleeping": await service.engine().admin.is_sleeping()})

    @router.post("/abort_requests", openapi_extra=body_schema(AbortRequests))
    async def abort_requests(request: Request) -> Response:
        """Drop requests of any client; what they have so far is their answer, with the finish reason "abort"."""
        running = admin()
        asked = decode(AbortRequests, await read_body(request, limit=limit) or b"{}")
        ids = asked.request_ids
        running.admin.abort(None if ids is None else {name for given in ids for name in names_of(given)})
        return json_response({})

    @router.post("/start_profile")
    async def start_profile() -> Response:
        """Begin to record what the engine does, into a folder that XProf shows."""
        await done(profiled().admin.start_profile)
        return json_response({})

    @router.post("/stop_profile")
    async def stop_profile() -> Response:
        """Write what was recorded."""
        await done(profiled().admin.stop_profile)
        return json_response({})

    return router


async def done(order: Callable[[], Awaitable[None]]) -> None:
    """Give an order; ApiError for what comes of one that is wrong, untimely or fails."""
    try:
        await order()
    except ValueError as error:
        raise bad_request(error) from None
    except EngineBusyError as error:
        raise ApiError(409, str(error), code="engine_busy") from None
    except EngineDeadError as error:
        raise unavailable(f"the engine has died: {error}", code="engine_dead") from None


def query(request: Request, name: str, *, several: bool = False) -> list[str]:
    """The values of the one parameter that a route takes in its URL; ApiError 400 for others, and for repeats."""
    for given in request.query_params:
        if given != name:
            raise unknown_parameter(given, (name,))
    values = request.query_params.getlist(name)
    if len(values) > 1 and not several:
        raise ApiError(400, f"{name} is given {len(values)} times; give it once", param=name, code="invalid_value")
    return values


def names_of(given: str) -> list[str]:
    """What an id may mean: itself, and, of an answer's id, that of its request."""
    return [given, *(given.removeprefix(prefix) for prefix in ID_PREFIXES if given.startswith(prefix))]
