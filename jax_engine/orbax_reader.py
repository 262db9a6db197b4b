"""Tensors of a folder that `jax-engine convert` has written, read a slice at a time and compared with their digests.

The files are Orbax checkpoints (OCDBT, zarr3), whose tensors TensorStore reads directly: only the chunks that a slice
lies in, and nothing of the rest of the tree.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore

from jax_engine.checkpoint_manifest import (
    WEIGHTS,
    ConvertedCheckpoint,
    StoredTensor,
    chunk_digest,
    read_checkpoint_manifest,
)
from jax_engine.model_files import ModelLoadError, listed
from jax_engine.model_structure import ModelStructure, Parameter
from jax_engine.models.weights import Ranges

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OrbaxTensors:
    """The tensors of one converted folder. Parts may be read from several threads."""

    folder: Path
    manifest: ConvertedCheckpoint
    context: tensorstore.Context = field(default_factory=tensorstore.Context)

    @classmethod
    def open(cls, folder: Path, structure: ModelStructure) -> "OrbaxTensors":
        """Those of a model, after checking that the folder holds exactly these, in the right shapes.

        Raises:
            ModelLoadError: it does not, or is damaged or unfinished.
        """
        manifest = read_checkpoint_manifest(folder)
        own = (parameter for parameter in structure.parameters if not parameter.is_of_adapters)
        expected = {part.name: part.base_shape for parameter in own for part in parameter.parts}
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
        axes = list(zip(ranges, stored.chunk_shape, stored.shape, strict=True))
        # Whole chunks: a digest is of one.
        around = [(start // chunk * chunk, min(-(-stop // chunk) * chunk, size)) for (start, stop), chunk, size in axes]
        block = self._read(parameter.name, around)
        for place, inside in _chunks(stored, around):
            chunk = np.ascontiguousarray(block[inside])
            if chunk_digest(chunk.view(np.uint8).data) != stored.digests[place]:
                raise ModelLoadError(
                    f"tensor {parameter.name} in {self._file(parameter.name)} is damaged: chunk {place} of "
                    f"{len(stored.digests)} has another checksum than when it was written; {_AGAIN}"
                )
        return block[
            tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(ranges, around, strict=True))
        ]

    def _read(self, name: str, ranges: Sequence[tuple[int, int]]) -> Values:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": f"file://{self._file(name)}/", "path": f"{name}/"},
        }
        try:
            array = tensorstore.open(spec, open=True, context=self.context).result()
            if array.dtype.numpy_dtype != self._dtype:
                raise ModelLoadError(
                    f"tensor {name} in {self._file(name)} is stored as {array.dtype.name}, and was written as "
                    f"{self.manifest.dtype}; {_AGAIN}"
                )
            return np.asarray(array[tuple(slice(*bounds) for bounds in ranges)].read().result())
        except (ValueError, OSError) as error:
            if isinstance(error, ModelLoadError):
                raise
            reason = str(error).partition(" [")[0]
            raise ModelLoadError(
                f"tensor {name} cannot be read from {self._file(name)} ({reason}); {_AGAIN}"
            ) from error

    def _file(self, name: str) -> Path:
        return self.folder.absolute() / WEIGHTS / str(self.manifest.tensors[name].group)

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return jnp.dtype(self.manifest.dtype)


_AGAIN = "copy or convert the model again"


def _chunks(stored: StoredTensor, around: Sequence[tuple[int, int]]) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """The place of each chunk of a block among the tensor's, and where it lies in the block."""
    counts = [-(-size // chunk) for size, chunk in zip(stored.shape, stored.chunk_shape, strict=True)]
    rows = [
        range(first // chunk, -(-stop // chunk))
        for (first, stop), chunk in zip(around, stored.chunk_shape, strict=True)
    ]
    for place in itertools.product(*rows):
        inside = tuple(
            slice(index * chunk - first, min((index + 1) * chunk, stop) - first)
            for index, chunk, (first, stop) in zip(place, stored.chunk_shape, around, strict=True)
        )
        yield int(np.ravel_multi_index(place, counts)) if counts else 0, inside
