"""A prepared chat as token ids, so that its length is known before it runs."""

import asyncio
from dataclasses import dataclass, replace
from functools import partial

from jax_engine.async_llm import LONG_TEXT_CHARACTERS, AsyncLLM
from jax_engine.frontend.processor import TokensPrompt
from jax_engine.sampling_params import SamplingParams
from jax_engine.server.errors import ApiError
from jax_engine.server.openai.chat_routes import PreparedChat


@dataclass(frozen=True)
class FittedChat:
    """A chat's prompt, and its sampling parameters without a limit where the context's end comes before it."""

    prompt: TokensPrompt
    params: SamplingParams
    context_is_limit: bool


async def prompt_tokens(engine: AsyncLLM, chat: PreparedChat) -> list[int]:
    """The ids of a chat's prompt."""
    text = chat.prompt["prompt"]
    add_special_tokens = chat.prompt.get("add_special_tokens", True)
    encode = partial(engine.tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(encode) if len(text) > LONG_TEXT_CHARACTERS else encode()


async def fitted(engine: AsyncLLM, chat: PreparedChat, *, name: str) -> FittedChat:
    """The chat with its prompt tokenized. A limit on the answer is an upper bound: one that reaches past the end of the
    context is lowered to it.

    Raises:
        ApiError: 400 for a prompt that leaves no room for an answer; `name` is the parameter that it came from.
    """
    try:
        tokens = await prompt_tokens(engine, chat)
    except ValueError as error:
        raise ApiError(400, str(error), param=name, code="invalid_value") from None
    limit = engine.info.max_model_len
    if len(tokens) >= limit:
        message = (
            f"{name} makes a prompt of {len(tokens)} tokens; at most {limit - 1} fit with one to generate "
            f"(max_model_len={limit}): shorten it, or raise max_model_len if the model allows"
        )
        raise ApiError(400, message, param=name, code="context_length_exceeded")
    prompt: TokensPrompt = {"prompt_token_ids": tokens, "prompt": chat.prompt["prompt"]}
    if salt := chat.prompt.get("cache_salt"):
        prompt["cache_salt"] = salt
    asked = chat.params.max_tokens
    context_is_limit = asked is not None and asked > limit - len(tokens)
    params = replace(chat.params, max_tokens=None) if context_is_limit else chat.params
    return FittedChat(prompt, params, context_is_limit)
