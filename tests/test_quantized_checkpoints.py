"""Checkpoints that store 8-bit weights, in the forms that their makers write: read as they are, or refused by name."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import HF, Leaves, load, random_tensors, structure_of, write
from jax.sharding import AbstractMesh
from safetensors.numpy import load_file

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.config import EngineConfig
from jax_engine.loading.convert import convert
from jax_engine.loading.loader import load_config
from jax_engine.loading.model_files import ModelLoadError
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.config import ModelConfig
from jax_engine.models.quantization import Quantization, select_product
from jax_engine.models.stored_quantization import StoredQuantization
from jax_engine.sharding.quantized_model import check_blocks
from jax_engine.sharding.sharding import place
from jax_engine.sharding.strategies import MESH_AXES

Tensors = dict[str, np.ndarray]
# Inputs and outputs that blocks do not divide: 32 and 40 in blocks of 24 by 16; 48 inputs in heads of 6.
MODEL = HF
LAST = "model.layers.1.mlp.down_proj"


def by_block(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """e4m3, a scale for each block, and what they stand for."""
    outputs, inputs = weight.shape
    padded = np.pad(weight, [(0, -size % by) for size, by in zip(weight.shape, block, strict=True)])
    blocks = padded.reshape(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    scale = (np.abs(blocks).max((1, 3)) / 448).astype(np.float32)
    stored = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:outputs, :inputs]
    stored = stored.astype(ml_dtypes.float8_e4m3fn)
    wide = scale.repeat(block[0], 0)[:outputs].repeat(block[1], 1)[:, :inputs]
    return stored, scale, stored.astype(np.float32) * wide


def fp8_blocks(name: str, weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
    stored, scale, wide = by_block(weight, (24, 16))
    return {f"{name}.weight": stored, f"{name}.weight_scale_inv": scale}, wide


def fp8_tensor(name: str, weight: np.ndarray) -> tuple[Tensors, np.ndarray]:
    scale = np.asarray(np.abs(weight).max() / 448, np.float32)
    stored = (weight / scale).astype(ml_dtypes.float8_e4m3fn)
    rows = {f"{name}.input_scale": np.asarray(0.01, np.float32)}
    return rows | {f"{name}.weight": stored, f"{name}.weight_scale": scale}, stored.astype(np.float32) * scale


def channel(name: str, weight: np.ndarray, *, is_integer: bool) -> tuple[Tensors, np.ndarray]:
    scale = (np.abs(weight).max(1, keepdims=True) / (127 if is_integer else 448)).astype(ml_dtypes.bfloat16)
    numbers = weight / scale.astype(np.float32)
    stored = np.clip(np.round(numbers), -128, 127).astype(np.int8) if is_integer else numbers
    stored = stored if is_integer else np.clip(stored, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    wide = stored.astype(np.float32) * scale.astype(np.float32)
    return {f"{name}.weight": stored, f"{name}.weight_scale": scale}, wide


def compressed(kind: str, ignore: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    rows = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": rows, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
        "kv_cache_scheme": None,
    }


FORMS: dict[str, tuple[dict[str, Any], Callable[[str, np.ndarray], tuple[Tensors, np.ndarray]]]] = {
    "fp8 blocks": (
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [24, 16],
            "modules_to_not_convert": ["lm_head", LAST, "model.layers.0.input_layernorm"],
        },
        fp8_blocks,
    ),
    "fp8 tensors": (
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", LAST]},
        fp8_tensor,
    ),
    "compressed int8": (
        compressed("int", ["lm_head", "re:.*layers.1.mlp.down_proj$"]),
        lambda name, weight: channel(name, weight, is_integer=True),
    ),
    "compressed fp8": (
        compressed("float", ["lm_head", LAST]),
        lambda name, weight: channel(name, weight, is_integer=False),
    ),
}


def written(folder: Path, form: str) -> tuple[Path, Path]:
    """A checkpoint in a form, with one projection left as it was, and its twin: the numbers that it stands for."""
    config, quantize = FORMS[form]
    tensors, twin = {}, {}
    for name, values in random_tensors(MODEL).items():
        tensors[name] = twin[name] = values
        if "_proj.weight" in name and name != f"{LAST}.weight":
            del tensors[name]
            stored, twin[name] = quantize(name.removesuffix(".weight"), values)
            tensors |= stored
    quantized = write(folder / "stored", tensors, MODEL | {"quantization_config": config})
    return quantized, write(folder / "twin", twin, MODEL)


def logits(structure: ModelStructure, leaves: Leaves) -> jax.Array:
    @jax.jit
    def run(leaves: Leaves) -> jax.Array:
        tokens, model = jnp.arange(9, dtype=jnp.int32), structure.merge(leaves)
        return model.compute_logits(model(tokens, tokens, None, jnp.zeros(9, jnp.int32))[0])

    return run(leaves)


def quantization_of(folder: Path) -> Quantization:
    """As on a device without products of 8 bits."""
    stored = load_config(folder)[0].quantization
    assert stored is not None
    tpu: Any = type("Device", (), {"platform": "tpu", "device_kind": "TPU v4"})
    product, _ = select_product(stored.name, tpu, in_blocks=stored.block is not None)
    return Quantization(stored.name, product, stored)


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_checkpoint_gives_the_logits_of_what_its_numbers_stand_for(form, tmp_path):
    stored, twin = written(tmp_path, form)
    structure, leaves = load(stored, quantization=quantization_of(stored))
    kept = {one.name for one in structure.parameters if one.unquantized_dtype is None}
    assert f"{LAST}.weight" in kept and len(structure.parameters) == len(kept) + 13
    expected = logits(*load(twin))
    np.testing.assert_allclose(logits(structure, leaves), expected, rtol=1e-3, atol=1e-4 * jnp.std(expected))


def test_random_weights_may_stand_for_those_of_a_stored_checkpoint(tmp_path):
    stored, _ = written(tmp_path, "fp8 blocks")
    structure, leaves = load(stored, quantization=quantization_of(stored), load_format="dummy")
    plain = dict(zip([one.name for one in structure.parameters], leaves, strict=True))
    expected, expected_leaves = load(stored, load_format="dummy")
    drawn = dict(zip([one.name for one in expected.parameters], expected_leaves, strict=True))
    name = "model.layers.0.self_attn.o_proj.weight"  # [8 heads, 6, 32] in groups of gcd(16, 6) inputs
    wide = plain[name].astype(jnp.float32) * plain[f"{name}_scale"].repeat(2, axis=1)
    np.testing.assert_allclose(wide, drawn[name], rtol=2**-4, atol=1e-3)


def test_an_engine_takes_the_checkpoints_way_by_itself(tmp_path):
    stored, _ = written(tmp_path, "compressed int8")
    blueprint = Blueprint.of(EngineConfig(model=str(stored)), jax.devices())
    quantization = blueprint.placed.structure.quantization
    assert quantization is not None and quantization.name == "int8"
    same = Blueprint.of(EngineConfig(model=str(stored), quantization="compressed-tensors"), jax.devices())
    assert same.placed.structure.quantization == quantization


def test_another_way_than_the_checkpoints_is_refused(tmp_path):
    stored, twin = written(tmp_path, "compressed int8")
    with pytest.raises(ValueError, match=r"quantization='fp8' does not fit the checkpoint.* compressed-tensors"):
        Blueprint.of(EngineConfig(model=str(stored), quantization="fp8"), jax.devices())
    with pytest.raises(ValueError, match="quantization='compressed-tensors' is for checkpoints that are stored so"):
        Blueprint.of(EngineConfig(model=str(twin), quantization="compressed-tensors"), jax.devices())


def test_layers_that_differ_do_not_run_as_one_loop(tmp_path):
    stored, _ = written(tmp_path, "fp8 tensors")
    with pytest.raises(ValueError, match=rf"leaves {LAST} as it is and not .*layers.0.mlp.down_proj.*scan_layers"):
        load(stored, quantization=quantization_of(stored), scan_layers=True)


def test_devices_that_would_share_the_scale_of_a_block_are_refused():
    stored = StoredQuantization("fp8", "fp8", scale="weight_scale_inv", block=(24, 16))
    structure = structure_of(MODEL, quantization=Quantization("fp8", stored=stored))
    for size in (1, 2):
        placement = place(ModelConfig.from_hf(MODEL), AbstractMesh((1, 1, 1, size), MESH_AXES))
        with nullcontext() if size == 1 else pytest.raises(ValueError, match="do not divide its 5 blocks of inputs"):
            check_blocks(structure, placement)


def test_a_stored_checkpoint_is_not_converted(tmp_path):
    stored, _ = written(tmp_path, "fp8 blocks")
    with pytest.raises(ModelLoadError, match="has fp8 weights of 8 bits, and a converted checkpoint has one type"):
        convert(stored, tmp_path / "converted")


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "gptq", "bits": 4},
        "asks for 'gptq' weights.*supported are fp8 and compressed-tensors",
    ),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "asks for 'bitsandbytes' weights"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'"),
    ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size is .128.; it must be two sizes"),
    (compressed("int", []) | {"format": "pack-quantized"}, "format is 'pack-quantized'"),
    (compressed("int", []) | {"config_groups": {}}, "config_groups has 0 groups"),
]


@pytest.mark.parametrize(("config", "message"), WRONG, ids=[message for _, message in WRONG])
def test_other_forms_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        StoredQuantization.from_hf({"quantization_config": config})


@pytest.mark.parametrize(
    ("key", "value"), [("num_bits", 4), ("symmetric", False), ("strategy", "group"), ("type", "nf4")], ids=str
)
def test_other_weights_are_refused_by_the_field_that_asks_for_them(key, value):
    config = json.loads(json.dumps(compressed("int", [])))
    config["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(ValueError, match=f"{key} is"):
        StoredQuantization.from_hf({"quantization_config": config})


@pytest.mark.parametrize(
    ("module", "is_ignored"),
    [
        ("lm_head", True),
        ("model.layers.1.mlp.gate_proj", True),
        ("model.layers.11.mlp.gate_proj", False),
        ("model.layers.3.self_attn.q_proj", True),
        ("model.layers.3.self_attn.k_proj", False),
    ],
)
def test_ignored_modules_are_known_by_name_part_and_pattern(module, is_ignored):
    given = StoredQuantization("fp8", "fp8", ignored=("lm_head", "model.layers.1", r"re:.*\.q_proj$"))
    assert given.is_ignored(module) is is_ignored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{LAST}.weight_scale": np.ones(1, np.float32)}, "hold 1 tensors that config.json does not call for"),
        ({"model.layers.0.mlp.up_proj.weight": np.ones((40, 32), np.float32)}, "is stored as F32; supported are I8"),
        ({"model.layers.0.mlp.up_proj.weight_scale": np.ones(7, np.float32)}, r"has shape \[7\], config.json makes it"),
    ],
    ids=["a scale too many", "a weight in full", "a scale of another shape"],
)
def test_a_broken_checkpoint_is_refused_by_its_tensor(changes, message, tmp_path):
    stored, _ = written(tmp_path, "compressed int8")
    tensors = load_file(stored / "model.safetensors")
    write(stored, tensors | changes, json.loads((stored / "config.json").read_text()))
    with pytest.raises(ModelLoadError, match=message):
        load(stored, quantization=quantization_of(stored))
