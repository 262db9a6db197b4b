"""What the routes answer, for `/openapi.json`: the shapes that answers have in common, which clients may rely on."""

from typing import Any, Literal, NotRequired, TypedDict

import msgspec

from jax_engine.server.errors import is_anthropic
from jax_engine.server.openai.frames import EVENT_STREAM, JSON_LINES
from jax_engine.server.schemas import REF_TEMPLATE

JSON, TEXT = "application/json", "text/plain"
# A stream's schema says no more: tools disagree whether it is that of the whole text or of each event.
STREAMS = {EVENT_STREAM: "server-sent events with JSON data", JSON_LINES: "a JSON object a line"}
FinishReason = Literal["stop", "length", "tool_calls", "abort", "error", "repetition"] | None


class Error(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    """OpenAI's error object."""

    error: Error


class AnthropicError(TypedDict):
    type: str
    message: str


class AnthropicErrorResponse(TypedDict):
    """Anthropic's error object."""

    type: Literal["error"]
    error: AnthropicError


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class CompletionResponse(TypedDict):
    """OpenAI's text completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ToolCallFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class ChatCompletionResponse(TypedDict):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelCard]


class ResponseObject(TypedDict):
    """OpenAI's response."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class ResponseDeleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: bool


class ItemList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]
    has_more: bool


class MessageResponse(TypedDict):
    """Anthropic's message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class TokenCount(TypedDict):
    input_tokens: int


class PlainResponse(TypedDict):
    """Texts and why they ended, `n` for each prompt."""

    text: list[str]
    finish_reason: list[FinishReason]
    usage: Usage


class Condition(TypedDict):
    status: Literal["starting", "ready", "dead", "shutting_down"]
    programs_compiled: int
    programs_planned: int
    compile_eta_seconds: float | None


class Life(TypedDict):
    status: str


class Version(TypedDict):
    version: str


class Load(TypedDict):
    server_load: int


class Reset(TypedDict):
    reset: bool


class Sleeping(TypedDict):
    is_sleeping: bool


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    tokenizer_class: str
    chat_template: str | None


class PromptUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str  # base64


class Pooled(TypedDict):
    object: Literal["pooling"]
    index: int
    data: list[float] | str  # base64


class Score(TypedDict):
    object: Literal["score"]
    index: int
    score: float


class Rank(TypedDict):
    index: int
    relevance_score: float


class EmbeddingList(TypedDict):
    id: str
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PromptUsage


class PooledList(TypedDict):
    id: str
    object: Literal["list"]
    model: str
    data: list[Pooled]
    usage: PromptUsage


class ScoreList(TypedDict):
    id: str
    object: Literal["list"]
    model: str
    data: list[Score]
    usage: PromptUsage


class Ranking(TypedDict):
    id: str
    model: str
    results: list[Rank]
    usage: PromptUsage


# What a route, or one of its methods, answers with status 200: a type of JSON, or None for any text; and how it
# streams, if it can.
ANSWERS: dict[str, tuple[Any, str | None]] = {
    "/v1/completions": (CompletionResponse, EVENT_STREAM),
    "/v1/chat/completions": (ChatCompletionResponse, EVENT_STREAM),
    "/v1/models": (ModelList, None),
    "/v1/models/{name}": (ModelCard, None),
    "/v1/responses": (ResponseObject, EVENT_STREAM),
    "/v1/responses/{response_id}": (ResponseObject, EVENT_STREAM),
    "delete /v1/responses/{response_id}": (ResponseDeleted, None),
    "/v1/responses/{response_id}/cancel": (ResponseObject, None),
    "/v1/responses/{response_id}/input_items": (ItemList, None),
    "/v1/messages": (MessageResponse, EVENT_STREAM),
    "/v1/messages/count_tokens": (TokenCount, None),
    "/v1/load_lora_adapter": (None, None),
    "/v1/unload_lora_adapter": (None, None),
    "/generate": (PlainResponse, JSON_LINES),
    "/generate_stream": (dict[str, Any], JSON_LINES),
    "/health": (Condition, None),
    "/ping": (Condition, None),
    "/live": (Life, None),
    "/version": (Version, None),
    "/load": (Load, None),
    "/metrics": (None, None),
    "/v1/embeddings": (EmbeddingList, None),
    "/pooling": (PooledList, None),
    "/score": (ScoreList, None),
    "/v1/score": (ScoreList, None),
    "/rerank": (Ranking, None),
    "/v1/rerank": (Ranking, None),
    "/v2/rerank": (Ranking, None),
    "/classify": (dict[str, Any], None),  # none that is served so far
    "/engine_state": (dict[str, Any], None),
    "/reset_prefix_cache": (Reset, None),
    "/sleep": (Sleeping, None),
    "/wake_up": (Sleeping, None),
    "/is_sleeping": (Sleeping, None),
    "/abort_requests": (dict[str, Any], None),
    "/start_profile": (dict[str, Any], None),
    "/stop_profile": (dict[str, Any], None),
    "/tokenize": (Tokens, None),
    "/detokenize": (Prompt, None),
    "/tokenizer_info": (TokenizerInfo, None),
}


def describe_answers(document: dict[str, Any]) -> None:
    """Put into an OpenAPI document what each of its routes answers, and how each refuses."""
    kinds = [kind for kind, _ in ANSWERS.values() if kind is not None]
    kinds += [ErrorResponse, AnthropicErrorResponse]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF_TEMPLATE)
    by_kind = dict(zip(map(str, kinds), schemas, strict=True))
    document["components"]["schemas"].update(components)
    for path, operations in document["paths"].items():
        if path not in ANSWERS:
            continue
        error = by_kind[str(AnthropicErrorResponse if is_anthropic(path) else ErrorResponse)]
        refusal = {"content": {JSON: {"schema": error}}}
        for method, operation in operations.items():
            kind, stream = ANSWERS.get(f"{method} {path}", ANSWERS[path])
            content = {TEXT: {"schema": {"type": "string"}}} if kind is None else {JSON: {"schema": by_kind[str(kind)]}}
            if stream is not None:
                content[stream] = {"schema": {"description": STREAMS[stream]}}
            operation["responses"] = {
                "200": {"description": "the answer", "content": content},
                "4XX": {"description": "the request is at fault", **refusal},
                "5XX": {"description": "the server is at fault, or busy", **refusal},
            }
