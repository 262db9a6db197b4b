"""Qwen3's mixtures of experts (arXiv 2505.09388), such as 30B-A3B and 235B-A22B."""

from typing import ClassVar

from jax_engine.models.config import ExpertsConfig, ModelConfig
from jax_engine.models.llama import AttentionSpec
from jax_engine.models.qwen3 import Qwen3ForCausalLM
from jax_engine.models.weights import EXPERT_RULES, Rule


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """The attention of the dense models; a sliding window, if turned on, is of every layer."""

    HF_WEIGHTS: ClassVar[tuple[Rule, ...]] = EXPERT_RULES + Qwen3ForCausalLM.HF_WEIGHTS

    @staticmethod
    def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
        return AttentionSpec(
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
            qk_norm=True,
            window=config.sliding_window if config.use_sliding_window else None,
        )

    @staticmethod
    def layer_experts(config: ModelConfig, layer: int) -> ExpertsConfig | None:
        return config.experts_of(layer)
