"""GET /health, /ping, /version and /metrics: for probes, routers and scrapers."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import jax_engine
from jax_engine.server.openai_routes import json_response
from jax_engine.server.service import Service


def operations_router(service: Service) -> APIRouter:
    """The routes that tell how the server is; they need no API key."""
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

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.render(service.stats()), media_type=CONTENT_TYPE_LATEST)

    return router
