"""8-bit caches: where their scales come from, and that a model with one computes nearly what it does without."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_tensors, write
from kv_cases import BASE, MESHES, hidden_states, near, placed_with
from tiny_engine import TINY, core_request, run_requests

from accuracy import measure
from jax_engine import LLM
from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.bundle_identity import differences, identity_of
from jax_engine.config import EngineConfig
from jax_engine.core.messages import CoreRequest, Sleep, WakeUp
from jax_engine.execution.kv_measuring import NUM_SEQUENCES, measure_kv, random_tokens
from jax_engine.execution.kv_scales import load_weights
from jax_engine.loading.convert import convert
from jax_engine.loading.loader import load_leaves
from jax_engine.loading.model_files import ModelLoadError
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.config import ModelConfig
from jax_engine.models.demo.generator import held_out_samples, task_named
from jax_engine.models.dense_attention import dense_attention
from jax_engine.models.ops import dense_ops
from jax_engine.models.registry import resolve_model

# Three layers in two cache groups, of which one has room for a layer that is not there.
WINDOWS = BASE | {
    "architectures": ["Qwen2ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 10,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
CHILD = """
import json, sys
from kv_cases import differences_on_mesh
print(json.dumps(differences_on_mesh(sys.argv[1])))
"""


def config_of(folder: Path | None = None, **given: Any) -> EngineConfig:
    return EngineConfig(model=folder and str(folder), compilation_cache_dir="", **given)


@cache
def unquantized() -> np.ndarray:
    placed = placed_with("auto")
    return hidden_states(placed, load_leaves(placed.structure, None, load_format="dummy"))


@pytest.mark.parametrize(
    ("dtype", "calculate", "bound"),
    [pytest.param("bfloat16", False, 0.012, marks=pytest.mark.slow), ("fp8", False, 0.15), ("int8", True, 0.06)],
)
def test_hidden_states_stay_near_those_of_a_whole_cache(dtype, calculate, bound):
    """Of prompts, and of decodes behind what they have stored; and scales matter."""
    placed = placed_with(dtype, calculate_kv_scales=calculate)
    config = config_of(load_format="dummy", kv_cache_dtype=dtype, calculate_kv_scales=calculate)
    leaves = load_weights(placed, ModelConfig.from_hf(BASE), Path(), config)
    found = hidden_states(placed, leaves)
    assert 0 < near(found, unquantized()) < bound


def test_what_is_measured_is_how_large_keys_and_values_are():
    placed = placed_with("int8", WINDOWS, calculate_kv_scales=True, scan_layers=False)
    model = ModelConfig.from_hf(WINDOWS)
    leaves = load_leaves(placed.structure, None, load_format="dummy")
    assert placed.measuring is not None
    found = measure_kv(placed, placed.measuring, model, leaves)

    seen: list[np.ndarray] = []

    def attention(queries, keys, values, cache, sequences, **options):
        seen.append(np.stack([np.abs(rows).max(axis=(0, 2)) for rows in (keys, values)]))
        return dense_attention(queries, keys, values, cache, sequences, **options)

    model_class = resolve_model(model.architecture)
    plain = ModelStructure.of(
        model_class, model, ops=replace(dense_ops(), attention=attention), dtype=jnp.float32, kv_scales=True
    )
    length = 128
    tokens = random_tokens(model.vocab_size, NUM_SEQUENCES * length)
    positions, segments = jnp.tile(jnp.arange(length), NUM_SEQUENCES), jnp.repeat(jnp.arange(NUM_SEQUENCES), length)
    plain.merge(leaves)(jnp.asarray(tokens), positions, None, segments)
    assert found.shape == (model.num_hidden_layers, 2, model.num_key_value_heads)
    np.testing.assert_allclose(found, np.stack(seen), rtol=1e-4)


@pytest.mark.parametrize(
    "name", [name if name == "stages" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_meshes_scale_and_compute_as_one_device_does(name):
    """Heads split and there twice, stages with a layer that no checkpoint has, pages striped and owned."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, name], capture_output=True, text=True, check=False, env=os.environ | settings
    )
    assert result.returncode == 0, result.stderr
    of_scales, of_states = json.loads(result.stdout.splitlines()[-1])
    assert of_scales < 1e-5
    assert of_states < 2e-3


NAMES = {
    "vLLM": "model.layers.{}.self_attn.{}_scale",
    "ModelOpt": "model.layers.{0}.self_attn.{1}_proj.{1}_scale",
    "Quark": "model.layers.{}.self_attn.{}_proj.output_scale",
}


def write_scaled(folder: Path, scales: dict[str, Any]) -> Path:
    own = {name: np.asarray(value, np.float32) for name, value in scales.items()}
    quantization = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}, "config_groups": {}}
    return write(folder, random_tensors(TINY) | own, TINY | {"quantization_config": quantization})


def scales_in(folder: Path, **given: Any) -> np.ndarray:
    placed = placed_with("fp8", TINY)
    leaves = load_weights(placed, ModelConfig.from_hf(TINY), folder, config_of(kv_cache_dtype="fp8", **given))
    ((place, parameter),) = [(i, p) for i, p in enumerate(placed.structure.parameters) if p.is_kv_scales]
    assert leaves[place].dtype == parameter.dtype == jnp.float32
    return np.asarray(leaves[place])


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_a_checkpoint_brings_its_scales(tmp_path, names):
    """A number of a layer, or one for each head; also once converted, and to an engine that has no use for them."""
    stored = {names.format(0, "k"): 0.5, names.format(0, "v"): [2.0], names.format(1, "k"): [3.0, 4.0]}
    folder = write_scaled(tmp_path / "model", stored | {names.format(1, "v"): [[0.25], [8.0]]})
    expected = [[[0.5, 0.5], [2.0, 2.0]], [[3.0, 4.0], [0.25, 8.0]]]
    np.testing.assert_array_equal(scales_in(folder), expected)
    if names == NAMES["vLLM"]:
        convert(folder, tmp_path / "converted")
        np.testing.assert_array_equal(scales_in(tmp_path / "converted"), expected)
        placed = placed_with("auto", TINY)
        leaves = load_weights(placed, ModelConfig.from_hf(TINY), folder, config_of())
        assert len(leaves) == len(placed.structure.parameters)


def test_without_scales_they_are_one_and_a_warning_says_so(tmp_path, caplog):
    folder = write_scaled(tmp_path, {NAMES["vLLM"].format(layer, "k"): -1.0 for layer in (0, 1)})
    with caplog.at_level("WARNING"):
        assert (scales_in(folder) == 1).all()
    assert "beyond 448 are clipped" in caplog.text
    assert "calculate_kv_scales=True" in caplog.text


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"model.layers.0.self_attn.kv_scale": 0.5}, "lacks some of 1 layers: layer 1; .* calculate_kv_scales=True"),
        ({"model.layers.0.self_attn.k_scale": [1.0, 2.0, 3.0]}, "a number above 0, or one for each of 2 heads"),
        ({"model.layers.0.self_attn.k_scale": [1.0, 0.0]}, "a number above 0"),
    ],
)
def test_scales_that_cannot_be_are_refused(tmp_path, scales, message):
    with pytest.raises(ModelLoadError, match=message):
        scales_in(write_scaled(tmp_path, scales))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype='fp4' must be one of auto, bfloat16, float16, fp8, .*int8"),
        ({"kv_cache_dtype": "int8"}, "'int8' needs calculate_kv_scales=True, .* use kv_cache_dtype='fp8'"),
        ({"calculate_kv_scales": True}, "for pages of 8 bits, and kv_cache_dtype is 'auto'; leave it out, or set"),
        ({"calculate_kv_scales": 1}, "calculate_kv_scales=1 must be true or false"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**given)


def blueprint(**given: Any) -> Blueprint:
    settings = {"max_model_len": 128, "max_num_seqs": 4, "load_format": "dummy"} | given
    return Blueprint.of(config_of(**settings), jax.devices())


def test_pages_draft_model_and_bundles_know_the_type_of_the_cache():
    draft = {"speculative_config": {"method": "draft_model", "model": "demo", "num_speculative_tokens": 2}}
    whole, small = blueprint(), blueprint(kv_cache_dtype="int8", calculate_kv_scales=True, **draft)
    page = whole.placed.geometry.page_bytes
    assert small.placed.geometry.page_bytes == page / 4
    assert small.placed.geometry.planned_bytes == page / 2, "the draft model's pages are of 8 bits too"
    assert small.draft is not None
    small.draft.load(small.config)
    parameters = small.draft._draft.structure.parameters
    scales = [leaf for leaf, own in zip(small.draft.weights.leaves, parameters, strict=True) if own.is_kv_scales]
    assert scales and all(np.all(leaf != 1) for leaf in scales)
    fp8 = identity_of(blueprint(kv_cache_dtype="fp8"))
    assert differences(fp8, identity_of(blueprint(kv_cache_dtype="fp8_e4m3", calculate_kv_scales=True))) == []
    found = differences(fp8, identity_of(blueprint(kv_cache_dtype="fp8_e5m2")))
    assert found == ["setting.kv_cache_dtype is 'float8_e4m3fn' here and 'float8_e5m2' there"]


def test_pages_of_8_bits_hold_through_host_memory_preemption_and_weights_read_anew(make_core):
    """Six sequences that the pages are too few for, numbers deterministic: as alone, and again after a deep sleep."""
    page_bytes = TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * 8 * TINY["head_dim"]
    tight = {"kv_cache_memory_bytes": 16 * page_bytes, "max_model_len": 96, "kv_offloading_load": "always"}
    measured = {"kv_cache_dtype": "int8", "calculate_kv_scales": True, "scan_layers": True, "deterministic": True}
    core = make_core(**tight, **measured, kv_offloading_size=100 * page_bytes / 2**30)

    def requests() -> list[CoreRequest]:
        return [core_request(f"r{i}", [(13 * i + k) % 100 for k in range(20 + 3 * i)], 40) for i in range(6)]

    alone: dict[str, list[int]] = {}
    for request in requests():
        assert core.reset_prefix_cache()
        alone |= run_requests(core, [request])
    for _ in range(2):
        assert run_requests(core, requests()) == alone
        core.admin(Sleep(2))
        core.admin(WakeUp(("weights", "kv_cache")))
    stats = core.stats()
    assert stats.preemptions_total and stats.loaded_pages_total
    assert stats.num_pages == 16


@pytest.mark.slow
def test_the_built_in_model_is_right_with_pages_of_fp8():
    samples = [
        sample for name in ("addition", "facts") for sample in held_out_samples(task_named(name), seed=0, count=4)
    ]
    sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 16, "scan_layers": True}
    with LLM(kv_cache_dtype="fp8", **sizes) as llm:
        results = measure(llm, samples, max_tokens=96)
    assert [result.right for result in results] == [4, 4]
