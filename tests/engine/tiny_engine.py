"""A tiny random model's configuration, requests for the engine core, and what comes of them."""

from typing import Any

import jax.numpy as jnp

from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Add, CoreOutput, CoreRequest
from jax_engine.models.config import ModelConfig
from jax_engine.models.registry import resolve_model
from jax_engine.sharding.placed_model import PlacedModel

VOCAB_SIZE = 101
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "dtype": "float32",
}


TINY_MIXTURE = TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


def placed_model(attention_backend: str = "xla", hf: dict[str, Any] = TINY, **given: object) -> PlacedModel:
    """The tiny model on one CPU device, in pages of 8 tokens unless told otherwise."""
    config = ModelConfig.from_hf(hf)
    defaults = {"mesh": None, "dtype": jnp.float32, "page_size": 8, "scan_layers": False}
    return PlacedModel.of(
        resolve_model(config.architecture),
        config,
        platform="cpu",
        attention_backend=attention_backend,
        **(defaults | given),
    )


def core_request(request_id: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> CoreRequest:
    """A request with the sampler's neutral values, greedy unless told otherwise."""
    given = {
        "min_tokens": 0,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "prng_key": (0, 0),
        "eos_token_ids": (),
        "stop_token_ids": (),
        "arrival_time": 0.0,
    } | fields
    return CoreRequest(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, **given)


def run_requests(core: InProcessCore, requests: list[CoreRequest]) -> dict[str, list[int]]:
    """The tokens of each request, all of them in the engine at once."""
    outputs = collect(core, requests)
    return {
        request_id: [token for output in given for token in output.new_token_ids]
        for request_id, given in outputs.items()
    }


def collect(core: InProcessCore, requests: list[CoreRequest]) -> dict[str, list[CoreOutput]]:
    """Every output of each request until the engine has nothing left to do."""
    outputs: dict[str, list[CoreOutput]] = {request.request_id: [] for request in requests}
    core.send(Add(requests))
    while core.has_work():
        for output in core.step().outputs:
            outputs[output.request_id].append(output)
    return outputs
