"""POST /v1/messages and /v1/messages/count_tokens, which Anthropic's clients call."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from jax_engine.server.anthropic.answers import MessageFrames, MessageHead, anthropic_usage
from jax_engine.server.anthropic.protocol import NAMES, CountTokensRequest, MessagesRequest
from jax_engine.server.body import read_body
from jax_engine.server.openai.answers import Answers
from jax_engine.server.openai.chat_prompt import fitted, prompt_tokens
from jax_engine.server.openai.chat_routes import prepared_chat
from jax_engine.server.openai.extra_fields import renamed
from jax_engine.server.openai.generation import GenerationStream, generation
from jax_engine.server.openai.message_parts import whole_message
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.openai.reasoning_tokens import reasoning_counter
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.tracking import RequestRecord

QUESTION = {"role": "user", "content": "What is 17 + 25?"}


def anthropic_router(service: Service) -> APIRouter:
    """The routes of Anthropic's Messages API."""
    router = APIRouter(tags=["Anthropic"])
    limit = service.settings.max_request_body_bytes
    asking = {"max_tokens": 256, "messages": [QUESTION]}

    @router.post("/v1/messages", openapi_extra=body_schema(MessagesRequest, example=asking))
    async def messages(request: Request) -> Response:
        """Answer a conversation, whole or as a stream of events."""
        asked = MessagesRequest.from_body(await read_body(request, limit=limit))
        return await answer_messages(service, request, asked)

    @router.post(
        "/v1/messages/count_tokens", openapi_extra=body_schema(CountTokensRequest, example={"messages": [QUESTION]})
    )
    async def count_tokens(request: Request) -> Response:
        """The number of tokens of the prompt that a conversation makes."""
        asked = CountTokensRequest.from_body(await read_body(request, limit=limit))
        service.adapter_of(asked.model)
        with renamed(NAMES):
            chat = await prepared_chat(service, asked.chat())
        return json_response({"input_tokens": len(await prompt_tokens(service.engine(), chat))})

    return router


async def answer_messages(service: Service, request: Request, asked: MessagesRequest) -> Response:
    """The response to a checked body of /v1/messages."""
    record: RequestRecord = request.state.record
    record.adapter = service.adapter_of(asked.model)
    engine = service.engine()
    with renamed(NAMES):
        asked_chat = asked.chat()
        chat = await prepared_chat(service, asked_chat)
    fit = await fitted(engine, chat, name="messages")
    head = MessageHead(
        message_id=f"msg_{record.request_id}",
        model=asked.model or service.settings.model_name,
        context_is_limit=fit.context_is_limit,
    )
    record.counter = reasoning_counter(chat.message_format, engine.token_texts)
    parser, priority = chat.message_format.parser(), asked_chat.priority or 0
    if asked.stream:
        frames, answers = MessageFrames(head, parser, record), Answers(engine.token_texts, fit.params)
        return GenerationStream(service, record, [fit.prompt], fit.params, frames, answers, priority=priority)
    async with generation(service, record, [fit.prompt], fit.params, request.receive, priority=priority) as running:
        (output,) = await running.results()
    (completion,) = output.outputs
    answer = whole_message(parser.finish(completion.text))
    ending = head.ending(completion.finish_reason, completion.stop_reason, has_called=parser.has_called)
    return json_response(head.whole(answer, anthropic_usage(record.usage()), ending))
