"""GET /health, /ping, /version, /load and /metrics, for probes, routers and scrapers; POST /reset_prefix_cache."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import jax_engine
from jax_engine.core_client import EngineDeadError
from jax_engine.server.errors import ApiError, unavailable
from jax_engine.server.openai_routes import json_response
from jax_engine.server.service import Service


def operations_router(service: Service) -> APIRouter:
    """The routes that tell how the server is, which need no API key, and those that change it, which do."""
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        """200 when requests are served; else 503 with the reason: starting, or dead."""
        service.engine()
        stats = service.stats()
        return json_response(
            {
                "status": service.state.value,
                "programs_compiled": stats.programs_compiled,
                "programs_planned": stats.programs_planned,
            }
        )

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
        return Response(service.metrics.render(service.stats()), media_type=CONTENT_TYPE_LATEST)

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        """Forget the keys and values of earlier prompts; 409 while requests run."""
        try:
            done = await service.engine().reset_prefix_cache()
        except EngineDeadError as error:
            raise unavailable(f"the engine has died: {error}", code="engine_dead") from None
        if not done:
            message = "the prefix cache is in use by running requests and was not reset; try again when none runs"
            raise ApiError(409, message, code="prefix_cache_in_use")
        return json_response({"reset": True})

    return router
