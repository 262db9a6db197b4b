"""POST /v1/completions, GET /v1/models."""

import time
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from msgspec import structs
from starlette.responses import Response

from jax_engine.lora_request import LoRARequest
from jax_engine.outputs import CompletionOutput, RequestOutput
from jax_engine.server.body import read_body
from jax_engine.server.openai.answers import CompletionAnswers
from jax_engine.server.openai.frames import CompletionFrames, encode_json
from jax_engine.server.openai.generation import GenerationStream, generation
from jax_engine.server.openai.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.tracking import RequestRecord

EXAMPLE = {"prompt": "Once upon a time", "max_tokens": 32}


def json_response(content: Any) -> Response:
    """`content` as JSON, status 200."""
    return Response(encode_json(content), media_type="application/json")


def openai_router(service: Service) -> APIRouter:
    """The routes that OpenAI's clients call, but for chats."""
    router = APIRouter(tags=["OpenAI"])
    limit = service.settings.max_request_body_bytes

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionRequest, example=EXAMPLE))
    async def completions(request: Request) -> Response:
        """Continue one prompt or several."""
        asked = CompletionRequest.from_body(await read_body(request, limit=limit))
        return await answer_completion(service, request, asked)

    @router.get("/v1/models")
    async def models() -> Response:
        """The names that this server's model goes by, and its adapters."""
        cards = [model_card(service, name) for name in service.settings.served_model_names]
        cards += [adapter_card(service, lora) for lora in service.adapters()]
        return json_response({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One of those names."""
        lora = service.adapter_of(name)
        return json_response(model_card(service, name) if lora is None else adapter_card(service, lora))

    return router


async def answer_completion(service: Service, request: Request, asked: CompletionRequest) -> Response:
    """The response to a checked body of /v1/completions."""
    record: RequestRecord = request.state.record
    record.adapter = service.adapter_of(asked.model)
    engine = service.engine()
    params = asked.sampling_params(engine.get_default_sampling_params())
    shown = params if asked.logprobs is not None else replace(params, logprobs=None)
    answers = CompletionAnswers(engine.token_texts, shown, engine.tokenizer, echo=bool(asked.echo), **asked.shown)
    prompts, priority = asked.prompts(), asked.priority or 0
    beams = asked.beam_search_params(params)
    options: dict[str, Any] = {"priority": priority, "beams": beams, "prompt_only": asked.prompt_only}
    response_id, model = f"cmpl-{record.request_id}", asked.model or service.settings.model_name
    if asked.stream:
        frames = CompletionFrames(response_id=response_id, model=model, **stream_fields(service, record, asked))
        return GenerationStream(service, record, prompts, params, frames, answers, **options)
    async with generation(service, record, prompts, params, request.receive, **options) as running:
        outputs = await running.results()
    if asked.chooses:
        outputs = [best(output, asked.n or 1) for output in outputs]
    choices = [
        {
            "index": index,
            "text": answers.text(index, output, completion),
            "logprobs": answers.logprobs(index, output, completion),
            **ending(completion),
            **answers.of_prompt(output),
            **answers.fields(completion),
        }
        for number, output in enumerate(outputs)
        for completion in output.outputs
        for index in (number * len(output.outputs) + completion.index,)
    ]
    return json_response(
        {
            "id": response_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": record.usage(),
            **common_fields(service, asked),
        }
    )


def best(output: RequestOutput, count: int) -> RequestOutput:
    """`count` completions of a prompt, those first whose tokens are likeliest on average."""

    def mean(completion: CompletionOutput) -> float:
        assert completion.cumulative_logprob is not None
        return completion.cumulative_logprob / max(1, len(completion.token_ids))

    chosen = sorted(output.outputs, key=mean, reverse=True)[:count]
    numbered = [structs.replace(completion, index=index) for index, completion in enumerate(chosen)]
    return structs.replace(output, outputs=numbered)


def common_fields(service: Service, asked: CompletionRequest | ChatCompletionRequest) -> dict[str, Any]:
    """What an answer and each of its chunks say of the server; there is one tier of service."""
    tier = {} if asked.service_tier is None else {"service_tier": "default"}
    return {"system_fingerprint": service.system_fingerprint, **tier}


def stream_fields(
    service: Service, record: RequestRecord, asked: CompletionRequest | ChatCompletionRequest
) -> dict[str, Any]:
    """What a stream's chunks hold besides their choices, for `OpenAIFrames`."""
    options = asked.stream_options or StreamOptions()
    return {
        "include_usage": bool(options.include_usage),
        "common": common_fields(service, asked),
        "usage": record.usage if options.continuous_usage_stats else None,
        "obfuscate": bool(options.include_obfuscation),
    }


def ending(completion: CompletionOutput) -> dict[str, Any]:
    """Why a completion ended; vLLM's `stop_reason` is the stop string or stop id, null for end of sequence."""
    return {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}


def adapter_card(service: Service, lora: LoRARequest) -> dict[str, Any]:
    """The model object of an adapter, with vLLM's fields: `root` is its folder, `parent` the model that it changes."""
    return model_card(service, lora.lora_name) | {"root": lora.lora_path, "parent": service.settings.model_name}


def model_card(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's model object, with vLLM's `root` and `max_model_len`; ApiError 503 before the engine is ready."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "jax-engine",
        "root": service.settings.model_name,
        "parent": None,
        "max_model_len": service.engine().info.max_model_len,
    }
