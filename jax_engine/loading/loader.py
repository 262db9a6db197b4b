"""From a model folder to arrays on the devices, without a second copy of the model in host memory.

A model is split once, here, into what is static (`ModelStructure`) and a flat tuple of arrays. Whoever compiles a step
passes the arrays to the jitted function and merges inside it, which costs nothing at call time:

    structure = ModelStructure.of(model_class, config, ops=..., dtype=...)
    leaves = load_leaves(structure, path)
    step = jax.jit(lambda leaves, token_ids, ...: structure.merge(leaves)(token_ids, ...))
"""

import logging
import re
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from tqdm import tqdm

from jax_engine.config import LOAD_FORMATS
from jax_engine.loading.checkpoint_manifest import is_converted
from jax_engine.loading.kv_scale_files import SCALE_TENSORS
from jax_engine.loading.model_files import ModelLoadError, WeightFiles, listed, read_model_config, resolve_model_path
from jax_engine.loading.model_structure import ModelStructure, Parameter
from jax_engine.loading.orbax_reader import OrbaxTensors
from jax_engine.loading.quantizing import Quantizer
from jax_engine.loading.stacked_leaves import stack_layers
from jax_engine.loading.stored_scales import WEIGHT_TYPES, check_scale, file_name, read_scale
from jax_engine.models.config import ModelConfig, architecture_of
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.ops import Ops
from jax_engine.models.quantization import Quantization
from jax_engine.models.registry import resolve_model
from jax_engine.models.stored_quantization import StoredQuantization
from jax_engine.models.weights import Ranges
from jax_engine.sharding.widening import Spread

logger = logging.getLogger(__name__)

# Host memory holds about this many tensors at once; more threads did not read faster from local disks.
_NUM_READERS = 4
# Stored by some checkpoints though it is computed here, or, with tied embeddings, stored already.
_IGNORED_TENSORS = re.compile(rf"rotary_emb\.inv_freq$|^lm_head\.weight$|{SCALE_TENSORS}")
# The scales of rows that some quantized checkpoints have; here each row has its own.
_IGNORED_IF_QUANTIZED = re.compile(rf"{_IGNORED_TENSORS.pattern}|\.input_scale$")
_FLOATS: tuple[str, ...] = ("F64", "F32", "F16", "BF16")


def load_config(folder: Path) -> tuple[ModelConfig, type[LlamaForCausalLM]]:
    """What `config.json` of a model folder describes, and the class that runs it."""
    contents = read_model_config(folder)
    try:
        # The class first: the settings of an unknown architecture may have other names.
        model_class = resolve_model(architecture_of(contents))
        return ModelConfig.from_hf(contents), model_class
    except ValueError as error:
        raise ModelLoadError(f"{folder / 'config.json'}: {error}") from error


def load_model(
    path_or_name: str | Path | None,
    config: ModelConfig,
    *,
    model_class: type[LlamaForCausalLM],
    ops: Ops,
    dtype: DTypeLike,
    load_format: str = "auto",
    scan_layers: bool = False,
    quantization: Quantization | None = None,
    sharding_of: Callable[[Parameter], Sharding] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[ModelStructure, tuple[jax.Array, ...]]:
    """A model's structure, and its arrays as `load_leaves` gives them."""
    structure = ModelStructure.of(
        model_class, config, ops=ops, dtype=dtype, scan_layers=scan_layers, quantization=quantization
    )
    leaves = load_leaves(
        structure, path_or_name, load_format=load_format, sharding_of=sharding_of, seed=seed, progress=progress
    )
    return structure, leaves


def load_leaves(
    structure: ModelStructure,
    path_or_name: str | Path | None,
    *,
    load_format: str = "auto",
    sharding_of: Callable[[Parameter], Sharding] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[jax.Array, ...]:
    """Load a model's arrays, in the order of `structure.parameters`.

    `path_or_name` is a folder or a hub name (see `resolve_model_path`). It is not looked at by `load_format="dummy"`,
    which draws random weights from `seed`, the same ones however they are sharded. `sharding_of` places each parameter,
    by its `logical_axes`; by default all are on the first device. Those of adapters are zero, scales of a cache one.
    Weights of 8 bits are made of a checkpoint's, one after the other. `progress` shows a bar; None does so on a
    terminal.

    Raises:
        ModelLoadError: a file or tensor is missing, broken, of another shape or not expected.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} must be one of {', '.join(LOAD_FORMATS)}")
    sharding_of = sharding_of or (lambda _: SingleDeviceSharding(jax.devices()[0]))
    start = time.monotonic()
    read: _Draw | Reader = _Draw(seed)
    source, num_threads = f"random, seed {seed}", 1
    if load_format != "dummy":
        folder = resolve_model_path(path_or_name)
        read, source = reader_of(folder, structure, load_format), str(folder)
        num_threads = _NUM_READERS if jax.process_count() == 1 else 1  # several stack layers in the same order
    as_read = structure.quantization is None or (structure.is_stored_quantized and isinstance(read, Reader))
    load = read if as_read else Quantizer(read, structure)
    hidden = None if progress is None else not progress  # None: shown on a terminal only
    bar = tqdm(total=structure.num_bytes, desc="loading weights", unit="B", unit_scale=True, disable=hidden)

    def load_leaf(parameter: Parameter) -> jax.Array:
        if parameter.is_of_adapters or parameter.is_kv_scales:
            return _filled(parameter, parameter.mean, sharding_of(parameter))
        parts = parameter.parts
        of_part = sharding_of(parts[0])
        if parameter.part_names:
            shape, dtype, whole = parameter.shape, parameter.dtype, sharding_of(parameter)
            leaf = stack_layers(
                lambda layer, where: load(parts[layer], where), len(parts), shape, dtype, whole, of_layer=of_part
            )
        else:
            leaf = load(parameter, of_part)
        with bar.get_lock():
            bar.update(leaf.nbytes)
        return leaf

    with ThreadPoolExecutor(num_threads) as pool, bar:
        leaves: dict[Parameter, jax.Array] = {}
        for are_scales in (False, True):  # of weights that are loaded
            group = [parameter for parameter in structure.parameters if parameter.is_scale == are_scales]
            leaves |= zip(group, pool.map(load_leaf, group), strict=True)
    source += f", {read.num_bytes} bytes read" if isinstance(read, Reader) else ""
    logger.info("loaded %.2f GB of weights in %.1f s (%s)", structure.num_bytes / 1e9, time.monotonic() - start, source)
    return tuple(leaves[parameter] for parameter in structure.parameters)


def _filled(parameter: Parameter, value: float, sharding: Sharding) -> jax.Array:
    """An array of one value, made on each device by itself."""
    shape = sharding.shard_shape(parameter.shape)
    return jax.make_array_from_callback(parameter.shape, sharding, lambda _: np.full(shape, value, parameter.dtype))


def reader_of(folder: Path, structure: ModelStructure, load_format: str = "auto") -> "Reader":
    """What reads parameters from a folder, which is checked to hold exactly the model's; ModelLoadError as above."""
    if load_format == "orbax" or (load_format == "auto" and is_converted(folder)):
        return Reader(OrbaxTensors.open(folder, structure).part, is_merged=True)
    stored = structure.quantization.stored if structure.quantization is not None else None
    return Reader(partial(_read_part, _checked_files(folder, structure, stored), stored))


def _checked_files(folder: Path, structure: ModelStructure, stored: StoredQuantization | None) -> WeightFiles:
    """The folder's weight files, after checking that they hold exactly the model's tensors, in the right shapes."""
    files = WeightFiles.open(folder)
    parts = (part for parameter in structure.stored for part in parameter.parts)
    expected = {file_name(tensor, stored): tensor for part in parts for tensor in part.tensors}
    missing = sorted(expected.keys() - files.names)
    if missing:
        raise ModelLoadError(
            f"the weights in {folder} lack {len(missing)} tensors that config.json calls for: {listed(missing)}; "
            "config.json and weights are of different models, or a weight file is missing: download the folder again"
        )
    ignored = _IGNORED_TENSORS if stored is None else _IGNORED_IF_QUANTIZED
    extra = sorted(name for name in files.names - expected.keys() if not ignored.search(name))
    if extra:
        raise ModelLoadError(
            f"the weights in {folder} hold {len(extra)} tensors that config.json does not call for: {listed(extra)}; "
            "config.json and weights are of different models: download the folder again"
        )
    for name, parameter in expected.items():
        tensor = files.tensor(name)
        if stored is not None and parameter.is_scale:
            check_scale(files, parameter, stored, folder)
            continue
        shape, found = list(parameter.layout.stored_shape(parameter.base_shape)), tensor.get_shape()
        if found != shape:
            raise ModelLoadError(
                f"tensor {name} in {folder / files.file_of(name)} has shape {found}, config.json makes it {shape}; "
                "config.json and weights are of different models: download the folder again"
            )
        allowed, remedy = _FLOATS, "use an unquantized checkpoint"
        if stored is not None and parameter.unquantized_dtype is not None:
            allowed, remedy = (WEIGHT_TYPES[stored.name],), "config.json and weights do not agree"
        if tensor.get_dtype() not in allowed:
            raise ModelLoadError(
                f"tensor {name} in {folder / files.file_of(name)} is stored as {tensor.get_dtype()}; supported are "
                f"{', '.join(allowed)}: {remedy}"
            )
    return files


def _read_part(
    files: WeightFiles, stored: StoredQuantization | None, parameter: Parameter, ranges: Ranges
) -> np.ndarray[Any, Any]:
    if stored is not None and parameter.is_scale:
        return read_scale(files, parameter, stored, ranges)
    layout, shape = parameter.layout, parameter.base_shape
    block = files.tensor(parameter.name)[tuple(slice(*bounds) for bounds in layout.stored_ranges(shape, ranges))]
    if stored is not None and parameter.unquantized_dtype is not None:
        block = block.view(parameter.dtype)
    return layout.arrange(block, shape, ranges)


class Reader:
    """Reads parameters, each device's part by itself, converted to the model's dtype on the way. Mutable; owned by a
    load.

    `part` reads what is one tensor, at `ranges` of its `base_shape`; `is_merged`: what is of all experts is one.
    """

    def __init__(self, part: Callable[[Parameter, Ranges], np.ndarray[Any, Any]], *, is_merged: bool = False) -> None:
        self._part = part
        self._is_merged = is_merged
        self.num_bytes = 0  # that were asked for
        self._counting = threading.Lock()

    def __call__(self, parameter: Parameter, sharding: Sharding) -> jax.Array:
        shape, tensors = parameter.shape, (parameter,) if self._is_merged else parameter.tensors

        @cache  # devices that hold the same part share one read
        def part(ranges: Ranges) -> np.ndarray[Any, Any]:
            if len(tensors[0].shape) == len(shape):
                return self._widened(parameter, ranges)
            values = np.empty([stop - start for start, stop in ranges], parameter.dtype)
            for place, tensor in enumerate(tensors[slice(*ranges[0])]):
                values[place] = self._widened(tensor, ranges[1:])
            return values

        def callback(index: tuple[slice, ...] | None) -> np.ndarray[Any, Any]:
            whole = tuple(slice(None) for _ in shape) if index is None else index
            return part(tuple(piece.indices(size)[:2] for piece, size in zip(whole, shape, strict=True)))

        # Wait for the copy: host memory must not fill with blocks that are still on their way to a device.
        return jax.make_array_from_callback(shape, sharding, callback).block_until_ready()

    def _widened(self, parameter: Parameter, ranges: Ranges) -> np.ndarray[Any, Any]:
        """A part of what is one tensor."""
        pairs = list(zip(ranges, parameter.spreads, strict=True))
        values = self._part(parameter, tuple(spread.stored_range(*bounds) for bounds, spread in pairs))
        with self._counting:
            self.num_bytes += values.nbytes
        for axis, (bounds, spread) in enumerate(pairs):
            values = spread.fill(values, axis, *bounds)
        return values.astype(parameter.dtype, copy=False)


class _Draw:
    """Draws random parameters on their devices, by the distributions that the model states; equal for equal seeds."""

    def __init__(self, seed: int):
        self._key = jax.random.key(seed)

    def __call__(self, parameter: Parameter, sharding: Sharding) -> jax.Array:
        if not parameter.std:  # norms and biases
            return _filled(parameter, parameter.mean, sharding)
        key = jax.random.fold_in(self._key, zlib.crc32(parameter.name.encode()))
        program = _normal_program(parameter.base_shape, parameter.spreads, parameter.dtype, sharding)
        return program(key, parameter.mean, parameter.std).block_until_ready()


@cache  # layers share their shapes, so a model of any depth compiles a handful
def _normal_program(
    shape: tuple[int, ...], spreads: tuple[Spread, ...], dtype: np.dtype[Any], sharding: Sharding
) -> Callable[[jax.Array, float, float], jax.Array]:
    """A program that draws an array of normally distributed values, from a key, their mean and their deviation."""

    def draw(key: jax.Array, mean: float, std: float) -> jax.Array:
        values = (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        for axis, spread in enumerate(spreads):
            values = spread.widen(values, axis)
        return values

    return jax.jit(draw, out_shardings=sharding)
