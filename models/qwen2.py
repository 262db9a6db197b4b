"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on queries, keys and values."""

from jax_engine.models.config import ModelConfig
from jax_engine.models.llama import AttentionSpec, LlamaForCausalLM


class Qwen2ForCausalLM(LlamaForCausalLM):
    """Optionally, upper layers see a sliding window."""

    @staticmethod
    def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
        return AttentionSpec(qkv_bias=True, window=layer_window(config, layer))


def layer_window(config: ModelConfig, layer: int) -> int | None:
    """The window of one layer: by `layer_types` where given, else on layers from `max_window_layers` if turned on."""
    if config.layer_types:
        sliding = config.layer_types[layer] == "sliding_attention"
    else:
        sliding = config.use_sliding_window and layer >= config.max_window_layers
    return config.sliding_window if sliding else None
