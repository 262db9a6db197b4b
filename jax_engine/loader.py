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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from tqdm import tqdm

from jax_engine.model_files import ModelLoadError, WeightFiles, read_model_config, resolve_model_path
from jax_engine.models.adapters import AdapterShape
from jax_engine.models.config import ModelConfig, architecture_of
from jax_engine.models.layers import add_adapters
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.ops import Ops
from jax_engine.models.registry import resolve_model
from jax_engine.models.weights import Layout, Ranges, layout_of, stored_name
from jax_engine.stacked_leaves import stack_layers

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "dummy")
# Host memory holds about this many tensors at once; more threads did not read faster from local disks.
_NUM_READERS = 4
# Stored by some checkpoints though it is computed here, or, with tied embeddings, stored already.
_IGNORED_TENSORS = re.compile(r"rotary_emb\.inv_freq$|^lm_head\.weight$")
_FLOATS = ("F64", "F32", "F16", "BF16")
# How many names an error lists.
_NUM_LISTED = 5


@dataclass(frozen=True)
class Parameter:
    """One leaf of a model: its name (the checkpoint's), its array, and the distribution of a random value.

    The leaf of stacked layers (first axis `layers`) is made of as many parts as it has layers. A `*` in the name stands
    for the number of an expert: a part is made of a tensor for each (first axis `experts`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    logical_axes: tuple[str, ...]
    layout: Layout  # of each tensor
    copies: tuple[int, ...]  # how often each entry of a dimension is held, side by side, where a checkpoint has one
    mean: float
    std: float
    part_names: tuple[str, ...] = ()  # of stacked layers: the name of each

    @property
    def is_of_adapters(self) -> bool:
        """Whether it holds factors of adapters, which no checkpoint of the model has."""
        return "adapters" in self.logical_axes

    @property
    def num_bytes(self) -> int:
        """Size of the array."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def parts(self) -> tuple["Parameter", ...]:
        """The parameters of a layer each; itself, unless layers are stacked."""
        return tuple(map(self._entry, self.part_names)) or (self,)

    @property
    def tensors(self) -> tuple["Parameter", ...]:
        """Of a part, the parameters that are a tensor each; itself, unless it is of all experts."""
        if "*" not in self.name:
            return (self,)
        return tuple(self._entry(self.name.replace("*", str(expert))) for expert in range(self.shape[0]))

    def _entry(self, name: str) -> "Parameter":
        """One entry of the first dimension."""
        shape, axes, copies = self.shape[1:], self.logical_axes[1:], self.copies[1:]
        return replace(self, name=name, shape=shape, logical_axes=axes, copies=copies, part_names=())

    @property
    def base_shape(self) -> tuple[int, ...]:
        """The shape without the copies."""
        return tuple(size // copies for size, copies in zip(self.shape, self.copies, strict=True))


@dataclass(frozen=True)
class ModelStructure:
    """A model without its weights: hashable, made without allocating any."""

    graphdef: nnx.GraphDef[LlamaForCausalLM]
    treedef: jax.tree_util.PyTreeDef
    parameters: tuple[Parameter, ...]

    @classmethod
    def of(
        cls,
        model_class: type[LlamaForCausalLM],
        config: ModelConfig,
        *,
        ops: Ops,
        dtype: DTypeLike,
        scan_layers: bool = False,
        kv_head_copies: int = 1,
        adapters: AdapterShape | None = None,
    ) -> "ModelStructure":
        """The structure of `model_class` for `config`, every parameter in `dtype`.

        `scan_layers` stacks the parameters of like layers and runs them as a loop. With `kv_head_copies`, each key and
        value head is there that many times, side by side, so that more devices than it has heads hold one each. With
        `adapters`, there is room for so many beside the weights.
        """
        heads = config.num_key_value_heads * kv_head_copies
        config = replace(config, num_key_value_heads=heads)

        def build() -> LlamaForCausalLM:
            model = model_class(config, ops=ops, dtype=dtype, rngs=None, scan_layers=scan_layers)
            if adapters is not None:
                add_adapters(model, adapters)
            return model

        model = nnx.eval_shape(build)
        graphdef, state = nnx.split(model)
        parameters = []
        for path, variable in nnx.to_flat_state(state):
            metadata, leaf = variable.get_metadata(), variable.get_value()
            axes: tuple[str, ...] = metadata["logical_axes"]
            layers: tuple[int, ...] = metadata["layers"] or ()
            is_stack = axes[:1] == ("layers",)
            names = [_stored_name(path, layer, model_class) for layer in layers or (None,)]
            num_stacked = is_stack + ("*" in names[0])
            parameters.append(
                Parameter(
                    name=_stored_name(path, f"{layers[0]}..{layers[-1]}", model_class) if is_stack else names[0],
                    shape=leaf.shape,
                    dtype=leaf.dtype,
                    logical_axes=axes,
                    layout=layout_of(_own_name(path, None), len(axes) - num_stacked, model_class.HF_WEIGHTS),
                    copies=tuple(kv_head_copies if axis == "kv_heads" else 1 for axis in axes),
                    mean=metadata["init_mean"],
                    std=metadata["init_std"],
                    part_names=tuple(names) if is_stack else (),
                )
            )
        return cls(graphdef, jax.tree.structure(state), tuple(parameters))

    def merge(self, leaves: Sequence[jax.Array]) -> LlamaForCausalLM:
        """The model with `leaves`, in the order of `parameters`; call it while tracing."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))

    @property
    def num_bytes(self) -> int:
        """Memory of the weights, without that of adapters."""
        return sum(parameter.num_bytes for parameter in self.parameters if not parameter.is_of_adapters)

    @property
    def adapter_bytes(self) -> int:
        """Memory of all adapters that there is room for."""
        return sum(parameter.num_bytes for parameter in self.parameters if parameter.is_of_adapters)


def _stored_name(path: Sequence[object], layer: int | str | None, model_class: type[LlamaForCausalLM]) -> str:
    """A checkpoint's name for the parameter at `path`."""
    return stored_name(_own_name(path, layer), model_class.HF_WEIGHTS)


def _own_name(path: Sequence[object], layer: int | str | None) -> str:
    """A parameter's name in the model, where the first number of `path` is the place of a layer among the modules."""
    place = next((index for index, key in enumerate(path) if isinstance(key, int)), None)
    return ".".join(str(layer if index == place else key) for index, key in enumerate(path))


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
    sharding_of: Callable[[Parameter], Sharding] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[ModelStructure, tuple[jax.Array, ...]]:
    """A model's structure, and its arrays as `load_leaves` gives them."""
    structure = ModelStructure.of(model_class, config, ops=ops, dtype=dtype, scan_layers=scan_layers)
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
    by its `logical_axes`; by default all are on the first device. Those of adapters are zero. `progress` shows a bar;
    None does so on a terminal.

    Raises:
        ModelLoadError: a file or tensor is missing, broken, of another shape or not expected.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format={load_format!r} must be one of {', '.join(LOAD_FORMATS)}")
    sharding_of = sharding_of or (lambda _: SingleDeviceSharding(jax.devices()[0]))
    start = time.monotonic()
    load: _Draw | _Read = _Draw(seed)
    source, num_threads = f"random, seed {seed}", 1
    if load_format != "dummy":
        folder = resolve_model_path(path_or_name)
        load, source = _Read(_checked_files(folder, structure)), str(folder)
        num_threads = _NUM_READERS if jax.process_count() == 1 else 1  # several stack layers in the same order
    hidden = None if progress is None else not progress  # None: shown on a terminal only
    bar = tqdm(total=structure.num_bytes, desc="loading weights", unit="B", unit_scale=True, disable=hidden)

    def load_leaf(parameter: Parameter) -> jax.Array:
        if parameter.is_of_adapters:
            return _filled(parameter, 0, sharding_of(parameter))
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
        leaves = tuple(pool.map(load_leaf, structure.parameters))
    source += f", {load.num_bytes} bytes read" if isinstance(load, _Read) else ""
    logger.info("loaded %.2f GB of weights in %.1f s (%s)", structure.num_bytes / 1e9, time.monotonic() - start, source)
    return leaves


def _filled(parameter: Parameter, value: float, sharding: Sharding) -> jax.Array:
    """An array of one value, made on each device by itself."""
    shape = sharding.shard_shape(parameter.shape)
    return jax.make_array_from_callback(parameter.shape, sharding, lambda _: np.full(shape, value, parameter.dtype))


def _checked_files(folder: Path, structure: ModelStructure) -> WeightFiles:
    """The folder's weight files, after checking that they hold exactly the model's tensors, in the right shapes."""
    files = WeightFiles.open(folder)
    own = (parameter for parameter in structure.parameters if not parameter.is_of_adapters)
    expected = {tensor.name: tensor for parameter in own for part in parameter.parts for tensor in part.tensors}
    missing = sorted(expected.keys() - files.names)
    if missing:
        raise ModelLoadError(
            f"the weights in {folder} lack {len(missing)} tensors that config.json calls for: {_listed(missing)}; "
            "config.json and weights are of different models, or a weight file is missing: download the folder again"
        )
    extra = sorted(name for name in files.names - expected.keys() if not _IGNORED_TENSORS.search(name))
    if extra:
        raise ModelLoadError(
            f"the weights in {folder} hold {len(extra)} tensors that config.json does not call for: {_listed(extra)}; "
            "config.json and weights are of different models: download the folder again"
        )
    for name, parameter in expected.items():
        tensor = files.tensor(name)
        shape, stored = list(parameter.layout.stored_shape(parameter.base_shape)), tensor.get_shape()
        if stored != shape:
            raise ModelLoadError(
                f"tensor {name} in {folder / files.file_of(name)} has shape {stored}, config.json makes it {shape}; "
                "config.json and weights are of different models: download the folder again"
            )
        if tensor.get_dtype() not in _FLOATS:
            raise ModelLoadError(
                f"tensor {name} in {folder / files.file_of(name)} is stored as {tensor.get_dtype()}; supported are "
                f"{', '.join(_FLOATS)}: use an unquantized checkpoint"
            )
    return files


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NUM_LISTED]) + (", ..." if len(names) > _NUM_LISTED else "")


class _Read:
    """Reads parameters from files, each device's part by itself, in the model's dtype. Mutable; owned by a load."""

    def __init__(self, files: WeightFiles) -> None:
        self.files = files
        self.num_bytes = 0  # that were read
        self._counting = threading.Lock()

    def __call__(self, parameter: Parameter, sharding: Sharding) -> jax.Array:
        shape, tensors = parameter.shape, parameter.tensors

        @cache  # devices that hold the same part share one read
        def part(ranges: Ranges) -> np.ndarray[Any, Any]:
            if len(tensors[0].shape) == len(shape):
                return self._part(parameter, ranges)
            values = np.empty([stop - start for start, stop in ranges], parameter.dtype)
            for place, tensor in enumerate(tensors[slice(*ranges[0])]):
                values[place] = self._part(tensor, ranges[1:])
            return values

        def callback(index: tuple[slice, ...] | None) -> np.ndarray[Any, Any]:
            whole = tuple(slice(None) for _ in shape) if index is None else index
            return part(tuple(piece.indices(size)[:2] for piece, size in zip(whole, shape, strict=True)))

        # Wait for the copy: host memory must not fill with blocks that are still on their way to a device.
        return jax.make_array_from_callback(shape, sharding, callback).block_until_ready()

    def _part(self, parameter: Parameter, ranges: Ranges) -> np.ndarray[Any, Any]:
        """A part of what is one tensor."""
        tensor, layout = self.files.tensor(parameter.name), parameter.layout
        pairs = list(zip(ranges, parameter.copies, strict=True))
        once = tuple((start // copies, -(-stop // copies)) for (start, stop), copies in pairs)
        block = tensor[tuple(slice(*bounds) for bounds in layout.stored_ranges(parameter.base_shape, once))]
        with self._counting:
            self.num_bytes += block.nbytes
        values = layout.arrange(block, parameter.base_shape, once)
        for axis, ((start, stop), copies) in enumerate(pairs):
            if copies > 1:
                values = values.take([place // copies - start // copies for place in range(start, stop)], axis)
        return values.astype(parameter.dtype, copy=False)


class _Draw:
    """Draws random parameters on their devices, by the distributions that the model states; equal for equal seeds."""

    def __init__(self, seed: int):
        self._key = jax.random.key(seed)

    def __call__(self, parameter: Parameter, sharding: Sharding) -> jax.Array:
        if not parameter.std:  # norms and biases
            return _filled(parameter, parameter.mean, sharding)
        key = jax.random.fold_in(self._key, zlib.crc32(parameter.name.encode()))
        program = _normal_program(parameter.base_shape, parameter.copies, parameter.dtype, sharding)
        return program(key, parameter.mean, parameter.std).block_until_ready()


@cache  # layers share their shapes, so a model of any depth compiles a handful
def _normal_program(
    shape: tuple[int, ...], copies: tuple[int, ...], dtype: np.dtype[Any], sharding: Sharding
) -> Callable[[jax.Array, float, float], jax.Array]:
    """A program that draws an array of normally distributed values, from a key, their mean and their deviation."""

    def draw(key: jax.Array, mean: float, std: float) -> jax.Array:
        values = (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
        for axis, count in enumerate(copies):
            values = jnp.repeat(values, count, axis) if count > 1 else values
        return values

    return jax.jit(draw, out_shardings=sharding)
