"""Stacked layers, copied heads and shards hold the same tensors as plain layers on one device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    EXPERTS,
    HF,
    SHARED,
    SQUARE,
    UP_PROJ,
    Leaves,
    dummy,
    load,
    load_copies,
    random_tensors,
    structure_of,
    write,
)

from jax_engine.loading.model_files import ModelLoadError
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.loading.stacked_leaves import _set_layer

# Runs of one layer kind and of two, a layer that is in no run, and an axis of layers in every leaf of the runs.
MIXED = SQUARE | {
    "num_hidden_layers": 9,
    "sliding_window": 8,
    "layer_types": [f"{kind}_attention" for kind in "sliding full sliding full full full sliding sliding full".split()],
}


def by_tensor(structure: ModelStructure, leaves: Leaves) -> dict[str, np.ndarray]:
    """Each tensor's parameter, out of the leaf that it is in."""
    found: dict[str, np.ndarray] = {}
    for parameter, leaf in zip(structure.parameters, leaves, strict=True):
        parts = np.asarray(leaf) if parameter.part_names else np.asarray(leaf)[None]
        found |= {part.name: values for part, values in zip(parameter.parts, parts, strict=True)}
    return found


@pytest.mark.parametrize("source", ["stored", "random"])
def test_stacked_layers_hold_what_unrolled_ones_do(source: str, tmp_path: Path) -> None:
    if source == "stored":
        write(tmp_path, random_tensors(MIXED), MIXED)
        unrolled, stacked = (load(tmp_path, scan_layers=scan) for scan in (False, True))
    else:
        unrolled, stacked = (dummy(0, MIXED, scan_layers=scan) for scan in (False, True))
    assert len(stacked[0].parameters) < len(unrolled[0].parameters) / 1.4
    assert stacked[0].num_bytes == unrolled[0].num_bytes
    expected = by_tensor(*unrolled)
    found = by_tensor(*stacked)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_stack_is_a_leaf_with_an_axis_of_layers() -> None:
    structure = structure_of(HF | {"num_hidden_layers": 80}, scan_layers=True)
    assert len(structure.parameters) == 3 + 12  # embedding, norm and head, and one layer's
    (parameter,) = (leaf for leaf in structure.parameters if "up_proj" in leaf.name)
    assert parameter.name == "model.layers.0..79.mlp.up_proj.weight"
    assert (parameter.shape, parameter.logical_axes) == ((80, 32, 40), ("layers", "embed", "mlp"))
    assert parameter.parts[7].name == "model.layers.7.mlp.up_proj.weight"
    assert parameter.parts[7].shape == (32, 40)


def test_experts_are_a_leaf_of_a_tensor_for_each() -> None:
    structure = structure_of(EXPERTS, scan_layers=True)
    (parameter,) = (leaf for leaf in structure.parameters if "experts.*.down_proj" in leaf.name)
    assert parameter.name == "model.layers.1..3.mlp.experts.*.down_proj.weight"
    assert (parameter.shape, parameter.logical_axes) == ((3, 4, 16, 32), ("layers", "experts", "mlp", "embed"))
    (_, part, _), axes = parameter.parts, ("mlp", "embed")
    assert [(tensor.name, tensor.logical_axes) for tensor in part.tensors] == [
        (f"model.layers.2.mlp.experts.{expert}.down_proj.weight", axes) for expert in range(4)
    ]
    assert part.tensors[0].layout.stored_shape(part.tensors[0].base_shape) == (32, 16)


def test_stacked_experts_hold_the_tensors_of_their_checkpoint(tmp_path: Path) -> None:
    tensors = random_tensors(EXPERTS)
    found = by_tensor(*load(write(tmp_path, tensors, EXPERTS), scan_layers=True))
    for layer in (1, 2, 3):
        name = f"model.layers.{layer}.mlp.experts.*.up_proj.weight"
        for expert in range(4):
            np.testing.assert_array_equal(found[name][expert], tensors[name.replace("*", str(expert))].T)
    np.testing.assert_array_equal(found["model.layers.3.mlp.gate.weight"], tensors["model.layers.3.mlp.gate.weight"].T)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(EXPERTS)
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    write(tmp_path, tensors, EXPERTS)
    with pytest.raises(ModelLoadError, match=r"lack 1 tensors .*: model\.layers\.2\.mlp\.experts\.3\.up_proj"):
        load(tmp_path, scan_layers=True)


def test_a_stack_is_filled_in_place() -> None:
    stack, part = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    analysis = jax.jit(_set_layer, donate_argnums=0).lower(stack, part, 0).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == 8 * 64 * 64 * 4
    assert analysis.temp_size_in_bytes < 64 * 64 * 4


def test_a_fault_in_a_stack_names_the_tensor_of_its_layer(tmp_path: Path) -> None:
    tensors = random_tensors(HF)
    del tensors[UP_PROJ]
    write(tmp_path, tensors, HF)
    with pytest.raises(ModelLoadError, match=r"lack 1 tensors .*: model\.layers\.1\.mlp\.up_proj\.weight; "):
        load(tmp_path, scan_layers=True)


def test_copied_key_and_value_heads_lie_beside_their_originals(tmp_path: Path) -> None:
    """So that a group of neighbouring query heads finds its own."""
    once, often = (by_tensor(*load_copies(write(tmp_path, random_tensors(SHARED), SHARED), count)) for count in (1, 4))
    name = "model.layers.1.self_attn.k_proj"
    np.testing.assert_array_equal(often[f"{name}.weight"], once[f"{name}.weight"].repeat(4, axis=1))
    np.testing.assert_array_equal(often[f"{name}.bias"], once[f"{name}.bias"].repeat(4, axis=0))
    np.testing.assert_array_equal(often[UP_PROJ], once[UP_PROJ])


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from checkpoints import load, load_copies
from pathlib import Path

folder, mesh = Path(sys.argv[1]), jax.make_mesh((2, 4), ("data", "tensor"))
axes = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor", "embed": "data"}
by_expert = axes | {"experts": "data", "embed": None}
place = lambda parameter: NamedSharding(mesh, PartitionSpec(*(axes.get(axis) for axis in parameter.logical_axes)))
assert len(jax.devices()) == 8
copied = lambda folder, **options: load_copies(folder, 2, **options)
random = {"load_format": "dummy", "seed": 3}
cases = [(load, "stored", {}), (load, "random", random), (load, "stored", {"scan_layers": True})]
cases += [(copied, "shared", {}), (copied, "shared", random), (load, "experts", {"scan_layers": True})]
for load, name, options in cases:
    axes = by_expert if name == "experts" else axes
    structure, whole = load(folder / name, **options)
    _, parts = load(folder / name, sharding_of=place, **options)
    for parameter, one, other in zip(structure.parameters, whole, parts, strict=True):
        assert len(one.devices()) == 1 and len(other.devices()) == 8
        shape = other.addressable_shards[0].data.shape
        divisors = [{"data": 2, "tensor": 4}.get(axes.get(axis), 1) for axis in parameter.logical_axes]
        assert shape == tuple(size // by for size, by in zip(parameter.shape, divisors)), parameter
        # Random numbers are computed, and a compiler may round the ends of a vector loop in another way.
        np.testing.assert_allclose(one, other, rtol=1e-6 if options.get("load_format") == "dummy" else 0)
"""


def test_a_load_over_eight_devices_equals_that_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device holds its own part; heads, kv heads, mlp and vocabulary over four, embedding over two."""
    write(tmp_path / "stored", random_tensors(HF), HF)
    write(tmp_path / "random", {}, SQUARE)
    write(tmp_path / "shared", random_tensors(SHARED), SHARED)
    write(tmp_path / "experts", random_tensors(EXPERTS), EXPERTS)
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "support"))
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
