"""What `jax-engine convert` says of the checkpoint that it writes: `converted.json`. Needs no JAX."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import xxhash

from jax_engine.loading.model_files import ModelLoadError
from jax_engine.loading.new_folders import UNFINISHED

CHECKPOINT_MANIFEST = "converted.json"
WEIGHTS = "weights"  # the folder of the Orbax checkpoints, each of a group of tensors
CHECKPOINT_FORMAT = 2


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A weight file that was converted."""

    num_bytes: int
    sha256: str


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor: the checkpoint that holds it, its shape, which that of the chunks divides, and a digest (XXH3, 64 bits)
    of each chunk, the last axis running fastest.
    """

    group: int
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    digests: tuple[str, ...]

    @property
    def num_chunks(self) -> tuple[int, ...]:
        """Along each axis."""
        return tuple(size // chunk for size, chunk in zip(self.shape, self.chunk_shape, strict=True))

    def number_of(self, place: Sequence[int]) -> int:
        """Of the chunk at a place, among all digests."""
        number = 0
        for index, count in zip(place, self.num_chunks, strict=True):
            number = number * count + index
        return number


class ConvertedCheckpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of it. `config_sha256` is of `config.json` as it lies beside; `sha256` is of all the rest."""

    format: int
    dtype: str
    config_sha256: str
    sources: dict[str, SourceFile]
    tensors: dict[str, StoredTensor]
    sha256: str = ""
    kv_scales: dict[str, list[float]] = {}  # of an 8-bit cache, by the names of the checkpoint's tensors

    def digest(self) -> str:
        """What `sha256` must be."""
        content = msgspec.to_builtins(msgspec.structs.replace(self, sha256=""))
        if not self.kv_scales:  # as before there were any
            del content["kv_scales"]
        return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def is_converted(folder: Path) -> bool:
    """Whether a model folder is one that `jax-engine convert` has written, or was about to."""
    return (folder / CHECKPOINT_MANIFEST).exists() or UNFINISHED in folder.name


def file_digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def chunk_file(group: Path, name: str, place: Sequence[int]) -> Path:
    """Where the chunk of a tensor at a place lies in its checkpoint: its values, in rows, the least byte first."""
    return group / name / "c" / "/".join(map(str, place))


def chunk_digest(content: bytes | memoryview) -> str:
    """The digest of a chunk's bytes, which finds damage and no forgery."""
    return xxhash.xxh3_64_hexdigest(content)


def read_checkpoint_manifest(folder: Path) -> ConvertedCheckpoint:
    """The manifest of a converted folder, and that its config.json is the one that was converted.

    Raises:
        ModelLoadError: the conversion was interrupted, or a file is missing, damaged or changed.
    """
    file = folder / CHECKPOINT_MANIFEST
    if UNFINISHED in folder.name:
        raise ModelLoadError(
            f"{folder} is what an interrupted jax-engine convert has left; remove it and convert again"
        )
    try:
        found = msgspec.json.decode(file.read_bytes())
        number = found.get("format") if isinstance(found, dict) else None
        if isinstance(number, int) and number != CHECKPOINT_FORMAT:
            raise ModelLoadError(
                f"{file} is of format {number}, and this engine reads {CHECKPOINT_FORMAT}; convert the model again"
            )
        manifest = msgspec.convert(found, ConvertedCheckpoint)
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{folder} has no {CHECKPOINT_MANIFEST}; load_format='orbax' needs a folder of jax-engine convert"
        ) from error
    except msgspec.MsgspecError as error:
        raise ModelLoadError(f"{file} is damaged ({error}); copy or convert the model again") from error
    if manifest.digest() != manifest.sha256:
        raise ModelLoadError(f"{file} was changed after it was written; copy or convert the model again")
    if file_digest(folder / "config.json") != manifest.config_sha256:
        raise ModelLoadError(
            f"{folder / 'config.json'} is not the one that the weights beside it were converted with; copy or convert "
            "the model again"
        )
    return manifest
