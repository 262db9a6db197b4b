"""Bodies of the routes that give vectors and scores, decoded and checked."""

from typing import Annotated, Any

import msgspec

from jax_engine.frontend.processor import Prompt, TextPrompt
from jax_engine.pooling_params import PoolingParams
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.protocol import PromptField
from jax_engine.server.openai.tokenizer_routes import ChatFields
from jax_engine.server.validation import checked_prompts, decode

ENCODING_FORMATS = ("float", "base64")
TextsField = Annotated[
    Any,
    msgspec.Meta(
        description="A string, or a list of strings.",
        extra_json_schema={"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    ),
]


class PoolingFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all of them take; null asks for the server's default."""

    model: str | None = None
    user: Any = None  # without effect on the answer
    truncate_prompt_tokens: int | None = None
    priority: int | None = None

    def pooling_params(self, **given: Any) -> PoolingParams:
        """What is given; ApiError 400 for a value out of range."""
        truncate = self.truncate_prompt_tokens
        if truncate is not None and truncate != -1 and truncate < 1:
            message = f"truncate_prompt_tokens={truncate} must be at least 1, or -1 for what fits"
            raise ApiError(400, message, param="truncate_prompt_tokens", code="invalid_value")
        try:
            return PoolingParams(truncate_prompt_tokens=truncate, **given)
        except ValueError as error:
            raise bad_request(error) from None


class EmbeddingRequest(PoolingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/embeddings and /pooling: an `input`, or the `messages` of a chat."""

    input: PromptField = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's newer name of it
    add_special_tokens: bool | None = None  # null: as the tokenizer does for an input, none for a rendered chat
    cache_salt: str | None = None

    @classmethod
    def from_body(cls, body: bytes) -> "EmbeddingRequest":
        """Decode and check a body; ApiError 400 for anything wrong with it."""
        asked = decode(cls, body)
        if (asked.input is None) == (asked.messages is None):
            raise ApiError(400, "give either input or messages, one of them", param="input", code="invalid_value")
        if asked.messages is None:
            asked.chat.refuse_alone("input")
        if asked.encoding_format not in (None, *ENCODING_FORMATS):
            message = f"encoding_format={asked.encoding_format!r} must be float or base64"
            raise ApiError(400, message, param="encoding_format", code="invalid_value")
        if None not in (asked.normalize, asked.use_activation) and asked.normalize != asked.use_activation:
            message = "normalize and use_activation are two names of one thing; give only one"
            raise ApiError(400, message, param="use_activation", code="invalid_value")
        return asked

    @property
    def chat(self) -> ChatFields:
        """The messages and what belongs to them."""
        return ChatFields(**{name: getattr(self, name) for name in ChatFields.__struct_fields__})

    def params(self) -> PoolingParams:
        """How the inputs become vectors; ApiError 400 for a value out of range."""
        normalize = self.use_activation if self.normalize is None else self.normalize
        return self.pooling_params(dimensions=self.dimensions, normalize=normalize)

    def prompts(self, rendered: str | None) -> list[Prompt]:
        """The prompts in order; `rendered` is the text of the messages, if they came."""
        if rendered is not None:
            return [self._with_settings(rendered, add_special_tokens=bool(self.add_special_tokens))]
        given = checked_prompts(self.input, name="input")
        return [self._with_settings(prompt, add_special_tokens=self.add_special_tokens) for prompt in given]

    def _with_settings(self, prompt: str | list[int], *, add_special_tokens: bool | None) -> Prompt:
        if isinstance(prompt, list):
            return {"prompt_token_ids": prompt, "cache_salt": self.cache_salt}
        text: TextPrompt = {"prompt": prompt, "cache_salt": self.cache_salt}
        if add_special_tokens is not None:
            text["add_special_tokens"] = add_special_tokens
        return text


class ScoreRequest(PoolingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /score: `text_1` with each of `text_2`, or pair by pair; vLLM's other names of the two as well."""

    text_1: TextsField = None
    text_2: TextsField = None
    queries: TextsField = None
    documents: TextsField = None
    data_1: TextsField = None
    data_2: TextsField = None

    def texts(self) -> tuple[list[str], list[str]]:
        """Both sides; ApiError 400 unless each came, by one name."""
        sides = []
        for names in (("text_1", "queries", "data_1"), ("text_2", "documents", "data_2")):
            given = [name for name in names if getattr(self, name) is not None]
            if len(given) != 1:
                message = f"give {names[0]}, or {' or '.join(names[1:])} in its place, one of them"
                raise ApiError(400, message, param=names[0], code="invalid_value")
            sides.append(checked_texts(getattr(self, given[0]), name=given[0]))
        return sides[0], sides[1]


class RerankRequest(PoolingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /rerank, as Jina and Cohere have it."""

    query: str
    documents: TextsField
    top_n: int | None = None  # results; null or 0: all
    return_documents: bool | None = None  # null: yes, but not on Cohere's route
    max_tokens_per_doc: int | None = None  # of Cohere's route: truncates documents

    def check(self) -> None:
        """Raise an ApiError for a value out of range."""
        for name, least in (("top_n", 0), ("max_tokens_per_doc", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ApiError(400, f"{name}={value} must be at least {least}", param=name, code="invalid_value")


class ClassifyRequest(PoolingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /classify."""

    input: PromptField


def checked_texts(value: object, *, name: str) -> list[str]:
    """One text or several, as a list."""
    texts = checked_prompts(value, name=name)
    if not all(isinstance(text, str) for text in texts):
        message = f"{name} must be a string or a list of strings; token ids are not taken here"
        raise ApiError(400, message, param=name, code="invalid_type")
    return [text for text in texts if isinstance(text, str)]
