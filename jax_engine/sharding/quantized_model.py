"""How a model's weights are held in 8 bits, by the setting, by what its checkpoint stores, and by the device."""

import logging

import jax

from jax_engine.loading.model_structure import ModelStructure
from jax_engine.models.config import ModelConfig
from jax_engine.models.quantization import STORED_TYPES, Quantization, select_product
from jax_engine.sharding.sharding import Placement

logger = logging.getLogger(__name__)


def quantization_of(name: str | None, config: ModelConfig, device: jax.Device) -> Quantization | None:
    """How weights are held, by the setting and by what the checkpoint stores.

    Raises:
        ValueError: the two do not agree, or a model has other weights than of projections.
    """
    stored = config.quantization
    if stored is not None and name not in (None, stored.method):
        raise ValueError(
            f"quantization={name!r} does not fit the checkpoint, whose weights are stored as {stored.method}; leave it "
            f"out, or use the checkpoint in 16 bits"
        )
    if stored is None and name is not None and name not in STORED_TYPES:
        raise ValueError(
            f"quantization={name!r} is for checkpoints that are stored so, and this one is not quantized; leave it "
            f"out, or use {' or '.join(STORED_TYPES)}"
        )
    name = name if stored is None else stored.name
    if name is None:
        return None
    if config.experts is not None:
        raise ValueError(
            f"quantization={name!r} is for models without experts, whose products read the weights of all layers in "
            f"place, and {config.architecture} has some; "
            + ("leave it out" if stored is None else "use the checkpoint in 16 bits")
        )
    in_blocks = stored is not None and stored.block is not None
    product, reason = select_product(name, device, in_blocks=in_blocks)
    logger.info("quantization: %s", reason)
    return Quantization(name, product, stored)


def check_blocks(structure: ModelStructure, placement: Placement) -> None:
    """ValueError where devices would share the scale of a block."""
    for parameter in structure.parameters:
        parts = map(placement.weights.size_of, placement.weights.axes_of(parameter.logical_axes))
        uneven = [size for size, count in zip(parameter.shape, parts, strict=True) if size % count]
        if parameter.is_scale and uneven and placement.mesh is not None:
            raise ValueError(
                f"sharding strategy {placement.strategy!r} divides {parameter.name.removesuffix('_scale')} among "
                f"devices that do not divide its {uneven[0]} blocks of inputs, each of which has a scale; use fewer "
                "devices along each mesh axis"
            )
