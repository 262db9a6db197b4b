"""The files of a model folder, in Hugging Face's layout: where they are, what they say. Needs no JAX.

Whatever is wrong with a folder is a `ModelLoadError` that names the file and the remedy.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from jax_engine.models.demo import DEMO_DIR, DEMO_DRAFT_DIR

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What a model needs of a hub repository; the ignored ones hold the same weights in other layouts.
_DOWNLOAD = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_DOWNLOAD_IGNORE = ["original/*", "consolidated*", "onnx/*"]
_GIT_LFS_POINTER = b"version https://git-lfs"
_ONLY_BYTES = ("F8_E4M3",)
_NUM_LISTED = 5  # how many names an error lists


class ModelLoadError(ValueError):
    """A model cannot be loaded; the message names the file, what is wrong with it, and what to do."""


def listed(names: Sequence[str]) -> str:
    """Names as an error has them."""
    return ", ".join(names[:_NUM_LISTED]) + (", ..." if len(names) > _NUM_LISTED else "")


def resolve_model_path(name: str | Path | None, *, revision: str | None = None) -> Path:
    """The folder of a model: the built-in one for None or "demo" and its draft for "demo-draft", an existing folder,
    else a download from the hub.

    `revision` is a branch, tag or commit of the hub repository. Files that were downloaded before are not fetched
    again, and are enough when there is no network.
    """
    if name is None or str(name) == "demo":
        return DEMO_DIR
    if str(name) == "demo-draft":
        return DEMO_DRAFT_DIR
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(f"model {str(name)!r} is a file; give the folder that holds config.json and the weights")
    if isinstance(name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"model folder {str(name)!r} does not exist; check the path")
    # Imported when needed: its HTTP client takes longer to import than a local folder to read.
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=_DOWNLOAD, ignore_patterns=_DOWNLOAD_IGNORE
            )
        )
    except (OSError, HFValidationError) as error:  # OSError: no network, no such repository, no access, disk full
        reason = str(error).strip().partition("\n")[0]
        raise ModelLoadError(
            f"model {name!r} is not a folder here and could not be fetched from the Hugging Face hub ({reason}); check "
            "the name, the network and, for a gated model, your access token (HF_TOKEN), or give a local folder"
        ) from error


def read_model_config(folder: Path) -> dict[str, Any]:
    """The contents of `config.json`."""
    file = folder / "config.json"
    if not file.exists():
        raise ModelLoadError(
            f"{folder} has no config.json; a model folder in Hugging Face's layout is needed: config.json, tokenizer "
            "files and *.safetensors"
        )
    return _read_json(file)


def read_generation_config(folder: Path) -> dict[str, Any]:
    """The contents of `generation_config.json`; empty when the model has none."""
    file = folder / "generation_config.json"
    return _read_json(file) if file.exists() else {}


def generation_config_folder(value: str) -> Path:
    """The folder that the setting `generation_config` names; ValueError for one without a generation_config.json."""
    folder = Path(value).expanduser()
    if not (folder / "generation_config.json").exists():
        raise ValueError(
            f"generation_config={value!r} must be 'auto' (the model's own), 'vllm' (none) or a folder with a "
            "generation_config.json"
        )
    return folder


class WeightFiles:
    """The safetensors files of a model folder, opened for reading; tensors are read a slice at a time.

    Opening maps the files into memory and reads only their headers. Slices may be read from several threads.
    """

    def __init__(self, tensors: Mapping[str, tuple[Path, Any]]):
        self._tensors = tensors

    @classmethod
    def open(cls, folder: Path) -> "WeightFiles":
        """Open every weight file of `folder`; ModelLoadError when one is missing or broken."""
        tensors: dict[str, tuple[Path, Any]] = {}
        for file in _weight_paths(folder):
            handle = _open_safetensors(file)
            tensors |= dict.fromkeys(handle.keys(), (file, handle))
        return cls(tensors)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._tensors)

    def file_of(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._tensors[name][0].name

    def tensor(self, name: str) -> Any:
        """The tensor, not yet read: a safetensors slice with `get_shape`, `get_dtype` and indexing by slices. Numbers
        that NumPy does not know come as their bytes.
        """
        file, handle = self._tensors[name]
        found = handle.get_slice(name)
        return ByteTensor.open(file, name) if found.get_dtype() in _ONLY_BYTES else found

    def whole_tensor(self, name: str) -> NDArray[Any]:
        """A tensor that NumPy knows the numbers of, read."""
        values: NDArray[Any] = self._tensors[name][1].get_tensor(name)
        return values


@dataclass(frozen=True)
class ByteTensor:
    """A tensor of one byte a number, read by its place in its file."""

    dtype: str
    values: np.memmap[Any, Any]

    @classmethod
    def open(cls, file: Path, name: str) -> "ByteTensor":
        """A tensor of a file that safetensors has found to be whole."""
        header, size = _safetensors_header(file, file.stat().st_mtime_ns)
        found = header[name]
        begin, shape = size + found["data_offsets"][0], tuple(found["shape"])
        return cls(found["dtype"], np.memmap(file, np.uint8, "r", begin, shape))

    def get_shape(self) -> list[int]:
        return list(self.values.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, ranges: tuple[slice, ...]) -> NDArray[np.uint8]:
        return np.array(self.values[ranges])


@lru_cache(maxsize=64)  # of the files of a model, whose tensors come one after another
def _safetensors_header(file: Path, changed: int) -> tuple[dict[str, Any], int]:
    """What a file's header says, and where its data begins; `changed` is when the file was."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(size))
        return header, 8 + size


def _weight_paths(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index} has no weight_map; download it again")
        paths = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise ModelLoadError(
                f"{folder} lacks {len(missing)} of the {len(paths)} weight files that {INDEX_NAME} names "
                f"({', '.join(missing)}); download them again"
            )
        return paths
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME]
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelLoadError(
            f"{folder} has no *.safetensors file; only safetensors weights are supported: convert others with "
            "transformers' save_pretrained, or use load_format='dummy' for random weights"
        )
    return paths


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        with file.open("rb") as opened:
            if opened.read(len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER:
                raise ModelLoadError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`") from error
        raise ModelLoadError(
            f"{file} ({file.stat().st_size} bytes) is truncated or not a safetensors file ({error}); download it again"
        ) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(contents, dict):
        raise ModelLoadError(f"{file} holds a {type(contents).__name__}; it must hold a JSON object")
    return contents
