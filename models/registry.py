"""Which class runs a checkpoint, by the name in its `config.json`."""

from collections.abc import Mapping

from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.mistral import MistralForCausalLM
from jax_engine.models.mixtral import MixtralForCausalLM
from jax_engine.models.qwen2 import Qwen2ForCausalLM
from jax_engine.models.qwen2_moe import Qwen2MoeForCausalLM
from jax_engine.models.qwen3 import Qwen3ForCausalLM
from jax_engine.models.qwen3_moe import Qwen3MoeForCausalLM

MODELS: Mapping[str, type[LlamaForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen2MoeForCausalLM": Qwen2MoeForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def resolve_model(architecture: str) -> type[LlamaForCausalLM]:
    """The class for an entry of `architectures`; ValueError listing the supported ones when there is none."""
    if architecture not in MODELS:
        raise ValueError(f"architecture {architecture!r} is not supported; supported are {', '.join(sorted(MODELS))}")
    return MODELS[architecture]
