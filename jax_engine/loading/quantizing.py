"""Weights of 8 bits made of wider ones while they are loaded: each where it lies, as soon as it is there."""

from collections.abc import Callable
from functools import cache

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_engine.loading.model_structure import ModelStructure, Parameter
from jax_engine.models.quantization import Quantization

Load = Callable[[Parameter, Sharding], jax.Array]


class Quantizer:
    """Quantizes what `load` gives for the weights of a structure. Mutable; owned by a load.

    A device holds its part of one weight (of as many as are loaded at once) in full width beside all that are quantized
    already. Scales are kept until they are asked for, which is to be after all weights.
    """

    def __init__(self, load: Load, structure: ModelStructure) -> None:
        assert structure.quantization is not None
        self._load = load
        self._quantization = structure.quantization
        self._scales: dict[str, jax.Array] = {}

    def __call__(self, parameter: Parameter, sharding: Sharding) -> jax.Array:
        """The array of one parameter, or of one layer's part."""
        if parameter.is_scale:
            return _mover(sharding)(self._scales.pop(parameter.name)).block_until_ready()
        values = self._load(parameter.unquantized, sharding)
        if parameter.unquantized_dtype is None:
            return values
        program = _program(self._quantization, parameter.num_in, sharding)
        weight, self._scales[parameter.scale_name] = program(values)
        return weight.block_until_ready()


@cache  # layers share their shapes
def _program(
    quantization: Quantization, num_in: int, sharding: Sharding
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Quantizes a weight that lies as `sharding` says; its scales come whole to every device."""
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding

    def quantize(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        return quantization.quantize(values, num_in)

    return jax.jit(quantize, out_shardings=(sharding, whole))


@cache
def _mover(sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda values: values, out_shardings=sharding)
