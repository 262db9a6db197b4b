"""Qwen3 (arXiv 2505.09388): norms on queries and keys in place of Qwen2's biases."""

from jax_engine.models.config import ModelConfig
from jax_engine.models.llama import AttentionSpec, LlamaForCausalLM
from jax_engine.models.qwen2 import layer_window


class Qwen3ForCausalLM(LlamaForCausalLM):
    """The dense models; each head is normalised before it is rotated."""

    @staticmethod
    def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
        return AttentionSpec(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=True,
            window=layer_window(config, layer),
        )
