"""Tensors of a folder that `jax-engine convert` has written, read a slice at a time and compared with their digests.

The files are Orbax checkpoints whose chunks are a file each (zarr3, without OCDBT and compression): a chunk's values,
and behind them its place in the file. So a slice goes straight into the array that becomes the device's, chunk after
chunk, and nothing of the rest of the tree is looked at.
"""

import itertools
import mmap
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import xxhash

from jax_engine.loading.checkpoint_manifest import (
    WEIGHTS,
    ConvertedCheckpoint,
    StoredTensor,
    chunk_file,
    read_checkpoint_manifest,
)
from jax_engine.loading.model_files import ModelLoadError, listed
from jax_engine.loading.model_structure import ModelStructure, Parameter
from jax_engine.models.weights import Ranges

Values = np.ndarray[Any, Any]

BLOCK_BYTES = 2**20  # compared and laid out while they are in a processor's cache
# All of a file at once, not page by page, where the system can.
_MAP_FLAGS = mmap.MAP_SHARED | (mmap.MAP_POPULATE if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class OrbaxTensors:
    """The tensors of one converted folder. Parts may be read from several threads."""

    folder: Path
    manifest: ConvertedCheckpoint
    _checked: set[str] = field(default_factory=set)  # tensors

    @classmethod
    def open(cls, folder: Path, structure: ModelStructure) -> "OrbaxTensors":
        """Those of a model, after checking that the folder holds exactly these, in the right shapes.

        Raises:
            ModelLoadError: it does not, or is damaged or unfinished.
        """
        manifest = read_checkpoint_manifest(folder)
        expected = {part.name: part.base_shape for parameter in structure.stored for part in parameter.parts}
        if missing := sorted(expected.keys() - manifest.tensors.keys()):
            raise ModelLoadError(f"{folder} lacks {len(missing)} tensors of the model: {listed(missing)}; {_AGAIN}")
        if extra := sorted(manifest.tensors.keys() - expected.keys()):
            raise ModelLoadError(f"{folder} holds {len(extra)} tensors of no use: {listed(extra)}; {_AGAIN}")
        for name, shape in expected.items():
            if (stored := manifest.tensors[name].shape) != shape:
                raise ModelLoadError(f"tensor {name} in {folder} has shape {stored}, the model has {shape}; {_AGAIN}")
        return cls(folder, manifest)

    def part(self, parameter: Parameter, ranges: Ranges) -> Values:
        """A parameter at `ranges` of its `base_shape`, in the dtype that it is stored in.

        Raises:
            ModelLoadError: it cannot be read, or is not what was written.
        """
        stored = self.manifest.tensors[parameter.name]
        if parameter.name not in self._checked:
            self._check(parameter.name, stored)
            self._checked.add(parameter.name)
        # Whole chunks: a digest is of one.
        axes = zip(ranges, stored.chunk_shape, strict=True)
        around = [(start // chunk * chunk, -(-stop // chunk) * chunk) for (start, stop), chunk in axes]
        block = _new([stop - start for start, stop in around], self._dtype.itemsize)
        for place, inside in _chunks(stored, around):
            self._read(parameter.name, stored, place, block[inside])
        pairs = zip(ranges, around, strict=True)
        return block[tuple(slice(start - first, stop - first) for (start, stop), (first, _) in pairs)].view(self._dtype)

    def _check(self, name: str, stored: StoredTensor) -> None:
        """Refuse a tensor whose files are laid out in another way than its chunks are read."""
        file = self._file(name) / name / "zarr.json"
        try:
            found = msgspec.json.decode(file.read_bytes(), type=_ZarrArray)
        except (OSError, msgspec.MsgspecError) as error:
            raise self._unreadable(name, str(error)) from error
        if found.data_type != self._dtype.name:
            raise ModelLoadError(
                f"tensor {name} in {self._file(name)} is stored as {found.data_type}, and was written as "
                f"{self.manifest.dtype}; {_AGAIN}"
            )
        if (found.shape, found.chunk_grid.configuration.chunk_shape) != (stored.shape, stored.chunk_shape):
            raise self._unreadable(name, "its zarr.json is of another shape, or of other chunks")

    def _read(self, name: str, stored: StoredTensor, place: tuple[int, ...], values: Values) -> None:
        """Fill `values`, unsigned integers of the dtype's size, with the chunk at `place`."""
        file, digest = chunk_file(self._file(name), name, place), xxhash.xxh3_64()
        num_rows = max(1, BLOCK_BYTES * len(values) // max(1, values.nbytes))
        try:
            chunk = _mapped(file, values)
        except (OSError, ValueError) as error:  # ValueError: shorter than the chunk
            raise self._unreadable(name, f"{file}: {error}") from error
        for start in range(0, len(values), num_rows):
            rows = chunk[start : start + num_rows]
            digest.update(rows.data.cast("B"))
            values[start : start + num_rows] = rows
        number = stored.number_of(place)
        if digest.hexdigest() != stored.digests[number]:
            raise ModelLoadError(
                f"tensor {name} in {self._file(name)} is damaged: chunk {number} of {len(stored.digests)} has another "
                f"checksum than when it was written; {_AGAIN}"
            )

    def _file(self, name: str) -> Path:
        return self.folder.absolute() / WEIGHTS / str(self.manifest.tensors[name].group)

    def _unreadable(self, name: str, reason: str) -> ModelLoadError:
        return ModelLoadError(f"tensor {name} cannot be read from {self._file(name)} ({reason}); {_AGAIN}")

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return jnp.dtype(self.manifest.dtype)


_AGAIN = "copy or convert the model again"


class _Grid(msgspec.Struct, frozen=True):
    chunk_shape: tuple[int, ...]


class _ChunkGrid(msgspec.Struct, frozen=True):
    configuration: _Grid


class _ZarrArray(msgspec.Struct, frozen=True):
    """What `zarr.json` says of a tensor."""

    data_type: str
    shape: tuple[int, ...]
    chunk_grid: _ChunkGrid


def _new(shape: Sequence[int], itemsize: int) -> Values:
    """Memory for numbers of `itemsize` bytes, as unsigned integers, which NumPy copies faster than bfloat16.

    It begins at a page, so that it becomes a CPU's array without a copy. NumPy's own would not, and asks for huge
    pages, for which the system may have to make room first: that took longer than all else.
    """
    memory = mmap.mmap(-1, max(1, prod(shape) * itemsize))
    return np.frombuffer(memory, f"u{itemsize}", prod(shape)).reshape(shape)


def _mapped(file: Path, like: Values) -> Values:
    """What a file begins with, an array as `like` is. A map saves the copy that reading makes."""
    with FileIO(file) as opened:
        memory = mmap.mmap(opened.fileno(), like.nbytes, _MAP_FLAGS, mmap.PROT_READ)
    return np.frombuffer(memory, like.dtype, like.size).reshape(like.shape)


def _chunks(
    stored: StoredTensor, around: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The place of each chunk of a block among the tensor's, and where it lies in the block."""
    axes = list(zip(stored.chunk_shape, around, strict=True))
    for place in itertools.product(*(range(first // chunk, stop // chunk) for chunk, (first, stop) in axes)):
        starts = [index * chunk - first for index, (chunk, (first, _)) in zip(place, axes, strict=True)]
        yield place, tuple(slice(start, start + size) for start, size in zip(starts, stored.chunk_shape, strict=True))
