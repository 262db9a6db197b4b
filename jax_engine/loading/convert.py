"""`jax-engine convert`: a Hugging Face folder as a sharded Orbax checkpoint, laid out as the model uses it.

Tensors have the checkpoint's names and the model's layout and dtype, so that loading is reading: nothing is transposed
or converted. Each is cut into chunks along the axes that strategies split, in as many as `MAX_PARTS`, so that a device
of any mesh reads its own. They go through host memory in groups, each an Orbax checkpoint of its own.
"""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from tqdm import tqdm

from jax_engine.config import DTYPES
from jax_engine.loading.checkpoint_manifest import (
    CHECKPOINT_FORMAT,
    CHECKPOINT_MANIFEST,
    WEIGHTS,
    ConvertedCheckpoint,
    SourceFile,
    StoredTensor,
    chunk_digest,
    chunk_file,
    file_digest,
    is_converted,
)
from jax_engine.loading.kv_scale_files import stored_kv_scales
from jax_engine.loading.loader import load_config, reader_of
from jax_engine.loading.model_files import ModelLoadError, read_model_config, resolve_model_path
from jax_engine.loading.model_structure import ModelStructure, Parameter
from jax_engine.loading.new_folders import check_new_folder, new_folder
from jax_engine.models.ops import dense_ops

logger = logging.getLogger(__name__)

MAX_PARTS = 16  # devices that a tensor is cut for
GROUP_BYTES = 2 * 2**30  # in host memory at once
MAX_CHUNK_BYTES = 8 * 2**20
MIN_CHUNK_BYTES = 2**18
# What strategies split comes first.
_AXES = ("experts", "vocab", "heads", "kv_heads", "mlp", "embed")
# What else of a model folder is needed to serve it.
_COPIED = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
_NUM_READERS = 4


def prepare() -> None:
    """Set up JAX in a process that converts: tensors are cut for as many devices as its CPU pretends to be. Call it
    before JAX has looked for devices.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MAX_PARTS)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that it has nothing to merge


def convert(model: str | Path, folder: Path, *, dtype: str = "auto") -> ConvertedCheckpoint:
    """Write a model's weights, configuration and tokenizer to a new folder, in `dtype`, or in the configuration's.

    Raises:
        ValueError: the folder is there already, or the model cannot be read.
    """
    check_new_folder(folder, "OUT")
    source = resolve_model_path(model)
    if is_converted(source):
        raise ModelLoadError(f"{source} is converted already; give the folder that it was made from")
    start = time.monotonic()
    config, model_class = load_config(source)
    if config.quantization is not None:
        raise ModelLoadError(
            f"{source} has {config.quantization.method} weights of 8 bits, and a converted checkpoint has one type; "
            "serve the folder as it is, or convert the model in 16 bits, and serve that with quantization=..."
        )
    stored = config.dtype if config.dtype in DTYPES[1:] else "float32"
    stored = stored if dtype == "auto" else dtype
    structure = ModelStructure.of(model_class, config, ops=dense_ops(), dtype=jnp.dtype(stored))
    read = reader_of(source, structure, "safetensors")
    parts = [part for parameter in structure.parameters for part in parameter.parts]
    tensors: dict[str, StoredTensor] = {}
    bar = tqdm(total=structure.num_bytes, desc="converting", unit="B", unit_scale=True, disable=None)
    with new_folder(folder) as work, ThreadPoolExecutor(_NUM_READERS) as pool, bar:
        _copy_files(source, work, stored)
        for number, group in enumerate(_groups(parts)):
            arrays = dict(
                zip(
                    (part.name for part in group),
                    pool.map(read, group, (_sharding_for_chunks(part) for part in group)),
                    strict=True,
                )
            )
            place = work / WEIGHTS / str(number)
            _save(arrays, place)
            chunk_shapes = _chunk_shapes(place, arrays)
            for name, array in arrays.items():
                tensor = StoredTensor(number, array.shape, chunk_shapes[name], ())
                digests = tuple(_digests(np.asarray(array), tensor, place, name))
                tensors[name] = msgspec.structs.replace(tensor, digests=digests)
            bar.update(sum(array.nbytes for array in arrays.values()))
        sources = {
            file.name: SourceFile(file.stat().st_size, file_digest(file))
            for file in sorted(source.glob("*.safetensors"))
        }
        config_digest, kv_scales = file_digest(work / "config.json"), stored_kv_scales(source)
        manifest = ConvertedCheckpoint(CHECKPOINT_FORMAT, stored, config_digest, sources, tensors, kv_scales=kv_scales)
        manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
        (work / CHECKPOINT_MANIFEST).write_bytes(msgspec.json.encode(manifest))
    seconds = time.monotonic() - start
    logger.info("converted %.2f GB of %s weights in %.1f s", structure.num_bytes / 1e9, stored, seconds)
    return manifest


def _copy_files(source: Path, work: Path, dtype: str) -> None:
    """The small files of a model; its configuration says the dtype that the weights are in now."""
    for file in (file for pattern in _COPIED for file in source.glob(pattern)):
        if file.is_file() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, work / file.name)
    contents = read_model_config(source)
    contents.pop("torch_dtype", None)
    (work / "config.json").write_text(json.dumps(contents | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _groups(parts: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """The parameters in groups of at most `GROUP_BYTES`, or of one."""
    group: list[Parameter] = []
    for part in parts:
        if group and sum(other.num_bytes for other in group) + part.num_bytes > GROUP_BYTES:
            yield group
            group = []
        group.append(part)
    yield group


def _sharding_for_chunks(part: Parameter) -> Sharding:
    """How a parameter lies on this process's devices while it is written: a chunk is what one device holds, or less."""
    devices, count = jax.devices(), 1
    most = min(MAX_PARTS, len(devices), max(1, part.num_bytes // MIN_CHUNK_BYTES))
    axes: list[tuple[str, int]] = []
    for name in _AXES:
        if name not in part.logical_axes:
            continue
        size = gcd(part.shape[part.logical_axes.index(name)], 1 << ((most // count).bit_length() - 1))
        if size > 1:
            axes.append((name, size))
            count *= size
    if count == 1:
        return SingleDeviceSharding(devices[0])
    mesh = Mesh(np.array(devices[:count]).reshape([size for _, size in axes]), [name for name, _ in axes])
    names = {name for name, _ in axes}
    return NamedSharding(mesh, PartitionSpec(*(axis if axis in names else None for axis in part.logical_axes)))


def _save(arrays: dict[str, jax.Array], place: Path) -> None:
    # A file for each chunk, which is read straight into its place. Random bits do not shrink: no compression.
    handler = orbax.checkpoint.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)
    chunked = orbax.checkpoint.SaveArgs(chunk_byte_size=MAX_CHUNK_BYTES)
    arguments = orbax.checkpoint.args.PyTreeSave(arrays, save_args=dict.fromkeys(arrays, chunked))
    with orbax.checkpoint.Checkpointer(handler) as checkpointer:
        checkpointer.save(place.absolute(), arguments)


def _chunk_shapes(place: Path, arrays: dict[str, jax.Array]) -> dict[str, tuple[int, ...]]:
    """The chunks that each tensor was cut into."""
    with orbax.checkpoint.Checkpointer(orbax.checkpoint.PyTreeCheckpointHandler()) as checkpointer:
        tree: Any = checkpointer.metadata(place.absolute()).item_metadata.tree
    return {name: tuple(tree[name].storage.chunk_shape) for name in arrays}


def _digests(values: np.ndarray[Any, Any], tensor: StoredTensor, group: Path, name: str) -> Iterator[str]:
    """Of each chunk; OSError when its file does not begin with it."""
    for place in np.ndindex(*tensor.num_chunks):
        inside = tuple(
            slice(index * size, (index + 1) * size) for index, size in zip(place, tensor.chunk_shape, strict=True)
        )
        content = np.ascontiguousarray(values[inside]).view(np.uint8).data
        digest, file = chunk_digest(content), chunk_file(group, name, place)
        with file.open("rb") as opened:
            if chunk_digest(opened.read(content.nbytes)) != digest:
                raise OSError(f"{file} does not begin with the values that were written to it")
        yield digest
