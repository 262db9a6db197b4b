"""GET /, a page to chat with the model and to see the engine at work."""

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from jax_engine.server.page_files import page_files
from jax_engine.server.service import Service


def page_router(service: Service) -> APIRouter:
    """The page and what it shows. Its files need no API key; what it asks for does."""
    router = APIRouter(tags=["page"])

    @router.get("/", include_in_schema=False)
    @router.get("/page/{name}", include_in_schema=False)
    async def page(request: Request) -> Response:
        """One of the page's files."""
        file = page_files().get(request.url.path)
        if file is None:
            raise HTTPException(404)
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=file.headers)
        return Response(file.content, headers=file.headers)

    return router
