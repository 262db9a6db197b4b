"""Weights of 8 bits, made while a checkpoint is loaded: what they hold, what stays as it is, and what is refused."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import HF, Leaves, dummy, load, random_tensors, write
from jax.sharding import SingleDeviceSharding
from tiny_engine import TINY_MIXTURE, placed_model

from jax_engine.compilation.memory_check import bytes_of
from jax_engine.config import EngineConfig
from jax_engine.cuda_fallback.quantized_product import narrow_product, quantize, wide_product
from jax_engine.execution.weights import Weights
from jax_engine.loading.loader import Reader, reader_of
from jax_engine.loading.model_structure import ModelStructure, Parameter
from jax_engine.loading.quantizing import Quantizer
from jax_engine.models.quantization import Quantization, select_product

NAMES = ["fp8", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model"), random_tensors(HF), HF)


def by_name(structure: ModelStructure, leaves: Leaves) -> dict[str, jax.Array]:
    """Each layer's parameters."""
    found = {}
    for parameter, leaf in zip(structure.parameters, leaves, strict=True):
        parts = leaf if parameter.part_names else [leaf]
        found |= {part.name: values for part, values in zip(parameter.parts, parts, strict=True)}
    return found


def logits(structure: ModelStructure, leaves: Leaves) -> jax.Array:
    """Of a document of nine tokens."""

    @jax.jit
    def run(leaves: Leaves) -> jax.Array:
        model = structure.merge(leaves)
        tokens = jnp.arange(9, dtype=jnp.int32)
        return model.compute_logits(model(tokens, tokens, None, jnp.zeros(9, jnp.int32))[0])

    return run(leaves)


@pytest.mark.parametrize("name", NAMES)
def test_projections_hold_the_checkpoint_in_8_bits_and_all_else_is_as_it_was(folder, name):
    plain = by_name(*load(folder))
    quantized = by_name(*load(folder, quantization=Quantization(name)))
    scales = {parameter for parameter in quantized if parameter.endswith("_scale")}
    assert len(scales) == 7 * HF["num_hidden_layers"] and quantized.keys() - scales == plain.keys()
    for parameter, values in plain.items():
        if f"{parameter}_scale" not in scales:
            np.testing.assert_array_equal(quantized[parameter], values)
            continue
        num_in = values.ndim - quantized[f"{parameter}_scale"].ndim
        stored, scale = quantize(values, Quantization(name).dtype, axes=tuple(range(num_in)))
        assert quantized[parameter].dtype == stored.dtype
        np.testing.assert_array_equal(quantized[parameter], stored)
        np.testing.assert_array_equal(quantized[f"{parameter}_scale"], scale)


def test_stacked_layers_hold_what_unrolled_ones_do(folder):
    unrolled, stacked = (by_name(*load(folder, quantization=Quantization("fp8"), scan_layers=scan)) for scan in (0, 1))
    assert unrolled.keys() == stacked.keys()
    for name, values in unrolled.items():
        np.testing.assert_array_equal(stacked[name], values, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_a_model_with_the_numbers_that_8_bits_stand_for(folder, name):
    structure, leaves = load(folder, quantization=Quantization(name))
    held, (plain, _) = by_name(structure, leaves), load(folder)
    twin = [held[one.name].astype(jnp.float32) * held.get(one.scale_name, 1) for one in plain.parameters]
    expected = logits(plain, tuple(twin))
    np.testing.assert_allclose(logits(structure, leaves), expected, rtol=1e-3, atol=1e-4 * jnp.std(expected))


def test_random_weights_are_the_same_ones_in_8_bits():
    plain, quantized = by_name(*dummy(3, HF)), by_name(*dummy(3, HF, quantization=Quantization("int8")))
    name = "model.layers.1.mlp.up_proj.weight"
    found = quantized[name].astype(jnp.float32) * quantized[f"{name}_scale"]
    np.testing.assert_allclose(found, plain[name], atol=0.51 * float(quantized[f"{name}_scale"].max()))


def test_one_weight_at_a_time_is_there_in_full(folder):
    structure, _ = dummy(0, HF, quantization=Quantization("int8"))
    read, given = reader_of(folder, structure), list[weakref.ref[jax.Array]]()

    def watched(parameter: Parameter, sharding: Any) -> jax.Array:
        assert not any(array() is not None for array in given), "an earlier weight is still there"
        values = read(parameter, sharding)
        given.append(weakref.ref(values))
        return values

    quantizer = Quantizer(watched, structure)
    weights = [one for one in structure.parameters if one.unquantized_dtype is not None]
    for weight in weights:
        quantizer(weight, SingleDeviceSharding(jax.devices()[0]))
    assert isinstance(read, Reader) and len(given) == len(weights) == 14


def test_the_plan_of_memory_counts_bytes_as_they_are():
    plain, quantized = placed_model(), placed_model(quantization="fp8")
    saved = bytes_of(plain.leaf_shapes()) - bytes_of(quantized.leaf_shapes())
    weights = [one for one in quantized.structure.parameters if one.unquantized_dtype is not None]
    scales = sum(one.num_bytes for one in quantized.structure.parameters if one.is_scale)
    assert saved == 3 * sum(one.num_bytes for one in weights) - scales > 0


SHARDED = """
import sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from checkpoints import load
from jax_engine.cuda_fallback.quantized_product import narrow_product
from jax_engine.models.quantization import Quantization
from test_quantization import logits

folder, mesh = Path(sys.argv[1]), jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
axes = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "data"}
place = lambda parameter: NamedSharding(mesh, PartitionSpec(*(axes.get(axis) for axis in parameter.logical_axes)))
options = {"quantization": Quantization("int8", narrow_product), "scan_layers": True}
structure, whole = load(folder, **options)
_, parts = load(folder, sharding_of=place, **options)
for parameter, one, other in zip(structure.parameters, whole, parts, strict=True):
    assert other.sharding.is_equivalent_to(place(parameter), other.ndim), parameter
    np.testing.assert_array_equal(one, other, err_msg=parameter.name)
np.testing.assert_allclose(logits(structure, whole), logits(structure, parts), rtol=1e-4, atol=1e-4)
"""


def test_devices_that_share_a_weight_share_its_scales(folder, monkeypatch):
    """Each reads its own part; what is largest of an output is found over all of them. So are the scales of rows."""
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    here = Path(__file__).parent
    paths = (here, here / "support", here / "engine")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    command = [sys.executable, "-c", SHARDED, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("keep", [True, False])
def test_weights_of_8_bits_wake_as_they_fell_asleep(keep):
    def load_weights() -> Leaves:
        return dummy(0, HF, quantization=Quantization("fp8"))[1]

    weights, expected = Weights(load_weights), load_weights()
    weights.put_away(keep=keep)
    assert weights.bring_back() is keep
    for found, leaf in zip(weights.leaves, expected, strict=True):
        assert found.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(found), np.asarray(leaf))


DEVICES = [
    ("cpu", "cpu", None, {"int8"}),
    ("tpu", "TPU v4", None, set()),
    ("tpu", "TPU v5 lite", None, {"int8"}),
    ("tpu", "TPU v6 lite", None, {"int8"}),
    ("tpu", "TPU7x", None, {"fp8"}),
    ("gpu", "NVIDIA A100-SXM4-80GB", "8.0", {"int8"}),
    ("gpu", "NVIDIA L4", "8.9", {"int8", "fp8"}),
    ("gpu", "NVIDIA H200", "9.0", {"int8", "fp8"}),
    ("gpu", "NVIDIA B200", "10.0", {"int8", "fp8"}),
]


@pytest.mark.parametrize(("platform", "kind", "capability", "narrow"), DEVICES, ids=[row[1] for row in DEVICES])
def test_rows_are_brought_to_8_bits_where_that_is_fast(platform, kind, capability, narrow):
    device: Any = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    for name in NAMES:
        product, reason = select_product(name, device)
        assert product is (narrow_product if name in narrow else wide_product)
        assert name in reason


def test_other_ways_are_refused_by_name():
    with pytest.raises(ValueError, match=r"quantization='awq' must be one of None, fp8, int8"):
        EngineConfig(quantization="awq")


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(ValueError, match="quantization='fp8' is for models without experts"):
        placed_model(hf=TINY_MIXTURE, quantization="fp8")


def test_the_choice_is_logged_with_its_reason(caplog):
    with caplog.at_level("INFO", "jax_engine"):
        placed_model(quantization="int8")
    assert [record.message for record in caplog.records if record.message.startswith("quantization: int8 weights")]
