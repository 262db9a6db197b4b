"""Where the default sampling parameters come from: the model's folder, another, nowhere, or the settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from jax_engine.config import EngineConfig
from jax_engine.core.messages import Ready
from jax_engine.frontend.processor import InputProcessor, ModelText

INFO = Ready(max_model_len=32, vocab_size=300, num_pages=8, page_size=16)


@pytest.mark.parametrize(
    ("settings", "temperature", "top_k"),
    [
        ({}, 0.25, 7),
        ({"generation_config": "vllm"}, 1.0, 0),
        ({"generation_config": "other"}, 0.75, 0),
        ({"override_generation_config": {"top_k": 3}}, 0.25, 3),
        ({"generation_config": "vllm", "override_generation_config": {"top_k": 3}}, 1.0, 3),
    ],
    ids=str,
)
def test_where_default_parameters_come_from(
    tmp_path: Path, settings: dict[str, Any], temperature: float, top_k: int
) -> None:
    for name, content in (
        ("model", {"temperature": 0.25, "top_k": 7, "eos_token_id": 99}),
        ("other", {"temperature": 0.75}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "generation_config.json").write_text(json.dumps(content))
    (tmp_path / "model" / "config.json").write_text("{}")
    if settings.get("generation_config") == "other":
        settings = settings | {"generation_config": str(tmp_path / "other")}
    text = ModelText.load(EngineConfig(model=str(tmp_path / "model"), tokenizer="demo", **settings))
    ours = InputProcessor(text, INFO)
    assert (ours.default_params.temperature, ours.default_params.top_k) == (temperature, top_k)
    assert 99 in ours.eos_token_ids, "what ends a sequence is the model's own in any case"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"generation_config": ""}, "generation_config=''"),
        ({"override_generation_config": {"max_new_tokens": 3}}, "whose keys are of temperature"),
        ({"override_generation_config": {"top_p": 7}}, "override_generation_config: top_p=7"),
    ],
)
def test_wrong_defaults_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_a_folder_without_a_generation_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generation_config='.*' must be 'auto'"):
        ModelText.load(EngineConfig(generation_config=str(tmp_path)))
