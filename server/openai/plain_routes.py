"""POST /generate and /generate_stream: a prompt and sampling parameters, without OpenAI's envelope."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from jax_engine.server.body import read_body
from jax_engine.server.openai.answers import Answers
from jax_engine.server.openai.frames import LineFrames
from jax_engine.server.openai.generation import GenerationStream, generation
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.openai.protocol import PlainRequest
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.tracking import RequestRecord

EXAMPLE = {"prompt": "Once upon a time", "max_tokens": 32}


def plain_router(service: Service) -> APIRouter:
    """The routes for plain use."""
    router = APIRouter(tags=["plain"])
    limit = service.settings.max_request_body_bytes

    @router.post("/generate", openapi_extra=body_schema(PlainRequest, example=EXAMPLE))
    async def generate(request: Request) -> Response:
        """The completions of one prompt or several: `{"text": [...], "finish_reason": [...], "usage": {...}}`."""
        asked = PlainRequest.from_body(await read_body(request, limit=limit))
        return await answer_plain(service, request, asked, stream=asked.stream)

    @router.post("/generate_stream", openapi_extra=body_schema(PlainRequest, example=EXAMPLE))
    async def generate_stream(request: Request) -> Response:
        """JSON lines as text comes, `{"index": 0, "text": "...", "finish_reason": null}`; the usage is the last."""
        asked = PlainRequest.from_body(await read_body(request, limit=limit))
        return await answer_plain(service, request, asked, stream=True)

    return router


async def answer_plain(service: Service, request: Request, asked: PlainRequest, *, stream: bool) -> Response:
    """The response to a checked body; completions stand in the order of their prompts, `n` for each."""
    record: RequestRecord = request.state.record
    record.adapter = service.adapter_of(asked.model)
    engine = service.engine()
    params = asked.params(engine.get_default_sampling_params(), stream=stream)
    answers = Answers(engine.token_texts, params, prompt_logprobs=params.prompt_logprobs is not None)
    prompts, priority = asked.prompts(), asked.priority or 0
    if stream:
        return GenerationStream(service, record, prompts, params, LineFrames(), answers, priority=priority)
    async with generation(service, record, prompts, params, request.receive, priority=priority) as running:
        outputs = await running.results()
    completions = [completion for output in outputs for completion in output.outputs]
    content = {
        "text": [completion.text for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "usage": record.usage(),
    }
    if params.logprobs is not None:
        content["logprobs"] = [completion.logprobs for completion in completions]
    if params.prompt_logprobs is not None:
        content["prompt_logprobs"] = [output.prompt_logprobs for output in outputs]
    return json_response(content)
