"""What an adapter's folder may hold: what is read comes as it should, everything else is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import write_adapter
from safetensors.numpy import load_file, save_file

from jax_engine.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME, AdapterError, read_adapter
from jax_engine.models.demo import DEMO_DIR

MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 16 / 4), ({"use_rslora": True}, 16 / 2), ({"r": 8, "rank_pattern": {"q_proj": 4}}, 16 / 4)],
    ids=str,
)
def test_the_scale_is_in_the_second_factor(tmp_path, config, scale):
    """alpha / r, with rslora alpha / sqrt(r); r is the projection's own, where a pattern gives it another."""
    path = write_adapter(tmp_path / "adapter", rank=4, seed=0, targets=("q_proj",), layers=(0,), **config)
    stored = load_file(Path(path) / WEIGHTS_NAME)
    (name, factors), *others = read_adapter(path, max_rank=4).items()
    assert (name, others) == (MODULE, [])
    np.testing.assert_array_equal(factors.a, stored[f"base_model.model.{MODULE}.lora_A.weight"])
    np.testing.assert_allclose(factors.b, stored[f"base_model.model.{MODULE}.lora_B.weight"] * scale, rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"use_dora=true is not supported \(null or false is\)"),
        ({"bias": "all"}, r'bias="all" is not supported \(null or "none" is\)'),
        ({"bias": "lora_only"}, 'bias="lora_only" is not supported'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save=\["lm_head"\] is not supported'),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern=.* is not supported"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" is not supported'),
        ({"lora_bias": True}, "lora_bias=true is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.* is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* is not supported"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; only LORA is"),
        ({"r": 0}, "r=0 and lora_alpha=16.0 must be numbers, r at least 1"),
        ({"r": 2}, "q_proj has rank 4, adapter_config.json says r=2"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, config, message):
    path = write_adapter(tmp_path / "adapter", rank=4, seed=0, targets=("q_proj",), **config)
    with pytest.raises(AdapterError, match=message):
        read_adapter(path, max_rank=16)


def test_what_other_tools_write_beside_it_is_no_reason_to_refuse(tmp_path):
    asks_for_nothing: dict[str, Any] = {
        "use_dora": False,
        "modules_to_save": None,
        "alpha_pattern": {},
        "init_lora_weights": True,
        "lora_dropout": 0.1,
        "inference_mode": True,
        "base_model_name_or_path": "somewhere",
    }
    path = write_adapter(tmp_path / "adapter", rank=4, seed=0, targets=("o_proj",), **asks_for_nothing)
    assert len(read_adapter(path, max_rank=4)) == 2


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",  # without its other half
    ],
)
def test_tensors_that_are_no_factors_are_refused_by_name(tmp_path, name):
    path = write_adapter(tmp_path / "adapter", rank=4, seed=0, targets=("q_proj",))
    file = Path(path) / WEIGHTS_NAME
    save_file(load_file(file) | {name: np.zeros((4, 32), np.float32)}, file)
    with pytest.raises(AdapterError, match=r"holds .*(magnitude|embedding|lm_head|k_proj).* is not supported"):
        read_adapter(path, max_rank=16)


def test_a_rank_above_the_limit_names_the_setting(tmp_path):
    with pytest.raises(AdapterError, match=r"is 4, more than max_lora_rank=2; start the engine with max_lora_rank=4"):
        read_adapter(write_adapter(tmp_path / "adapter", rank=4, seed=0), max_rank=2)


def test_a_folder_that_is_none_or_not_whole_is_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"lora_path='/nowhere' is not a folder"):
        read_adapter("/nowhere", max_rank=16)
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        read_adapter(str(tmp_path), max_rank=16)
    (tmp_path / CONFIG_NAME).write_text("[]")
    with pytest.raises(AdapterError, match=r"holds a list; it must hold a JSON object"):
        read_adapter(str(tmp_path), max_rank=16)
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"r": 1, "lora_alpha": 1}))
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        read_adapter(str(tmp_path), max_rank=16)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"not much")
    with pytest.raises(AdapterError, match=r"is not a whole safetensors file"):
        read_adapter(str(tmp_path), max_rank=16)


@pytest.mark.parametrize("name", ["shout", "farewell"])
def test_the_built_in_adapters_are_small_and_whole(name):
    assert sum(file.stat().st_size for file in (DEMO_DIR / "adapters" / name).iterdir()) < 400_000
    assert len(read_adapter(f"demo:{name}", max_rank=8)) == 5 * 7
