"""The scales of a checkpoint that is quantized already, as its parameters have them."""

from pathlib import Path
from typing import Any

import numpy as np

from jax_engine.loading.model_files import ModelLoadError, WeightFiles
from jax_engine.loading.model_structure import Parameter
from jax_engine.models.stored_quantization import StoredQuantization
from jax_engine.models.weights import Ranges

WEIGHT_TYPES = {"fp8": "F8_E4M3", "int8": "I8"}  # safetensors' names


def file_name(parameter: Parameter, stored: StoredQuantization | None) -> str:
    """The name of a parameter's tensor in the files."""
    if stored is None or not parameter.is_scale:
        return parameter.name
    return f"{_module(parameter)}.{stored.scale}"


def check_scale(files: WeightFiles, parameter: Parameter, stored: StoredQuantization, folder: Path) -> None:
    """ModelLoadError unless a scale is of a shape that `config.json` allows."""
    name, outputs = file_name(parameter, stored), parameter.layout.stored_shape(parameter.base_shape)[0]
    allowed = [[], [1], [outputs], [outputs, 1]]
    if stored.block is not None:
        sizes = files.tensor(f"{_module(parameter)}.weight").get_shape()
        allowed = [[-(-size // block) for size, block in zip(sizes, stored.block, strict=True)]]
    if (shape := files.tensor(name).get_shape()) not in allowed:
        raise ModelLoadError(
            f"tensor {name} in {folder / files.file_of(name)} has shape {shape}, config.json makes it "
            f"{' or '.join(map(str, allowed))}; download the folder again"
        )


def read_scale(
    files: WeightFiles, parameter: Parameter, stored: StoredQuantization, ranges: Ranges
) -> np.ndarray[Any, Any]:
    """A scale at `ranges` of its `base_shape`, each entry of a block its own."""
    values = np.asarray(files.tensor(file_name(parameter, stored))[...]).astype(np.float32)
    shape = parameter.base_shape
    whole = parameter.layout.stored_shape(shape)
    if stored.block is None:
        values = np.broadcast_to(values.reshape(-1), whole)
    else:
        outputs, inputs = files.tensor(f"{_module(parameter)}.weight").get_shape()
        in_group = inputs // whole[1]
        values = values.repeat(stored.block[0], 0)[:outputs].repeat(stored.block[1] // in_group, 1)[:, : whole[1]]
    block = values[tuple(slice(*bounds) for bounds in parameter.layout.stored_ranges(shape, ranges))]
    return parameter.layout.arrange(block, shape, ranges)


def _module(parameter: Parameter) -> str:
    return parameter.name.removesuffix(".weight_scale")
