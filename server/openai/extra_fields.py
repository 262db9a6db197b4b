"""vLLM's parameters on routes of other protocols, and what those routes' errors are to be called there."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from jax_engine.server.errors import ApiError


class ExtraFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Parameters that a body of another protocol may have beside its own; each means what it means in a chat."""

    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    thinking_token_budget: int | None = None
    structured_outputs: dict[str, Any] | None = None
    vllm_xargs: dict[str, float] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def extras(self) -> dict[str, Any]:
        """Those that are given, as fields of a `ChatCompletionRequest`."""
        values = {name: getattr(self, name) for name in ExtraFields.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Let the block's ApiErrors name parameters as the route's client knows them; `names` maps a chat's to those."""
    try:
        yield
    except ApiError as error:
        name = re.split(r"[.\[]", error.param or "", maxsplit=1)[0]
        if name not in names:
            raise
        message = re.sub(rf"\b{name}\b", names[name], error.message)
        param = names[name] + (error.param or "")[len(name) :]
        raise ApiError(error.status, message, param=param, code=error.code, headers=error.headers) from None
