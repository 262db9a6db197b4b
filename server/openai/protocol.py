"""The requests that the OpenAI routes understand, decoded and checked in one pass.

Every field of OpenAI's reference and of vLLM's extension stands here. One whose feature does not exist yet is accepted
only at the value that means "off" (`NEUTRAL`) and is otherwise refused by name: nothing that would change an answer is
ignored. What is ignored changes no answer and is listed in `WITHOUT_EFFECT`.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Annotated, Any, Self

import msgspec

from jax_engine.frontend.beam_search import BeamSearchParams
from jax_engine.frontend.processor import Prompt, TextPrompt
from jax_engine.sampling_params import RequestOutputKind, SamplingParams
from jax_engine.server.errors import ApiError, bad_request
from jax_engine.server.openai.conversation import checked_tools, plain_messages, shown_tool
from jax_engine.server.openai.forms import FormFields
from jax_engine.server.openai.tool_choice import ToolChoice, tool_choice
from jax_engine.server.validation import check_neutral, checked_prompts, decode

# Field -> the values, besides null, at which it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    "suffix": ("",),
}
# Bookkeeping of OpenAI's service: accepted, and without effect on the answer.
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
)
# What of the sampling parameters goes with a beam search.
BEAM_SEARCH_FIELDS = {"n", "temperature", "max_tokens", "ignore_eos", "include_stop_str_in_output"}

PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}
PromptField = Annotated[
    Any,
    msgspec.Meta(
        description="A string, a list of strings, a list of token ids, or a list of such lists.",
        extra_json_schema=PROMPT_SCHEMA,
    ),
]


class SamplingFields(FormFields, kw_only=True, forbid_unknown_fields=True):
    """The fields that `SamplingParams` has under the same names, and other names of some; null asks for the model's
    default.
    """

    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    extra_args: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    thinking_token_budget: int | None = None
    truncate_prompt_tokens: int | None = None
    repetition_detection: dict[str, Any] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def given(self) -> dict[str, Any]:
        """What is not null, under the names of `SamplingParams`; ApiError 400 for what contradicts itself."""
        values = msgspec.structs.asdict(self)
        names = [name for name in SamplingFields.__struct_fields__ if name not in FormFields.__struct_fields__]
        values["structured_outputs"] = self.form()
        return {name: values[name] for name in (*names, "structured_outputs") if values[name] is not None}


def sampling_params(base: SamplingParams, given: Mapping[str, Any], *, stream: bool) -> SamplingParams:
    """`base` with what is given; ApiError 400 for a value out of range."""
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    try:
        return replace(base, **{**given, "output_kind": kind})
    except ValueError as error:
        raise bad_request(error) from None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None  # the token counts, at the end
    include_obfuscation: bool | None = None  # a field that makes the lengths of chunks tell little
    continuous_usage_stats: bool | None = None  # the token counts so far, in every chunk

    def check(self) -> None:
        """Raise an ApiError for what contradicts itself."""
        if self.continuous_usage_stats and not self.include_usage:
            name = "stream_options.continuous_usage_stats"
            message = f"{name}=true needs include_usage=true; add it, or leave {name} out"
            raise ApiError(400, message, param=name, code="invalid_value")


class GenerationRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = None  # null: as the tokenizer does for a prompt, none for a rendered chat
    cache_salt: str | None = None  # requests share cached prefixes only with those of the same salt
    priority: int | None = None  # the lowest runs first; other than 0 only under the scheduling policy "priority"
    use_beam_search: bool | None = None  # the `n` sequences that are likeliest as a whole, the best first
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    return_token_ids: bool | None = None  # those of the prompt and of the answer
    vllm_xargs: dict[str, float] | None = None  # another name of `extra_args`

    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None

    service_tier: Any = None
    store: Any = None

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Decode and check a body; ApiError 400 for anything wrong with it."""
        asked = decode(cls, body, NESTED)
        asked.check()
        return asked

    def given(self) -> dict[str, Any]:
        """What is not null."""
        given = SamplingFields.given(self)
        return given if self.vllm_xargs is None else {**given, "extra_args": self.vllm_xargs}

    @property
    def shown(self) -> dict[str, bool]:
        """vLLM's additions to an answer that are asked for, for `Answers`."""
        return {"prompt_logprobs": self.prompt_logprobs is not None, "token_ids": bool(self.return_token_ids)}

    def check(self) -> None:
        """Raise an ApiError for what contradicts itself or asks for a feature that is not there yet."""
        for name, value in msgspec.structs.asdict(self).items():
            if name in NEUTRAL:
                check_neutral(name, value, NEUTRAL[name])
        if self.vllm_xargs is not None and self.extra_args is not None:
            message = "vllm_xargs and extra_args are two names of one thing; give only one"
            raise ApiError(400, message, param="vllm_xargs", code="invalid_value")
        if self.cache_salt == "":
            message = "cache_salt must be a non-empty string; leave it out to share cached prefixes with all requests"
            raise ApiError(400, message, param="cache_salt", code="invalid_value")
        if self.stream_options is not None:
            if not self.stream:
                raise ApiError(400, "stream_options needs stream=true", param="stream_options", code="invalid_value")
            self.stream_options.check()

    def beam_search_params(self, params: SamplingParams) -> BeamSearchParams | None:
        """The search that is asked for, `params` being the request's sampling parameters; None for none. ApiError 400
        for what does not go with it.
        """
        fields: dict[str, Any] = {"length_penalty": self.length_penalty, "early_stopping": self.early_stopping}
        own = {name: value for name, value in fields.items() if value is not None}
        if not self.use_beam_search:
            for name, value in own.items():
                if value != getattr(BeamSearchParams, name):
                    message = f"{name}={value!r} needs use_beam_search=true; add it, or leave {name} out"
                    raise ApiError(400, message, param=name, code="invalid_value")
            return None
        if params.max_tokens is None or self.max_tokens == 0:
            raise ApiError(
                400, "use_beam_search needs max_tokens, at least 1", param="max_tokens", code="invalid_value"
            )
        given = {name: getattr(params, name) for name in self.given()}
        for name in given.keys() - BEAM_SEARCH_FIELDS:
            if given[name] != getattr(SamplingParams(), name):
                message = f"{name}={given[name]!r} has no effect on a beam search; leave it out"
                raise ApiError(400, message, param=name, code="invalid_value")
        try:
            return BeamSearchParams(
                beam_width=params.n,
                max_tokens=params.max_tokens,
                ignore_eos=params.ignore_eos,
                include_stop_str_in_output=params.include_stop_str_in_output,
                temperature=given.get("temperature", 0.0),
                **own,
            )
        except ValueError as error:
            raise bad_request(error) from None

    def sampling_params(self, base: SamplingParams) -> SamplingParams:
        """The sampling parameters given; null takes that of `base`, the model's own defaults."""
        return sampling_params(base, self.given(), stream=bool(self.stream))


class CompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/completions."""

    prompt: PromptField
    best_of: int | None = None
    # The prompt before its completion, with its log-probabilities if any are asked for; with max_tokens=0, by itself.
    echo: bool | None = None
    suffix: Any = None

    def check(self) -> None:
        GenerationRequest.check(self)
        if self.best_of is None or self.best_of == (self.n or 1):
            return
        others = {"stream": self.stream, "echo": self.echo, "use_beam_search": self.use_beam_search}
        unfit = [name for name, value in others.items() if value]
        if self.best_of < (self.n or 1) or unfit:
            rule = f"cannot go with {unfit[0]}" if unfit else f"must be at least n={self.n or 1}"
            raise ApiError(400, f"best_of={self.best_of} {rule}", param="best_of", code="invalid_value")

    @property
    def chooses(self) -> bool:
        """Whether `n` of more completions are shown."""
        return self.best_of is not None and self.best_of > (self.n or 1)

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is to follow the prompt."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self, base: SamplingParams) -> SamplingParams:
        """With `echo`, log-probabilities are of the prompt too; where no token is asked for, one is drawn, unshown."""
        given = {**self.given(), "max_tokens": 1} if self.prompt_only else self.given()
        if self.chooses:
            given["n"] = self.best_of
            given.setdefault("logprobs", 0)  # what is compared
        params = sampling_params(base, given, stream=bool(self.stream))
        if not self.echo or params.logprobs is None:
            return params
        wanted = params.logprobs, params.prompt_logprobs or 0
        return replace(params, prompt_logprobs=-1 if -1 in wanted else max(wanted))

    def prompts(self) -> list[Prompt]:
        """The prompts in order; each text or token ids, with what belongs to it."""
        return [self._with_settings(prompt) for prompt in checked_prompts(self.prompt)]

    def _with_settings(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, list):
            return {"prompt_token_ids": prompt, "cache_salt": self.cache_salt} if self.cache_salt else prompt
        given: TextPrompt = {"prompt": prompt}
        if self.add_special_tokens is not None:
            given["add_special_tokens"] = self.add_special_tokens
        if self.cache_salt:
            given["cache_salt"] = self.cache_salt
        return given if len(given) > 1 else prompt


class ChatCompletionRequest(GenerationRequest, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None  # false: one call at most
    include_reasoning: bool | None = None  # false: what the model thinks is not shown
    reasoning_effort: str | None = None  # for chat templates that read it
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None  # only where the operator trusts clients with it
    chat_template_kwargs: dict[str, Any] | None = None

    logprobs: bool | None = None  # a switch here, the number being top_logprobs
    top_logprobs: int | None = None
    echo: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    moderation: Any = None

    def check(self) -> None:
        GenerationRequest.check(self)
        self.choice()
        if self.continue_final_message and self.add_generation_prompt:
            message = "add_generation_prompt and continue_final_message cannot both be true; drop one"
            raise ApiError(400, message, param="continue_final_message", code="invalid_value")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = f"max_tokens={both[0]} and max_completion_tokens={both[1]} differ; give only the second"
            raise ApiError(400, message, param="max_tokens", code="invalid_value")
        check_neutral("echo", self.echo, (False,))
        if self.top_logprobs and not self.logprobs:
            message = f"top_logprobs={self.top_logprobs} needs logprobs=true; add it, or leave top_logprobs out"
            raise ApiError(400, message, param="top_logprobs", code="invalid_value")

    def sampling_params(self, base: SamplingParams) -> SamplingParams:
        """As for completions, but an answer without a limit goes on to the end of the context."""
        number = (self.top_logprobs or 0) if self.logprobs else None
        given = {"max_tokens": self.max_completion_tokens, **self.given(), "logprobs": number}
        return sampling_params(base, given, stream=bool(self.stream))

    def choice(self) -> ToolChoice:
        """What may be called, or must be; ApiError 400 for a tool or a choice that is none."""
        return tool_choice(self.tool_choice, checked_tools(self.tools or []))

    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of; `strict` is for the server, and models have not learned it."""
        return [shown_tool(tool) for tool in self.tools] if self.tools and self.tool_choice != "none" else None

    def template_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `AsyncLLM.render_chat`, besides the messages."""
        generation_prompt = self.add_generation_prompt
        return {
            "tools": self.offered_tools(),
            "add_generation_prompt": not self.continue_final_message
            if generation_prompt is None
            else generation_prompt,
            "continue_final_message": bool(self.continue_final_message),
            "chat_template_kwargs": self.chat_template_kwargs
            if self.reasoning_effort is None
            else {"reasoning_effort": self.reasoning_effort, **(self.chat_template_kwargs or {})},
        }

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as `AsyncLLM.render_chat` takes them."""
        return plain_messages(self.messages)


class PlainRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Body of POST /generate and /generate_stream; the sampling fields may also stand inside `sampling_params`."""

    prompt: PromptField
    model: str | None = None
    stream: bool = False
    sampling_params: SamplingFields | None = None
    priority: int | None = None

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Decode a body; ApiError 400 for anything wrong with it."""
        return decode(cls, body, NESTED)

    def params(self, base: SamplingParams, *, stream: bool) -> SamplingParams:
        """The sampling parameters of both places; ApiError 400 for one that stands in both."""
        outer, inner = self.given(), self.sampling_params.given() if self.sampling_params else {}
        for name in outer.keys() & inner.keys():
            message = f"{name} stands both beside and inside sampling_params; drop one"
            raise ApiError(400, message, param=name, code="invalid_value")
        return sampling_params(base, {**outer, **inner}, stream=stream)

    def prompts(self) -> list[Prompt]:
        """The prompts in order; each text or token ids."""
        return [*checked_prompts(self.prompt)]


NESTED: Mapping[str, type[msgspec.Struct]] = MappingProxyType(
    {"stream_options": StreamOptions, "sampling_params": SamplingFields}
)
