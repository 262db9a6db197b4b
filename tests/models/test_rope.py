"""Rotary frequencies are those of `transformers`, at the sizes of real models and in both spellings of the settings."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from jax_engine.models.rope import RopeConfig, inverse_frequencies, rotation

HEAD_DIM = 128
LONG_FACTORS = {
    "short_factor": [1.0 + 0.01 * pair for pair in range(HEAD_DIM // 2)],
    "long_factor": [1.0 + 0.5 * pair for pair in range(HEAD_DIM // 2)],
}
# name -> (max_position_embeddings, rope_theta, the rest)
SETTINGS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "linear": (4096, 1e4, {"rope_type": "linear", "factor": 4.0}),
    "dynamic": (4096, 1e4, {"rope_type": "dynamic", "factor": 2.0}),
    "llama 3.1": (
        131072,
        5e5,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (32768, 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn not truncated": (
        131072,
        1.5e5,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "truncate": False,
        },
    ),
    "yarn scaled": (
        163840,
        1e4,
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    ),
    "yarn attention factor": (
        65536,
        1e4,
        {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25},
    ),
    "longrope": (131072, 1e4, {"rope_type": "longrope", "original_max_position_embeddings": 4096, **LONG_FACTORS}),
    "longrope factor": (
        131072,
        1e4,
        {"rope_type": "longrope", "original_max_position_embeddings": 4096, "factor": 8.0, **LONG_FACTORS},
    ),
}


def old_spelling(theta: float, settings: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in settings.items() if name != "rope_type"}
    return {"rope_theta": theta, "rope_scaling": {"type": settings["rope_type"], **rest}}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", [1000, 200_000], ids=["short", "long"])
def test_frequencies_equal_transformers(name: str, length: int) -> None:
    positions, theta, settings = SETTINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=32 * HEAD_DIM, max_position_embeddings=positions, rope_parameters={"rope_theta": theta} | settings
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu", seq_len=length)
    new = {"rope_parameters": {"rope_theta": theta} | settings}
    for spelling in (new, old_spelling(theta, settings)):
        rope = RopeConfig.from_hf(spelling, head_dim=HEAD_DIM, max_position_embeddings=positions)
        frequencies, factor = inverse_frequencies(rope, max_position_embeddings=positions, max_model_len=length)
        assert frequencies.dtype == np.float32
        # A few units in the last place: at position 100,000 the angle of the fastest pair is off by 0.05 at most.
        np.testing.assert_allclose(frequencies, expected.numpy(), rtol=5e-7)
        assert factor == pytest.approx(expected_factor)


def test_unscaled_frequencies_are_powers_of_theta() -> None:
    rope = RopeConfig.from_hf({}, head_dim=8, max_position_embeddings=100)
    frequencies, factor = inverse_frequencies(rope, max_position_embeddings=100, max_model_len=1000)
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert factor == 1.0


def test_partial_rotation_passes_the_rest_of_a_head_through() -> None:
    config = transformers.Phi3Config(
        hidden_size=40, num_attention_heads=2, num_key_value_heads=2, partial_rotary_factor=0.6, rope_theta=100.0
    )
    heads = torch.randn(1, 2, 9, 20, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(30, 39)[None]
    expected, _ = apply_rotary_pos_emb(heads, heads, *Phi3RotaryEmbedding(config)(heads, positions))
    hf = {"rope_theta": 100.0, "partial_rotary_factor": 0.6}
    rope = RopeConfig.from_hf(hf, head_dim=20, max_position_embeddings=100)
    assert rope.rotary_dim == 12
    rotate = rotation(jnp.arange(30, 39), *inverse_frequencies(rope, max_position_embeddings=100, max_model_len=100))
    ours = rotate(jnp.asarray(heads[0].permute(1, 0, 2).numpy()))
    np.testing.assert_allclose(ours, expected[0].permute(1, 0, 2).numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours[..., 12:], heads[0].permute(1, 0, 2).numpy()[..., 12:])


def test_scores_depend_on_distance_only() -> None:
    """Far past the original length a query still meets a key at its distance, which float32 angles must preserve."""
    rope = RopeConfig.from_hf({}, head_dim=64, max_position_embeddings=4096)
    frequencies, factor = inverse_frequencies(rope, max_position_embeddings=4096, max_model_len=4096)
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 64)).astype(np.float32)
    scores = []
    for start in (0, 1000, 100_000):
        rotated_query = rotation(jnp.array([start + 5]), frequencies, factor)(jnp.asarray(query))
        rotated_key = rotation(jnp.array([start]), frequencies, factor)(jnp.asarray(key))
        scores.append(float((rotated_query * rotated_key).sum()))
    assert scores == pytest.approx([scores[0]] * 3, abs=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_scaling": {"type": "mrope"}}, "rope_type is 'mrope'; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "is 0.5; it must be at least 1"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"partial_rotary_factor": 0.4}, r"partial_rotary_factor is 3; it must be an even number"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor has 1 numbers"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "only one set for all layers"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_run_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeConfig.from_hf(settings, head_dim=8, max_position_embeddings=100)
