"""Pooling requests on their way into the engine, and what the user gets of them; vLLM's objects and names."""

from dataclasses import replace
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from jax_engine.core.messages import TokenControls
from jax_engine.frontend.processor import InputProcessor, PreparedRequest, Prompt
from jax_engine.lora_request import LoRARequest
from jax_engine.outputs import RequestOutput
from jax_engine.pooling_params import PoolingParams, RequestParams
from jax_engine.sampling_params import RequestOutputKind, SamplingParams

Vector = NDArray[np.float32]


class PoolingOutput(msgspec.Struct, frozen=True):
    """The vector of a prompt, float32."""

    data: Vector


class EmbeddingOutput(msgspec.Struct, frozen=True):
    """The same as a list."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


class ScoringOutput(msgspec.Struct, frozen=True):
    """How alike two texts are: the cosine of the angle between their vectors."""

    score: float


class PooledRequest(msgspec.Struct, frozen=True):
    """What the outputs of pooling requests have in common."""

    request_id: str
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True


class PoolingRequestOutput(PooledRequest, frozen=True, kw_only=True):
    """What `LLM.encode` gives for a prompt."""

    outputs: PoolingOutput

    @classmethod
    def of(cls, output: RequestOutput, params: PoolingParams) -> Self:
        """The vector of a finished request."""
        data = PoolingOutput(vector_of(output, params))
        return cls(output.request_id, output.prompt_token_ids, output.num_cached_tokens, outputs=data)


class EmbeddingRequestOutput(PooledRequest, frozen=True, kw_only=True):
    """What `LLM.embed` gives for a prompt."""

    outputs: EmbeddingOutput

    @classmethod
    def of(cls, encoded: PoolingRequestOutput) -> Self:
        """The same vector as a list."""
        data = EmbeddingOutput(encoded.outputs.data.tolist())
        return cls(encoded.request_id, encoded.prompt_token_ids, encoded.num_cached_tokens, outputs=data)


class ScoringRequestOutput(PooledRequest, frozen=True, kw_only=True):
    """What `LLM.score` gives for a pair; the token ids are those of its two texts, one after the other."""

    outputs: ScoringOutput

    @classmethod
    def of(cls, one: PoolingRequestOutput, other: PoolingRequestOutput) -> Self:
        """The score of two texts."""
        tokens = [*one.prompt_token_ids, *other.prompt_token_ids]
        data = ScoringOutput(similarity(one.outputs.data, other.outputs.data))
        return cls(other.request_id, tokens, one.num_cached_tokens + other.num_cached_tokens, outputs=data)


def prepare_pooling(
    inputs: InputProcessor,
    request_id: str,
    prompt: Prompt,
    params: PoolingParams,
    *,
    priority: int = 0,
    lora: LoRARequest | None = None,
) -> PreparedRequest:
    """Check and tokenize a request whose parameters have none left out, as `InputProcessor.prepare` does."""
    size = inputs.hidden_size
    if params.dimensions is not None and params.dimensions > size:
        raise ValueError(
            f"dimensions={params.dimensions} must be at most {size}, the model's hidden size; lower it, or leave it out"
        )
    # A token is drawn, and nobody's: the steps of all requests end alike.
    one = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        ignore_eos=True,
        truncate_prompt_tokens=params.truncate_prompt_tokens,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prepared = inputs.prepare(request_id, prompt, one, priority=priority, lora=lora)
    controls = TokenControls(pooling=params.pooling_type)
    changed = [
        msgspec.structs.replace(core_request, controls=controls, stop_token_ids=())
        for core_request in prepared.core_requests
    ]
    return replace(prepared, core_requests=tuple(changed))


def prepare_request(
    inputs: InputProcessor,
    defaults: PoolingParams,
    request_id: str,
    prompt: Prompt,
    params: RequestParams,
    *,
    priority: int = 0,
    lora: LoRARequest | None = None,
) -> PreparedRequest:
    """Check and tokenize a request of either kind; what a pooling one leaves out is of `defaults`."""
    if isinstance(params, SamplingParams):
        return inputs.prepare(request_id, prompt, params, priority=priority, lora=lora)
    return prepare_pooling(inputs, request_id, prompt, params.with_defaults(defaults), priority=priority, lora=lora)


def vector_of(output: RequestOutput, params: PoolingParams) -> Vector:
    """The vector of a finished pooling request."""
    assert output.pooled is not None, "a pooling request that has ended has its vector"
    return finished(output.pooled, params)


def finished(pooled: bytes, params: PoolingParams) -> Vector:
    """What the core gave for a request, cut to `dimensions` and then normalized."""
    vector: Vector = np.frombuffer(pooled, np.float32)[: params.dimensions]
    if not params.normalize:
        return vector
    # As torch: a vector of zeros stays what it is.
    normalized: Vector = vector / np.maximum(np.linalg.norm(vector), np.float32(1e-12))
    return normalized


def similarity(first: Vector, second: Vector) -> float:
    """The cosine of the angle between two vectors; 0 where one has no direction."""
    lengths = float(np.linalg.norm(first)) * float(np.linalg.norm(second))
    return min(1.0, max(-1.0, float(first @ second) / lengths)) if lengths else 0.0


def paired(num_first: int, num_second: int, names: tuple[str, str]) -> list[tuple[int, int]]:
    """Which of the first are compared with which of the second: one with each, or each with its own.

    Raises:
        ValueError: there are none, or their numbers do not go together.
    """
    if not num_first or not num_second or num_first not in (1, num_second):
        raise ValueError(
            f"{names[0]} has {num_first} entries and {names[1]} {num_second}; give one for all of {names[1]}, or one "
            "for each"
        )
    return [(0 if num_first == 1 else index, index) for index in range(num_second)]
