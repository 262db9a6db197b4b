"""A converted checkpoint: the same leaves on any mesh, and refused when it is not what was written."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint
import pytest
from checkpoints import EXPERTS, HF, SHARED, UP_PROJ, Leaves, load, load_copies, random_tensors, write

from jax_engine.loading.checkpoint_manifest import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_MANIFEST,
    WEIGHTS,
    StoredTensor,
    read_checkpoint_manifest,
)
from jax_engine.loading.convert import convert
from jax_engine.loading.model_files import ModelLoadError, read_model_config
from jax_engine.loading.model_structure import ModelStructure
from jax_engine.loading.new_folders import UNFINISHED, new_folder

# More than one chunk in a tensor, and more than one group.
SMALL_CHUNKS = {"MAX_CHUNK_BYTES": 1024, "GROUP_BYTES": 16 * 1024}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("source") / "model", random_tensors(HF), HF)
    (folder / "generation_config.json").write_text('{"top_k": 3}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_from(source, tmp_path_factory.mktemp("converted") / "model")


def converted_from(source: Path, folder: Path, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SMALL_CHUNKS.items():
            patch.setattr(f"jax_engine.loading.convert.{name}", size)
        convert(source, folder, **options)
    return folder


@pytest.fixture
def copied(converted: Path, tmp_path: Path) -> Path:
    """The converted folder once more, to be damaged."""
    folder = tmp_path / "model"
    for file in (file for file in converted.rglob("*") if file.is_file()):
        target = folder / file.relative_to(converted)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return folder


def assert_equal(one: tuple[ModelStructure, Leaves], other: tuple[ModelStructure, Leaves]) -> None:
    assert one[0].parameters == other[0].parameters
    for parameter, a, b in zip(one[0].parameters, one[1], other[1], strict=True):
        np.testing.assert_array_equal(a, b, err_msg=parameter.name)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "stacked"])
def test_its_leaves_are_those_of_the_checkpoint_it_was_made_from(
    source: Path, converted: Path, scan_layers: bool
) -> None:
    assert_equal(load(converted, scan_layers=scan_layers), load(source, scan_layers=scan_layers))
    assert_equal(load(converted, load_format="orbax", dtype=jnp.bfloat16), load(source, dtype=jnp.bfloat16))


def test_key_and_value_heads_are_copied_when_it_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random_tensors(SHARED), SHARED)
    folder = converted_from(source, tmp_path / "converted")
    assert_equal(load_copies(folder, 4), load_copies(source, 4))


def test_experts_become_one_tensor(tmp_path: Path) -> None:
    source = write(tmp_path / "source", random_tensors(EXPERTS), EXPERTS)
    folder = converted_from(source, tmp_path / "converted")
    assert_equal(load(folder, scan_layers=True), load(source, scan_layers=True))
    assert "model.layers.1.mlp.experts.*.up_proj.weight" in read_checkpoint_manifest(folder).tensors


def test_what_a_server_needs_lies_beside_the_weights(source: Path, converted: Path) -> None:
    assert (converted / "generation_config.json").read_text() == '{"top_k": 3}'
    assert (converted / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list(converted.rglob("*.safetensors"))
    assert read_model_config(converted) == HF | {"dtype": "float32"}
    manifest = read_checkpoint_manifest(converted)
    [(name, file)] = manifest.sources.items()
    assert (name, file.num_bytes) == ("model.safetensors", (source / name).stat().st_size)
    assert manifest.tensors[UP_PROJ].shape == (32, 40), "as it is used"
    assert len(manifest.tensors[UP_PROJ].digests) > 1
    assert len(list((converted / WEIGHTS).iterdir())) > 1


def test_the_dtype_is_chosen_when_it_is_converted(source: Path, tmp_path: Path) -> None:
    folder = converted_from(source, tmp_path / "half", dtype="bfloat16")
    assert read_model_config(folder)["dtype"] == "bfloat16"
    assert_equal(load(folder, dtype=jnp.bfloat16), load(source, dtype=jnp.bfloat16))
    halves, wholes = ((folder_size(path)) for path in (folder, source))
    assert halves < wholes


def folder_size(folder: Path) -> int:
    weights = [*folder.glob(f"{WEIGHTS}/**/c/**/*"), *folder.glob("*.safetensors")]
    return sum(file.stat().st_size for file in weights if file.is_file())


def test_orbax_itself_reads_it(source: Path, converted: Path) -> None:
    structure, leaves = load(source)
    found: dict[str, Any] = {}
    with orbax.checkpoint.Checkpointer(orbax.checkpoint.PyTreeCheckpointHandler()) as checkpointer:
        for group in sorted((converted / WEIGHTS).iterdir()):
            tree = checkpointer.metadata(group).item_metadata.tree
            as_numpy = {name: orbax.checkpoint.RestoreArgs(restore_type=np.ndarray) for name in tree}
            arguments = orbax.checkpoint.args.PyTreeRestore(restore_args=as_numpy)
            found |= checkpointer.restore(group, arguments)
    assert found.keys() == {parameter.name for parameter in structure.parameters}
    for parameter, leaf in zip(structure.parameters, leaves, strict=True):
        np.testing.assert_array_equal(found[parameter.name], leaf)


MESHES = """
import json, sys
from pathlib import Path
import jax, numpy as np
from checkpoints import load
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_engine.loading.convert import convert
import jax_engine.loading.convert as module

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
module.MIN_CHUNK_BYTES = 1
convert(source, folder)
chunks = sorted(str(file) for file in folder.rglob("c/**/*") if file.is_file())
opened, found = [], {}
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
for size in (1, 2, 8):
    mesh = jax.make_mesh((size,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])
    def sharding_of(parameter):
        split = [axis if axis in ("heads", "kv_heads", "mlp", "vocab") else None for axis in parameter.logical_axes]
        return NamedSharding(mesh, PartitionSpec(*("x" if axis else None for axis in split)))
    for scan in (False, True):
        opened.clear()
        structure, leaves = load(folder, sharding_of=sharding_of, scan_layers=scan)
        assert sorted(name for name in opened if "/c/" in name) == chunks, (size, scan, opened)
        _, expected = load(source, sharding_of=sharding_of, scan_layers=scan)
        found[f"{size} {scan}"] = all(map(np.array_equal, leaves, expected))
        assert all(leaf.sharding == sharding_of(own) for leaf, own in zip(leaves, structure.parameters))
print(json.dumps(found))
"""


def test_on_every_mesh_each_device_reads_its_own_alone(source: Path, tmp_path: Path) -> None:
    """Written with eight devices in mind, read for one, two and eight: not a byte twice, and none for nothing."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parent / "support")}
    command = [sys.executable, "-c", MESHES, str(source), str(tmp_path / "converted")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert all(json.loads(result.stdout.splitlines()[-1]).values())


def data_file(folder: Path) -> Path:
    """The largest file of the first group: a chunk."""
    return max((folder / WEIGHTS / "0").rglob("c/**/*"), key=lambda file: file.is_file() and file.stat().st_size)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edit(folder: Path, **changes: Any) -> None:
    """Change what the manifest says, and let it vouch for that."""
    manifest = msgspec.structs.replace(read_checkpoint_manifest(folder), **changes)
    manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
    (folder / CHECKPOINT_MANIFEST).write_bytes(msgspec.json.encode(manifest))


def edit_tensors(folder: Path, change: Callable[[dict[str, StoredTensor]], object]) -> None:
    tensors = dict(read_checkpoint_manifest(folder).tensors)
    change(tensors)
    edit(folder, tensors=tensors)


def edit_text(folder: Path) -> None:
    file = folder / CHECKPOINT_MANIFEST
    file.write_text(file.read_text().replace("float32", "float16"))


# What is wrong with the folder -> what the error must say.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (lambda f: flip(data_file(f)), r"tensor \S+ in \S+/weights/0 is damaged: chunk \d+ of \d+ has"),
    "truncated": (
        lambda f: data_file(f).write_bytes(data_file(f).read_bytes()[:-500]),
        r"tensor \S+ cannot be read from \S+/weights/0 \(\S+: mmap length is greater than file size\); copy or convert",
    ),
    "missing": (lambda f: data_file(f).unlink(), r"tensor \S+ cannot be read from \S+/weights/0 \(.*; copy or convert"),
    "another layout": (
        lambda f: edit_tensors(
            f, lambda tensors: tensors.update({UP_PROJ: msgspec.structs.replace(tensors[UP_PROJ], chunk_shape=(1, 1))})
        ),
        r"up_proj\.weight cannot be read from .*\(its zarr.json is of another shape, or of other chunks\); copy or",
    ),
    "another dtype": (lambda f: edit(f, dtype="bfloat16"), r"is stored as float32, and was written as bfloat16"),
    "another config": (
        lambda f: (f / "config.json").write_text(json.dumps(HF | {"rope_theta": 5.0})),
        r"config\.json is not the one that the weights beside it were converted with",
    ),
    "tensor missing": (
        lambda f: edit_tensors(f, lambda tensors: tensors.pop(UP_PROJ)),
        rf"lacks 1 tensors of the model: {UP_PROJ}; copy or convert",
    ),
    "tensor extra": (
        lambda f: edit_tensors(f, lambda tensors: tensors.update(x=tensors[UP_PROJ])),
        r"holds 1 tensors of no use: x; copy or convert",
    ),
    "another shape": (
        lambda f: edit_tensors(
            f, lambda tensors: tensors.update({UP_PROJ: msgspec.structs.replace(tensors[UP_PROJ], shape=(40, 32))})
        ),
        r"up_proj\.weight in .* has shape \(40, 32\), the model has \(32, 40\)",
    ),
    "manifest edited": (edit_text, r"converted\.json was changed after it was written"),
    "manifest not JSON": (lambda f: (f / CHECKPOINT_MANIFEST).write_text("{"), r"converted\.json is damaged \("),
    "another format": (
        lambda f: edit(f, format=CHECKPOINT_FORMAT + 1),
        rf"is of format {CHECKPOINT_FORMAT + 1}, and this engine reads {CHECKPOINT_FORMAT}; convert the model again",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_damaged_folder_is_refused_with_file_and_remedy(fault: str, copied: Path) -> None:
    breakage, message = BROKEN[fault]
    breakage(copied)
    with pytest.raises(ModelLoadError, match=message) as refused:
        load(copied)
    assert str(copied) in str(refused.value)


def test_a_folder_of_another_kind_is_refused(source: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no converted\.json; load_format='orbax' needs a folder"):
        load(source, load_format="orbax")
    with pytest.raises(ModelLoadError, match=r"has no \*\.safetensors file"):
        load(converted, load_format="safetensors")
    with pytest.raises(ModelLoadError, match="is converted already; give the folder that it was made from"):
        convert(converted, tmp_path / "again")
    with pytest.raises(ValueError, match=r"OUT='.*' is there already, and not empty; give another, or remove it"):
        convert(source, converted)


def test_an_interrupted_conversion_leaves_nothing_half_valid(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails is removed; what was killed has another name, which loading and the next conversion know."""

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("jax_engine.loading.convert._chunk_shapes", fail)
        with pytest.raises(OSError, match="no space left"):
            convert(source, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    writing = new_folder(tmp_path / "model")
    left = writing.__enter__()  # and the process is killed
    (left / "config.json").write_text(json.dumps(HF))
    assert UNFINISHED in left.name
    with pytest.raises(ModelLoadError, match="is what an interrupted jax-engine convert has left; remove it"):
        load(left)
    convert(source, tmp_path / "model")
    assert f"{left} is what an interrupted run has left; remove it" in caplog.text
    assert_equal(load(tmp_path / "model"), load(source))
