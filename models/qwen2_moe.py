"""Qwen1.5's and Qwen2's mixtures of experts (arXiv 2407.10671): Qwen3's kind, with an expert that all rows share."""

from typing import ClassVar

from jax_engine.models.config import ExpertsConfig, ModelConfig
from jax_engine.models.llama import AttentionSpec, LlamaForCausalLM
from jax_engine.models.weights import EXPERT_RULES, Rule


class Qwen2MoeForCausalLM(LlamaForCausalLM):
    """Optionally, every other one of the lower layers sees a sliding window."""

    HF_WEIGHTS: ClassVar[tuple[Rule, ...]] = EXPERT_RULES + LlamaForCausalLM.HF_WEIGHTS

    @staticmethod
    def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
        if config.layer_types:
            sliding = config.layer_types[layer] == "sliding_attention"
        else:
            sliding = config.use_sliding_window and layer % 2 == 0 and layer < config.max_window_layers
        return AttentionSpec(qkv_bias=config.qkv_bias, window=config.sliding_window if sliding else None)

    @staticmethod
    def layer_experts(config: ModelConfig, layer: int) -> ExpertsConfig | None:
        return config.experts_of(layer)
