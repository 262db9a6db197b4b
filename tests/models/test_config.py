"""A `config.json` is read as it is meant, or refused with the name of the field at fault."""

from typing import Any

import pytest

from jax_engine.models.config import ModelConfig
from jax_engine.models.mistral import MistralForCausalLM
from jax_engine.models.qwen2 import Qwen2ForCausalLM
from jax_engine.models.registry import MODELS, resolve_model

HF: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def config_of(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(HF | changes)


def test_what_is_not_stated_has_its_default() -> None:
    config = config_of()
    assert (config.head_dim, config.num_key_value_heads, config.hidden_act) == (16, 4, "silu")
    assert not config.tie_word_embeddings and config.sliding_window is None
    assert (config.max_model_len, config.rope.theta, config.eos_token_ids) == (128, 10000.0, ())


def test_null_means_not_stated() -> None:
    assert config_of(head_dim=None, num_key_value_heads=None, rope_scaling=None, eos_token_id=None) == config_of()
    assert config_of(sliding_window=0) == config_of(sliding_window=None) == config_of()


def test_stop_tokens_may_be_one_or_several() -> None:
    assert config_of(eos_token_id=2).eos_token_ids == (2,)
    assert config_of(eos_token_id=[2, 7]).eos_token_ids == (2, 7)


def test_the_dtype_is_read_in_both_spellings() -> None:
    assert config_of(torch_dtype="float16").dtype == config_of(dtype="float16").dtype == "float16"


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else str(value),
)
def test_the_default_length_includes_the_scaling(scaling: dict[str, Any], length: int) -> None:
    assert config_of(rope_scaling=scaling).max_model_len == length


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing; it must be an integer"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; it must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"hidden_act": "swish7"}, "hidden_act is 'swish7'; supported: silu"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["chunked_attention"] * 4}, "'chunked_attention'; supported: full_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window must be set"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; it must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"hidden_act": 3}, "hidden_act is 3; it must be a string"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'; it must be a list of str"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": ["A", "B"]}, r"architectures is \['A', 'B'\]"),
        ({"quantization_config": {"quant_method": "awq"}}, "asks for 'awq' weights"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_an_unknown_architecture_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'GPT2LMHeadModel' is not supported; supported are ") as refused:
        resolve_model("GPT2LMHeadModel")
    assert all(name in str(refused.value) for name in MODELS)


def test_qwen_windows_start_at_a_layer_once_turned_on() -> None:
    def windows(**changes: Any) -> list[int | None]:
        config = config_of(sliding_window=8, max_window_layers=3, **changes)
        return [Qwen2ForCausalLM.attention_spec(config, layer).window for layer in range(4)]

    assert windows() == [None] * 4
    assert windows(use_sliding_window=True) == [None, None, None, 8]
    assert windows(layer_types=["sliding_attention", *["full_attention"] * 3]) == [8, None, None, None]


def test_mistral_windows_are_on_every_layer_unless_listed() -> None:
    mixed = ["full_attention", "sliding_attention"] * 2
    every, some = config_of(sliding_window=8), config_of(sliding_window=8, layer_types=mixed)
    assert [MistralForCausalLM.attention_spec(every, layer).window for layer in range(4)] == [8] * 4
    assert [MistralForCausalLM.attention_spec(some, layer).window for layer in range(4)] == [None, 8, None, 8]


def test_llama_refuses_windows_that_it_would_ignore() -> None:
    config = config_of(sliding_window=8, layer_types=["sliding_attention"] * 4)
    with pytest.raises(ValueError, match="sliding_attention"):
        MODELS["LlamaForCausalLM"].attention_spec(config, 0)


MIXTURE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}


def test_a_mixture_is_read_in_both_spellings() -> None:
    config = config_of(**MIXTURE, moe_intermediate_size=24)
    assert config.experts is not None and config.experts.moe_intermediate_size == 24
    others = {"architectures": ["Qwen3MoeForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    assert config_of(**others, moe_intermediate_size=24) == config
    # Mixtral's experts are as wide as its config says a feed-forward is.
    experts = config_of(**others | {"architectures": ["MixtralForCausalLM"]}).experts
    assert experts is not None and experts.moe_intermediate_size == 96


def test_layers_have_experts_by_their_step_and_list() -> None:
    config = config_of(**MIXTURE, num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    found = [MODELS["Qwen3MoeForCausalLM"].layer_experts(config, layer) for layer in range(6)]
    assert found == [None, config.experts, None, None, None, config.experts]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be at most num_experts \(8\)"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0; it must be at least 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be at least 1"),
        ({"mlp_only_layers": [4]}, "mlp_only_layers holds 4; its entries must be layers, 0 to 3"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers is 'all'; it must be a list of int"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false"),
    ],
    ids=str,
)
def test_a_mixture_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**MIXTURE | changes)


def test_experts_are_neither_missed_nor_ignored() -> None:
    with pytest.raises(ValueError, match=r"num_experts is missing; .* Qwen3MoeForCausalLM has experts"):
        MODELS["Qwen3MoeForCausalLM"].layer_experts(config_of(architectures=["Qwen3MoeForCausalLM"]), 0)
    with pytest.raises(ValueError, match="num_experts is 8, and LlamaForCausalLM has no experts"):
        MODELS["LlamaForCausalLM"].layer_experts(config_of(**MIXTURE | HF), 0)
