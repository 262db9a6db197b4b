"""POST /tokenize and /detokenize, GET /tokenizer_info: the model's tokenizer by itself; vLLM's bodies and answers."""

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from jax_engine.async_llm import AsyncLLM
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.server.body import read_body
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.chat_format import rendered_chat
from jax_engine.server.openai.openai_routes import json_response
from jax_engine.server.openai.protocol import ChatCompletionRequest
from jax_engine.server.schemas import body_schema
from jax_engine.server.service import Service
from jax_engine.server.settings import ServerSettings
from jax_engine.server.validation import decode

# Where the server keeps its files is nobody's business.
PATHS = frozenset({"is_local", "local_files_only", "merges_file", "name_or_path", "tokenizer_file", "vocab_file"})


class ChatFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What turns messages into a text, as in chat completions."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_text(self, engine: AsyncLLM, settings: ServerSettings) -> str:
        """The messages by the chat template. ApiError 400 for what cannot be rendered."""
        fields = {name: getattr(self, name) for name in ChatFields.__struct_fields__}
        chat = ChatCompletionRequest(**fields)
        chat.check()
        return rendered_chat(engine.tokenizer, settings, chat)

    def refuse_alone(self, beside: str) -> None:
        """ApiError 400 for what belongs to messages and came without; `beside` is what came instead."""
        for name in ChatFields.__struct_fields__[1:]:
            if getattr(self, name) is not None:
                message = f"{name} belongs to messages and has no effect on {beside}; leave it out"
                raise ApiError(400, message, param=name, code="invalid_value")


class TokenizeRequest(ChatFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /tokenize: a `prompt`, or the `messages` of a chat."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None  # null: as the tokenizer does for a prompt, none for a rendered chat
    return_token_strs: bool | None = None

    def check(self) -> None:
        """Raise an ApiError for what contradicts itself."""
        if (self.prompt is None) == (self.messages is None):
            message = "give either prompt or messages, one of them"
            raise ApiError(400, message, param="prompt", code="invalid_value")
        if self.messages is None:
            self.refuse_alone("prompt")


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def tokenizer_router(service: Service) -> APIRouter:
    """The routes that need the tokenizer and not the model."""
    router = APIRouter(tags=["tokenizer"])
    limit = service.settings.max_request_body_bytes

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """The token ids of a text or of a chat: `{"count", "max_model_len", "tokens", "token_strs"}`."""
        asked = decode(TokenizeRequest, await read_body(request, limit=limit))
        asked.check()
        service.adapter_of(asked.model)
        engine = service.engine()
        return json_response(await asyncio.to_thread(tokenized, engine, asked, service.settings))

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens included: `{"prompt": "..."}`."""
        asked = decode(DetokenizeRequest, await read_body(request, limit=limit))
        service.adapter_of(asked.model)
        engine = service.engine()
        num_ids = max(engine.tokenizer.num_ids, engine.info.vocab_size)
        for token in asked.tokens:
            if not 0 <= token < num_ids:
                message = f"tokens holds {token}; the model's token ids are 0 to {num_ids - 1}"
                raise ApiError(400, message, param="tokens", code="invalid_value")
        return json_response({"prompt": await asyncio.to_thread(engine.tokenizer.decode, asked.tokens)})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        """What the tokenizer's configuration says, its chat template included."""
        if not service.settings.enable_tokenizer_info_endpoint:
            message = "this server does not show its tokenizer; start it with --enable-tokenizer-info-endpoint"
            raise ApiError(403, message, code="tokenizer_info_is_off")
        return json_response(described(service.engine().tokenizer, service.settings.chat_template))

    return router


def tokenized(engine: AsyncLLM, asked: TokenizeRequest, settings: ServerSettings) -> dict[str, Any]:
    """The answer to a checked body of /tokenize."""
    text, add_special_tokens = asked.prompt, True
    if text is None:
        text, add_special_tokens = asked.chat_text(engine, settings), False
    if asked.add_special_tokens is not None:
        add_special_tokens = asked.add_special_tokens
    try:
        tokens = engine.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise bad_request(error) from None
    return {
        "count": len(tokens),
        "max_model_len": engine.info.max_model_len,
        "tokens": tokens,
        "token_strs": [engine.tokenizer.token(token) for token in tokens] if asked.return_token_strs else None,
    }


def described(tokenizer: Tokenizer, chat_template: str | None) -> dict[str, Any]:
    """The tokenizer's configuration as JSON, without paths, and the chat template in force."""
    own = tokenizer.hugging_face
    given = {name: value for name, value in own.init_kwargs.items() if name not in PATHS}
    template = chat_template or own.chat_template
    return {**_plain(given), "tokenizer_class": type(own).__name__, "chat_template": template}


def _plain(value: Any) -> Any:
    """`value` as JSON has it; an added token as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
