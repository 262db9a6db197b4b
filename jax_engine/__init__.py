"""LLM inference and serving in JAX. Importing it is cheap: each public name loads its module when it is first used."""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_engine.async_llm import AsyncLLM as AsyncLLM
    from jax_engine.config import EngineConfig as EngineConfig
    from jax_engine.core.admin_client import EngineBusyError as EngineBusyError
    from jax_engine.core.core_client import EngineDeadError as EngineDeadError
    from jax_engine.frontend.beam_search import BeamSearchOutput as BeamSearchOutput
    from jax_engine.frontend.beam_search import BeamSearchParams as BeamSearchParams
    from jax_engine.frontend.beam_search import BeamSearchSequence as BeamSearchSequence
    from jax_engine.frontend.output_processor import EngineAsleepError as EngineAsleepError
    from jax_engine.frontend.output_processor import QueueOverflowError as QueueOverflowError
    from jax_engine.frontend.output_processor import RequestFailedError as RequestFailedError
    from jax_engine.frontend.pooling_requests import EmbeddingRequestOutput as EmbeddingRequestOutput
    from jax_engine.frontend.pooling_requests import PoolingRequestOutput as PoolingRequestOutput
    from jax_engine.frontend.pooling_requests import ScoringRequestOutput as ScoringRequestOutput
    from jax_engine.frontend.processor import TextPrompt as TextPrompt
    from jax_engine.frontend.processor import TokensPrompt as TokensPrompt
    from jax_engine.llm import LLM as LLM
    from jax_engine.lora_request import LoRARequest as LoRARequest
    from jax_engine.outputs import CompletionOutput as CompletionOutput
    from jax_engine.outputs import Logprob as Logprob
    from jax_engine.outputs import RequestOutput as RequestOutput
    from jax_engine.pooling_params import PoolingParams as PoolingParams
    from jax_engine.sampling_params import RepetitionDetectionParams as RepetitionDetectionParams
    from jax_engine.sampling_params import RequestOutputKind as RequestOutputKind
    from jax_engine.sampling_params import SamplingParams as SamplingParams
    from jax_engine.structured_outputs import ReasoningParams as ReasoningParams
    from jax_engine.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "BeamSearchOutput": "frontend.beam_search",
    "BeamSearchParams": "frontend.beam_search",
    "BeamSearchSequence": "frontend.beam_search",
    "CompletionOutput": "outputs",
    "EmbeddingRequestOutput": "frontend.pooling_requests",
    "EngineAsleepError": "frontend.output_processor",
    "EngineBusyError": "core.admin_client",
    "EngineConfig": "config",
    "EngineDeadError": "core.core_client",
    "Logprob": "outputs",
    "LoRARequest": "lora_request",
    "PoolingParams": "pooling_params",
    "PoolingRequestOutput": "frontend.pooling_requests",
    "QueueOverflowError": "frontend.output_processor",
    "ReasoningParams": "structured_outputs",
    "RequestFailedError": "frontend.output_processor",
    "RepetitionDetectionParams": "sampling_params",
    "RequestOutput": "outputs",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "ScoringRequestOutput": "frontend.pooling_requests",
    "StructuredOutputsParams": "structured_outputs",
    "TextPrompt": "frontend.processor",
    "TokensPrompt": "frontend.processor",
}

try:
    __version__ = metadata.version("jax-engine")
except metadata.PackageNotFoundError:  # a checkout, used as it lies
    __version__ = "0+unknown"
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
