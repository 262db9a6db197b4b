"""Mistral (arXiv 2310.06825): Llama with a sliding window."""

from jax_engine.models.config import ModelConfig
from jax_engine.models.llama import AttentionSpec, LlamaForCausalLM


class MistralForCausalLM(LlamaForCausalLM):
    """Every layer sees `sliding_window` tokens, unless `layer_types` says which do."""

    @staticmethod
    def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
        sliding = not config.layer_types or config.layer_types[layer] == "sliding_attention"
        return AttentionSpec(window=config.sliding_window if sliding else None)
