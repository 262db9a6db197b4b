"""The HTTP application: routes, errors, and the engine that lives as long as it does."""

import difflib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

import jax_engine
from jax_engine.server.admin_routes import AbortRequests, admin_router
from jax_engine.server.anthropic.protocol import CountTokensRequest, MessagesRequest
from jax_engine.server.anthropic.routes import anthropic_router
from jax_engine.server.errors import ApiError
from jax_engine.server.gate import Gate
from jax_engine.server.lora_routes import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest, lora_router
from jax_engine.server.openai.chat_routes import chat_router
from jax_engine.server.openai.openai_routes import openai_router
from jax_engine.server.openai.plain_routes import plain_router
from jax_engine.server.openai.pooling_protocol import ClassifyRequest, EmbeddingRequest, RerankRequest, ScoreRequest
from jax_engine.server.openai.pooling_routes import pooling_router
from jax_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest, PlainRequest
from jax_engine.server.openai.tokenizer_routes import DetokenizeRequest, TokenizeRequest, tokenizer_router
from jax_engine.server.operations_routes import operations_router
from jax_engine.server.page_routes import page_router
from jax_engine.server.response_schemas import describe_answers
from jax_engine.server.responses.protocol import ResponsesRequest
from jax_engine.server.responses.routes import responses_router
from jax_engine.server.schemas import add_components
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings

ROUTERS = (
    openai_router,
    chat_router,
    responses_router,
    anthropic_router,
    lora_router,
    plain_router,
    pooling_router,
    operations_router,
    admin_router,
    tokenizer_router,
    page_router,
)
# What `body_schema` may point to.
BODIES = (
    CompletionRequest,
    ChatCompletionRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    PlainRequest,
    LoadLoRAAdapterRequest,
    UnloadLoRAAdapterRequest,
    AbortRequests,
    EmbeddingRequest,
    ScoreRequest,
    RerankRequest,
    ClassifyRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


def build_app(service: Service) -> FastAPI:
    """The app around a service, whose engine starts and ends with the app's lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.begin()
        yield
        await service.end()

    app = FastAPI(title="jax-engine", version=jax_engine.__version__, lifespan=lifespan, redirect_slashes=False)
    for make_router in ROUTERS:
        router = make_router(service)
        app.include_router(router)
        service.metrics.http.count_routes(router.routes)
    app.root_path = service.settings.root_path
    app.add_middleware(Gate, settings=service.settings, http_metrics=service.metrics.http, tracer=service.tracer)
    allow_origins(app, service.settings)
    app.add_exception_handler(HTTPException, routing_error(app))
    app.add_exception_handler(RequestValidationError, invalid_query)
    app.openapi = openapi_document(app)  # type: ignore[method-assign]  # FastAPI's documented way to extend it
    return app


def allow_origins(app: FastAPI, settings: ServerSettings) -> None:
    """Let web pages of other origins call the server, as far as its settings do (CORS). Outside the `Gate`: browsers
    ask beforehand, without a key, and must be able to read errors.
    """
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=settings.allowed_methods,
            allow_headers=settings.allowed_headers,
            allow_credentials=settings.allow_credentials,
            expose_headers=["x-request-id", "retry-after"],
        )


def routing_error(app: FastAPI) -> Callable[[Request, Any], Awaitable[Response]]:
    """The handler that turns the router's own 404 and 405 into OpenAI's error object."""

    async def respond(request: Request, error: HTTPException) -> Response:
        method, path = request.method, request.url.path
        if error.status_code == 405:
            message = f"{path} does not take {method}; it takes {(error.headers or {}).get('Allow', 'another method')}"
            return ApiError(405, message, code="method_not_allowed", headers=error.headers).response(path)
        near = difflib.get_close_matches(path, app.openapi()["paths"], n=1)
        hint = f"; did you mean {near[0]}?" if near else "; /docs lists what there is"
        message = f"no such route: {method} {path}{hint}"
        return ApiError(error.status_code, message, code="route_not_found").response(path)

    return respond


async def invalid_query(request: Request, error: Any) -> Response:
    """FastAPI's complaint about a parameter of the query, as OpenAI's error object."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    message = f"{name}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ApiError(400, message, param=name, code="invalid_value").response(request.url.path)


def openapi_document(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What makes `/openapi.json`: FastAPI's document with the schemas of the bodies that it does not decode itself."""

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            add_components(app.openapi_schema, BODIES)
            describe_answers(app.openapi_schema)
        return app.openapi_schema

    return document
