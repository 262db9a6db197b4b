"""POST /v1/chat/completions."""

import asyncio
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from jax_engine.frontend.beam_search import BeamSearchParams
from jax_engine.frontend.processor import TextPrompt
from jax_engine.sampling_params import SamplingParams
from jax_engine.server.body import read_body
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.answers import ChatAnswers
from jax_engine.server.openai.chat_format import rendered_chat
from jax_engine.server.openai.chat_frames import ChatFrames, called, chat_message
from jax_engine.server.openai.generation import GenerationStream, generation
from jax_engine.server.openai.message_parts import MessageFormat
from jax_engine.server.openai.openai_routes import common_fields, json_response, stream_fields
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.openai.reasoning_tokens import reasoning_counter
from jax_engine.server.openai.tool_choice import ToolChoice, answer_form
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.tracking import RequestRecord
from jax_engine.structured_outputs import ReasoningParams, StructuredOutputsParams

BAD_SCHEMA = re.compile(r"cannot be followed: schema (\d+): (.*); correct it", re.DOTALL)

EXAMPLE = {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}


def chat_router(service: Service) -> APIRouter:
    """The route for chats."""
    router = APIRouter(tags=["OpenAI"])
    limit = service.settings.max_request_body_bytes

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest, example=EXAMPLE))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        asked = ChatCompletionRequest.from_body(await read_body(request, limit=limit))
        return await answer_chat(service, request, asked)

    return router


@dataclass(frozen=True)
class PreparedChat:
    """What a checked request asks of the engine, and how its answers are to be read."""

    prompt: TextPrompt
    params: SamplingParams
    beams: BeamSearchParams | None
    message_format: MessageFormat


async def prepared_chat(service: Service, asked: ChatCompletionRequest) -> PreparedChat:
    """Render a chat and turn what it asks for into the engine's terms.

    Raises:
        ApiError: 400 for what cannot be rendered or sampled so; 503 before the engine is ready.
    """
    engine, settings, choice = service.engine(), service.settings, asked.choice()
    if not settings.enable_auto_tool_choice and choice.mode == "auto":
        message = "tool_choice='auto' is turned off on this server; send 'none', or start it with "
        raise ApiError(400, message + "--enable-auto-tool-choice", param="tool_choice", code="unsupported_parameter")
    if asked.reasoning_effort is not None and not service.chat_format.reads("reasoning_effort"):
        message = (
            f"reasoning_effort={asked.reasoning_effort!r} means nothing to this model's chat template; leave it out"
        )
        raise ApiError(400, message, param="reasoning_effort", code="unsupported_parameter")
    prompt: TextPrompt = {
        "prompt": rendered_chat(engine.tokenizer, settings, asked),
        "add_special_tokens": False,  # the template has written them
    }
    message_format = service.chat_format.message_format(prompt["prompt"], asked)
    params = asked.sampling_params(engine.get_default_sampling_params())
    beams = asked.beam_search_params(params)
    if (form := _tool_form(service, asked, choice)) is not None:
        if beams is not None:
            message = "a beam search cannot be held to a form, which the tools ask for; leave out use_beam_search"
            raise ApiError(400, message, param="use_beam_search", code="unsupported_parameter")
        params = await _held_to(service, params, form, choice)
    params = _thinking(service, params, message_format)
    if service.chat_format.needs_special_tokens(message_format) and asked.skip_special_tokens is None:
        params = replace(params, skip_special_tokens=False)
    if asked.add_special_tokens is not None:
        prompt["add_special_tokens"] = asked.add_special_tokens
    if asked.cache_salt is not None:
        prompt["cache_salt"] = asked.cache_salt
    return PreparedChat(prompt, params, beams, message_format)


def _tool_form(service: Service, asked: ChatCompletionRequest, choice: ToolChoice) -> Mapping[str, Any] | None:
    """The form that an answer has because of its tools, if any."""
    return answer_form(
        choice,
        service.chat_format.tool_parser,
        asked.form(),
        all_allowed=len(choice.functions) == len(asked.tools or ()),
        parallel=asked.parallel_tool_calls is not False,
    )


def _thinking(service: Service, params: SamplingParams, message_format: MessageFormat) -> SamplingParams:
    """Parameters that know how the model thinks; those for a chat whose thinking is over have no budget for it."""
    form = message_format.reasoning
    if form is None:
        is_over = service.chat_format.reasoning is not None
        return replace(params, thinking_token_budget=None) if is_over else params
    begins_inside = message_format.begins_inside or form.begins_inside
    return replace(params, reasoning=ReasoningParams(start=form.start, end=form.end, begins_inside=begins_inside))


async def _held_to(
    service: Service, params: SamplingParams, form: Mapping[str, Any], choice: ToolChoice
) -> SamplingParams:
    """Parameters with a form; ApiError 400, naming the tool, when its schema cannot be followed."""
    try:
        tag = StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": form})
        params = replace(params, structured_outputs=tag)
        await asyncio.to_thread(service.engine().check_form, params)
    except ValueError as error:
        if (found := BAD_SCHEMA.search(str(error))) is None or int(found[1]) >= len(choice.functions):
            raise bad_request(error) from None
        name = choice.functions[int(found[1])]["name"]
        message = f"the parameters of the tool {name!r} cannot be enforced: {found[2]}"
        raise ApiError(400, message, param="tools", code="invalid_value") from None
    return params


async def answer_chat(service: Service, request: Request, asked: ChatCompletionRequest) -> Response:
    """The response to a checked body of /v1/chat/completions."""
    record: RequestRecord = request.state.record
    record.adapter = service.adapter_of(asked.model)
    chat = await prepared_chat(service, asked)
    answers = ChatAnswers(service.engine().token_texts, chat.params, **asked.shown)
    record.counter = reasoning_counter(chat.message_format, service.engine().token_texts)
    priority = asked.priority or 0
    response_id, model = f"chatcmpl-{record.request_id}", asked.model or service.settings.model_name
    if asked.stream:
        frames = ChatFrames(
            response_id=response_id,
            model=model,
            message_format=chat.message_format,
            **stream_fields(service, record, asked),
        )
        return GenerationStream(
            service, record, [chat.prompt], chat.params, frames, answers, priority=priority, beams=chat.beams
        )
    async with generation(
        service, record, [chat.prompt], chat.params, request.receive, priority=priority, beams=chat.beams
    ) as running:
        (output,) = await running.results()
    choices = []
    for completion in output.outputs:
        parser = chat.message_format.parser()
        message = chat_message(parser, completion.text)
        choices.append(
            {
                "index": completion.index,
                "message": message,
                "logprobs": answers.logprobs(completion.index, output, completion),
                "finish_reason": called(completion.finish_reason, parser),
                "stop_reason": completion.stop_reason,
                **answers.fields(completion),
            }
        )
    return json_response(
        {
            "id": response_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
            "choices": choices,
            "usage": record.usage(),
            **common_fields(service, asked),
            **({} if asked.metadata is None else {"metadata": asked.metadata}),
            **answers.of_prompt(output),
        }
    )
