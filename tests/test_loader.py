"""A checkpoint arrives on the devices as it was stored; a folder that is wrong is refused with a file and a remedy."""

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import HF, UP_PROJ, Leaves, dummy, load, random_tensors, structure_of, write
from safetensors.numpy import load_file, save_file

from jax_engine.loading.model_files import (
    ModelLoadError,
    WeightFiles,
    read_generation_config,
    read_model_config,
    resolve_model_path,
)


def write_sharded(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """The same checkpoint in three files and an index."""
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{index % 3 + 1}-of-00003.safetensors" for index, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(HF)


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, np.ndarray]) -> Path:
    return write(tmp_path / "model", tensors, HF)


def test_every_leaf_holds_its_tensor_in_the_layout_it_is_used_in(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    structure, leaves = load(folder)
    by_name = dict(zip((parameter.name for parameter in structure.parameters), leaves, strict=True))
    assert by_name.keys() == tensors.keys()
    np.testing.assert_array_equal(by_name[UP_PROJ], tensors[UP_PROJ].T)
    query = "model.layers.0.self_attn.q_proj"
    split = tensors[f"{query}.weight"].reshape(8, 6, 32).transpose(2, 0, 1)
    np.testing.assert_array_equal(by_name[f"{query}.weight"], split)
    np.testing.assert_array_equal(by_name[f"{query}.bias"], tensors[f"{query}.bias"].reshape(8, 6))


def test_merged_leaves_sit_where_their_names_say(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    structure, leaves = load(folder)
    model = structure.merge(leaves)
    np.testing.assert_array_equal(model.model.layers[1].mlp.up_proj.weight[...], tensors[UP_PROJ].T)
    np.testing.assert_array_equal(model.model.norm.weight[...], tensors["model.norm.weight"])
    assert model.model.layers[1].mlp.up_proj.weight.logical_axes == ("embed", "mlp")


def test_a_structure_is_hashable_and_equal_for_equal_models() -> None:
    assert structure_of(HF) == structure_of(HF)
    assert hash(structure_of(HF)) == hash(structure_of(HF))
    assert structure_of(HF) != structure_of(HF | {"num_hidden_layers": 3})


def test_the_size_in_memory_is_known_before_loading(folder: Path) -> None:
    structure, leaves = load(folder)
    assert structure.num_bytes == sum(leaf.nbytes for leaf in leaves) > 0


def test_shards_and_single_file_give_the_same_leaves(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    _, single = load(folder)
    _, sharded = load(write_sharded(folder, tensors))
    for one, other in zip(single, sharded, strict=True):
        np.testing.assert_array_equal(one, other)


def test_tied_embeddings_stored_twice_are_read_once(tmp_path: Path) -> None:
    hf = HF | {"tie_word_embeddings": True}
    tensors = random_tensors(hf)
    extra = {
        "lm_head.weight": np.ones((48, 32), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3),
    }
    structure, _ = load(write(tmp_path, tensors | extra, hf))
    assert "lm_head.weight" not in {parameter.name for parameter in structure.parameters}


def test_values_are_converted_to_the_asked_dtype(folder: Path) -> None:
    _, wide = load(folder)
    _, narrow = load(folder, dtype=jnp.bfloat16)
    for one, other in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(one.astype(jnp.bfloat16), other)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "stacked"])
def test_host_memory_holds_few_tensors_at_a_time(tmp_path: Path, scan_layers: bool) -> None:
    """Read in float32 and kept in bfloat16, so that what is read cannot become the device's own memory on a CPU."""
    hf = HF | {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 6}
    tensors = random_tensors(hf)
    folder = write(tmp_path, tensors, hf)
    stored = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    del tensors
    tracemalloc.start()
    try:
        structure, leaves = load(folder, dtype=jnp.bfloat16, scan_layers=scan_layers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(leaves) == len(structure.parameters)
    # Four readers, each with a tensor as stored and as converted; the rest is the finished bfloat16 copy at most.
    assert peak < structure.num_bytes + 4 * 1.5 * largest + 2**20 < stored


def test_dummy_weights_depend_on_the_seed_and_the_name_alone() -> None:
    (structure, one), (_, same), (_, other) = dummy(0), dummy(0), dummy(1)
    drawn = [index for index, parameter in enumerate(structure.parameters) if parameter.std]
    assert all(bool((a == b).all()) for a, b in zip(one, same, strict=True))
    assert all(bool((one[index] != other[index]).any()) for index in drawn)
    assert len({float(one[index].ravel()[0]) for index in drawn}) == len(drawn)


def test_dummy_weights_give_logits_of_ordinary_size() -> None:
    structure, leaves = dummy(0)

    @jax.jit
    def forward(leaves: Leaves, token_ids: jax.Array) -> jax.Array:
        model = structure.merge(leaves)
        hidden, _ = model(token_ids, token_ids, None, jnp.zeros_like(token_ids))
        return model.compute_logits(hidden)

    logits = forward(leaves, jnp.arange(20))
    assert 0.3 < float(logits.std()) < 3
    assert len(np.unique(logits.argmax(axis=-1))) > 5


def test_progress_is_shown_when_asked_and_not_to_a_pipe(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(folder)
    assert capfd.readouterr().err == ""
    load(folder, progress=True)
    assert "loading weights: 100%" in capfd.readouterr().err


def break_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(HF | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def drop_shard(folder: Path) -> None:
    write_sharded(folder, load_file(folder / "model.safetensors"))
    (folder / "model-00002-of-00003.safetensors").unlink()


# What is wrong with the folder -> what the error must say.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json; a model folder in Hugging Face's"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON .*line 1"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is not valid JSON"),
    "config not an object": (
        lambda f: (f / "config.json").write_text("[]"),
        "holds a list; it must hold a JSON object",
    ),
    "unknown architecture": (
        lambda f: break_config(f, architectures=["GPT2LMHeadModel"]),
        r"config\.json: architecture 'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM, Mistral",
    ),
    "field missing": (lambda f: break_config(f, hidden_size=None), r"config\.json: hidden_size is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no \*\.safetensors file; only safetensors"),
    "truncated": (truncate, r"model\.safetensors \(\d+ bytes\) is truncated .*; download it again"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), r"\(0 bytes\) is truncated"),
    "Git LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "missing shard": (
        drop_shard,
        r"lacks 1 of the 3 weight files that .*index\.json names \(model-00002-of-00003\.safetensors\); download them",
    ),
    "index without files": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json has no weight_map",
    ),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: t.pop(UP_PROJ)),
        r"lack 1 tensors that config\.json calls for: model\.layers\.1\.mlp\.up_proj\.weight; ",
    ),
    "unexpected tensors": (
        lambda f: break_config(f, num_hidden_layers=1),
        r"hold 12 tensors that config\.json does not call for: model\.layers\.1\.input_layernorm\.weight, .*\.\.\.;",
    ),
    "wrong shape": (
        lambda f: change_tensors(f, lambda t: t.update({UP_PROJ: t[UP_PROJ].T.copy()})),
        r"up_proj\.weight in .*model\.safetensors has shape \[32, 40\], config\.json makes it \[40, 32\]",
    ),
    "integers": (
        lambda f: change_tensors(f, lambda t: t.update({UP_PROJ: t[UP_PROJ].astype(np.int8)})),
        r"up_proj\.weight in .* is stored as I8; supported are F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused_with_file_and_remedy(fault: str, folder: Path) -> None:
    breakage, message = BROKEN[fault]
    breakage(folder)
    with pytest.raises(ModelLoadError, match=message) as refused:
        load(folder)
    assert str(folder) in str(refused.value)


def test_an_unknown_load_format_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="load_format='gguf' must be one of auto, safetensors, orbax, dummy"):
        load(folder, load_format="gguf")


def test_no_model_means_the_built_in_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert resolve_model_path(None) == resolve_model_path("demo")
    assert resolve_model_path("model") == Path("model")
    assert resolve_model_path(str(folder)) == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "model folder './nowhere' does not exist"),
        ("/no/such/folder", "does not exist"),
        ("config.json", "is a file; give the folder"),
        ("some-one/some-model", "could not be fetched from the Hugging Face hub .*; check the name, the network"),
        ("not a name", "could not be fetched .*Repo id must use alphanumeric"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(
    name: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(ModelLoadError, match=message):
        resolve_model_path(name)


def test_generation_settings_are_optional(folder: Path) -> None:
    assert read_generation_config(folder) == {}
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read_generation_config(folder) == {"eos_token_id": [1, 2]}
    assert read_model_config(folder) == HF


def test_reading_model_files_needs_no_jax() -> None:
    script = "import sys; sys.modules['jax'] = None; import jax_engine.loading.model_files"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_weight_files_list_their_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    files = WeightFiles.open(folder)
    assert files.names == tensors.keys()
    assert files.file_of(UP_PROJ) == "model.safetensors"
