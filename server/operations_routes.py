"""GET /health, /ping, /live, /version, /load, /metrics: for probes, routers and scrapers. POST /reset_prefix_cache."""

from typing import Any

import msgspec
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import jax_engine
from jax_engine.core.core_client import EngineDeadError
from jax_engine.server.errors import ApiError, unavailable
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.service import Service, State


def condition(service: Service) -> dict[str, Any]:
    """Where a server is in its life, and how far with compiling; `compile_eta_seconds` is null where nobody knows."""
    stats = service.stats()
    return {
        "status": "shutting_down" if service.is_draining else service.state.value,
        "programs_compiled": stats.programs_compiled,
        "programs_planned": stats.programs_planned,
        "compile_eta_seconds": round(stats.compile_eta_seconds, 1) or None,
    }


def check_may_change(service: Service) -> None:
    """ApiError 403 where anybody who reaches the server could change it."""
    if not service.settings.api_keys and not service.settings.enable_admin_routes:
        message = "a server without --api-key lets clients do that only with --enable-admin-routes"
        raise ApiError(403, message, code="route_is_off")


def operations_router(service: Service) -> APIRouter:
    """The routes that tell how the server is, which need no API key, and those that change it, which do."""
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        """Readiness: 200 when requests are served; else 503 with the reason: starting, shutting down, or dead."""
        try:
            service.check_ready()
        except ApiError as error:
            return Response(
                msgspec.json.encode({**condition(service), **error.body()}),
                error.status,
                headers=error.headers,
                media_type="application/json",
            )
        return json_response(condition(service))

    @router.get("/live")
    async def live() -> Response:
        """Liveness: 200 as long as the process is best left alone, also while it starts or shuts down; 503 once the
        engine has died.
        """
        if service.state is State.DEAD:
            raise unavailable(service.reason, code="engine_dead")
        return json_response({"status": condition(service)["status"]})

    @router.get("/version")
    async def version() -> Response:
        """This server's version."""
        return json_response({"version": jax_engine.__version__})

    @router.get("/load")
    async def load() -> Response:
        """How many requests are being answered, by all front ends: `{"server_load": 0}`."""
        return json_response({"server_load": service.in_flight.num_in_all})

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(service.stats_by_engine()), media_type=CONTENT_TYPE_LATEST)

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        """Forget the keys and values of earlier prompts; 409 while requests run. Needs an API key, or
        `--enable-admin-routes` on a server that asks for none.
        """
        check_may_change(service)
        try:
            done = await service.engine().reset_prefix_cache()
        except EngineDeadError as error:
            raise unavailable(f"the engine has died: {error}", code="engine_dead") from None
        if not done:
            message = "the prefix cache is in use by running requests and was not reset; try again when none runs"
            raise ApiError(409, message, code="prefix_cache_in_use")
        return json_response({"reset": True})

    return router
