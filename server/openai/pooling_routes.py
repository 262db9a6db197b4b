"""POST /v1/embeddings, /pooling, /score, /rerank and /classify: vectors of prompts, and how alike they are."""

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jax_engine.frontend.pooling_requests import Vector, paired, similarity, vector_of
from jax_engine.frontend.processor import Prompt
from jax_engine.pooling_params import PoolingParams
from jax_engine.server.body import read_body
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.generation import generation
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.openai.pooling_protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    PoolingFields,
    RerankRequest,
    ScoreRequest,
    checked_texts,
)
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.tracking import RequestRecord
from jax_engine.server.validation import MAX_PROMPTS, decode


def pooling_router(service: Service) -> APIRouter:
    """The routes, with vLLM's other names of them."""
    router = APIRouter(tags=["pooling"])
    limit = service.settings.max_request_body_bytes

    @router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        """The vector of each input: numbers, or their bytes (float32, little-endian) in base64."""
        asked = EmbeddingRequest.from_body(await read_body(request, limit=limit))
        return json_response(await answer_embeddings(service, request, asked, kind="embedding"))

    @router.post("/pooling", openapi_extra=body_schema(EmbeddingRequest))
    async def pooling(request: Request) -> Response:
        """The same under vLLM's names."""
        asked = EmbeddingRequest.from_body(await read_body(request, limit=limit))
        return json_response(await answer_embeddings(service, request, asked, kind="pooling"))

    @router.post("/score", openapi_extra=body_schema(ScoreRequest))
    @router.post("/v1/score", openapi_extra=body_schema(ScoreRequest))
    async def score(request: Request) -> Response:
        """How alike texts are: the cosine between their vectors."""
        asked = decode(ScoreRequest, await read_body(request, limit=limit))
        return json_response(await answer_score(service, request, asked))

    @router.post("/rerank", openapi_extra=body_schema(RerankRequest))
    @router.post("/v1/rerank", openapi_extra=body_schema(RerankRequest))
    async def rerank(request: Request) -> Response:
        """Documents in the order of their likeness to a query."""
        asked = decode(RerankRequest, await read_body(request, limit=limit))
        return json_response(await answer_rerank(service, request, asked, shows_documents=True))

    @router.post("/v2/rerank", openapi_extra=body_schema(RerankRequest))
    async def cohere_rerank(request: Request) -> Response:
        """The same as Cohere's clients expect it: without the documents."""
        asked = decode(RerankRequest, await read_body(request, limit=limit))
        return json_response(await answer_rerank(service, request, asked, shows_documents=False))

    @router.post("/classify", openapi_extra=body_schema(ClassifyRequest))
    async def classify(request: Request) -> Response:
        """Class probabilities, of a model that has classes: none that is served so far has."""
        asked = decode(ClassifyRequest, await read_body(request, limit=limit))
        service.adapter_of(asked.model)
        service.engine()
        message = "this model has no classification head, so there is nothing to classify by; /v1/embeddings and "
        raise ApiError(400, message + "/score are what it can do", param="model", code="model_cannot_classify")

    return router


async def vectors_of(
    service: Service, request: Request, asked: PoolingFields, prompts: Sequence[Prompt], params: PoolingParams
) -> list[Vector]:
    """The vector of each prompt, all of them in the engine at once; ApiError for what cannot be answered."""
    record: RequestRecord = request.state.record
    record.adapter = service.adapter_of(asked.model)
    final = params.with_defaults(service.engine_config.pooling)
    async with generation(service, record, prompts, params, request.receive, priority=asked.priority or 0) as running:
        outputs = await running.results()
    if any(completion.finish_reason == "abort" for output in outputs for completion in output.outputs):
        raise ApiError(500, "the request was aborted", code="request_failed")
    return [vector_of(output, final) for output in outputs]


async def answer_embeddings(
    service: Service, request: Request, asked: EmbeddingRequest, *, kind: str
) -> dict[str, Any]:
    """The answer to a checked body; `kind` names what it lists, and the field that has the vector."""
    text = None if asked.messages is None else asked.chat.chat_text(service.engine(), service.settings)
    vectors = await vectors_of(service, request, asked, asked.prompts(text), asked.params())
    field = {"embedding": "embedding", "pooling": "data"}[kind]
    shown = [as_base64(vector) if asked.encoding_format == "base64" else vector.tolist() for vector in vectors]
    data = [{"object": kind, "index": index, field: value} for index, value in enumerate(shown)]
    return head(service, request, asked, prefix="embd" if kind == "embedding" else "pool") | {
        "object": "list",
        "data": data,
        "usage": usage(request),
    }


async def answer_score(service: Service, request: Request, asked: ScoreRequest) -> dict[str, Any]:
    """The answer to a body of /score."""
    first, second = asked.texts()
    scores = await scores_of(service, request, asked, first, second, asked.pooling_params(), ("text_1", "text_2"))
    data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
    return head(service, request, asked, prefix="score") | {"object": "list", "data": data, "usage": usage(request)}


async def answer_rerank(
    service: Service, request: Request, asked: RerankRequest, *, shows_documents: bool
) -> dict[str, Any]:
    """The answer to a body of /rerank, the most alike first; documents that are alike in the order they came."""
    asked.check()
    documents = checked_texts(asked.documents, name="documents")
    params = asked.pooling_params()
    prompts: Sequence[Prompt] = documents
    if (most := asked.max_tokens_per_doc) is not None:
        encode = service.engine().tokenizer.encode
        prompts = await asyncio.to_thread(lambda: [encode(text)[:most] for text in documents])
    scores = await scores_of(service, request, asked, [asked.query], prompts, params, ("query", "documents"))
    order = sorted(range(len(documents)), key=lambda index: -scores[index])[: asked.top_n or None]
    shows = shows_documents if asked.return_documents is None else asked.return_documents
    results = []
    for index in order:
        document = {"document": {"text": documents[index]}} if shows else {}
        results.append({"index": index, "relevance_score": scores[index], **document})
    return head(service, request, asked, prefix="rerank") | {"usage": usage(request), "results": results}


async def scores_of(
    service: Service,
    request: Request,
    asked: PoolingFields,
    first: Sequence[Prompt],
    second: Sequence[Prompt],
    params: PoolingParams,
    names: tuple[str, str],
) -> list[float]:
    """The cosine of each pair; a text that is compared with several runs once."""
    if len(first) + len(second) > MAX_PROMPTS:
        message = f"{names[1]} has {len(second)} entries; at most {MAX_PROMPTS} texts are allowed: send fewer"
        raise ApiError(400, message, param=names[1], code="invalid_value")
    try:
        pairs = paired(len(first), len(second), names)
    except ValueError as error:
        raise bad_request(error) from None
    vectors = await vectors_of(service, request, asked, [*first, *second], params)
    return [similarity(vectors[one], vectors[len(first) + other]) for one, other in pairs]


def head(service: Service, request: Request, asked: PoolingFields, *, prefix: str) -> dict[str, Any]:
    """What answers begin with."""
    record: RequestRecord = request.state.record
    model = asked.model or service.settings.model_name
    return {"id": f"{prefix}-{record.request_id}", "created": int(time.time()), "model": model}


def usage(request: Request) -> dict[str, Any]:
    """OpenAI's token counts."""
    record: RequestRecord = request.state.record
    counts = record.usage()
    return {name: counts[name] for name in ("prompt_tokens", "total_tokens", "prompt_tokens_details")}


def as_base64(vector: Vector) -> str:
    """The vector's bytes as OpenAI's clients read them."""
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode()
