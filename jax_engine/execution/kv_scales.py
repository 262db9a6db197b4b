"""A model's weights with the scales of its 8-bit cache: a checkpoint's, those that are measured here, or all one.

They are leaves like others, settled whenever weights are read and never changed after that, so that a page means the
same as long as it is kept.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jax_engine.config import EngineConfig
from jax_engine.execution.kv_measuring import measure_kv
from jax_engine.loading.kv_scale_files import arranged_kv_scales, stored_kv_scales
from jax_engine.loading.loader import load_leaves
from jax_engine.loading.model_structure import Parameter
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_scales import is_quantized
from jax_engine.sharding.placed_model import PlacedModel

logger = logging.getLogger(__name__)

Leaves = tuple[jax.Array, ...]
Scales = NDArray[np.float32]  # [layers, 2, kv heads]

# Room above the largest measured value. Floats lose nothing by it, whole numbers do.
FLOAT_ROOM, INTEGER_ROOM = 2.0, 1.25


def load_weights(placed: PlacedModel, model: ModelConfig, folder: Path, config: EngineConfig) -> Leaves:
    """The leaves of a model, read from its folder or drawn, with the scales of its cache.

    Raises:
        ModelLoadError: as `load_leaves`; or the checkpoint's scales are not such.
    """
    leaves = load_leaves(
        placed.structure, folder, load_format=config.load_format, sharding_of=placed.sharding_of, seed=config.seed
    )
    if placed.measuring is not None:
        measured = _scales_for(measure_kv(placed, placed.measuring, model, leaves), placed.geometry.dtype)
        return _with_scales(placed, leaves, lambda _: measured)
    stored = {} if config.load_format == "dummy" else stored_kv_scales(folder)
    if not is_quantized(placed.geometry.dtype):
        if stored:
            logger.info("the checkpoint has scales for an fp8 cache, which kv_cache_dtype='fp8' would use")
        return leaves
    if not stored:
        logger.warning(
            "kv_cache_dtype=%r, and %s has no scales for it: they are 1, and keys and values beyond %g are clipped to "
            "that; calculate_kv_scales=True measures scales at start",
            config.kv_cache_dtype,
            folder,
            _largest_number(placed.geometry.dtype),
        )
        return leaves
    logger.info("KV scales: of the checkpoint, %d tensors", len(stored))

    def of_checkpoint(parameter: Parameter) -> Scales:
        heads, layers = parameter.spreads[-1], model.num_hidden_layers
        scales = arranged_kv_scales(stored, num_layers=layers, num_heads=heads.stored, folder=folder)
        return heads.fill(scales, 2, 0, parameter.shape[-1])

    return _with_scales(placed, leaves, of_checkpoint)


def _scales_for(largest: Scales, dtype: np.dtype) -> Scales:
    """Scales by which values so large keep some room in a page's type."""
    room = INTEGER_ROOM if jnp.issubdtype(dtype, jnp.integer) else FLOAT_ROOM
    logger.info(
        "KV scales: measured; keys reach %.3g and values %.3g, and there is room for %g times as much",
        np.max(largest[:, 0]),
        np.max(largest[:, 1]),
        room,
    )
    return np.where(largest > 0, largest * (room / _largest_number(dtype)), 1).astype(np.float32)


def _largest_number(dtype: np.dtype) -> float:
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def _with_scales(placed: PlacedModel, leaves: Leaves, scales_of: Callable[[Parameter], Scales]) -> Leaves:
    """The leaves with scales in theirs; layers that no checkpoint has keep 1."""
    changed = list(leaves)
    for place, parameter in enumerate(placed.structure.parameters):
        if parameter.is_kv_scales:
            scales, values = scales_of(parameter), np.ones(parameter.shape, np.float32)
            for number, part in enumerate(parameter.parts):
                (values[number] if parameter.part_names else values)[...] = scales[_layer_of(part)]
            changed[place] = _on_devices(values, placed.sharding_of(parameter))
    return tuple(changed)


def _layer_of(part: Parameter) -> int:
    found = re.search(r"\d+", part.name)
    assert found is not None
    return int(found[0])


def _on_devices(values: NDArray[np.float32], sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
