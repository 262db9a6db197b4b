"""Mixtral (arXiv 2401.04088): Mistral with a mixture of experts in every layer."""

import dataclasses
from typing import ClassVar

from jax_engine.models.config import ExpertsConfig, ModelConfig
from jax_engine.models.mistral import MistralForCausalLM
from jax_engine.models.weights import Rule


class MixtralForCausalLM(MistralForCausalLM):
    """A row's shares of its experts add up to one."""

    HF_WEIGHTS: ClassVar[tuple[Rule, ...]] = (
        Rule(r"mlp\.gate\.weight", "experts embed -> embed experts", r"block_sparse_moe.gate.weight"),
        Rule(r"mlp\.experts\.gate_proj\.weight", "out in -> in out", r"block_sparse_moe.experts.*.w1.weight"),
        Rule(r"mlp\.experts\.up_proj\.weight", "out in -> in out", r"block_sparse_moe.experts.*.w3.weight"),
        Rule(r"mlp\.experts\.down_proj\.weight", "out in -> in out", r"block_sparse_moe.experts.*.w2.weight"),
        *MistralForCausalLM.HF_WEIGHTS,
    )

    @staticmethod
    def layer_experts(config: ModelConfig, layer: int) -> ExpertsConfig | None:
        experts = config.experts_of(layer)
        return None if experts is None else dataclasses.replace(experts, norm_topk_prob=True)
