"""Weights of 8 bits: how they are stored, and which operation multiplies with them.

The projections of a decoder's layers have them, as in vLLM; embeddings, head, norms and routers do not.
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jax_engine.cuda_fallback.quantized_product import narrow_product, quantize, wide_product

STORED_TYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}  # types of stored weights, by vLLM's names
# TPUs that multiply integers of 8 bits twice as fast as bfloat16, and those that do so with e4m3 (Google Cloud's pages
# on each), by JAX's names.
_INT8_TPUS = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite")
_FP8_TPUS = ("TPU7x",)
_INT8_CAPABILITY, _FP8_CAPABILITY = (8, 0), (8, 9)  # the first GPUs with such tensor cores


class QuantizedProduct(Protocol):
    """A product with a weight of 8 bits (`reference.quantized_product`), given out in `dtype`."""

    def __call__(
        self, x: Float[Array, "T ..."], weight: Num[Array, "..."], scale: Float[Array, "..."], *, dtype: DTypeLike
    ) -> Float[Array, "T ..."]: ...


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model's projections are held: 8-bit numbers and a float32 scale for each output."""

    name: str  # of `STORED_TYPES`
    product: QuantizedProduct = wide_product

    @property
    def dtype(self) -> jnp.dtype:
        """What weights are stored in."""
        return jnp.dtype(STORED_TYPES[self.name])

    def quantize(self, values: Float[Array, "..."], num_in: int) -> tuple[Num[Array, "..."], Float[Array, "..."]]:
        """A weight [*in, *out] and its scales [*out]."""
        return quantize(values, self.dtype, axes=tuple(range(num_in)))


def select_product(name: str, device: jax.Device) -> tuple[QuantizedProduct, str]:
    """The product for `quantization` on a device, which need not be here, and the reason in one sentence.

    Rows are multiplied as 8-bit numbers where the device does that natively and faster than it multiplies its own
    types; elsewhere as they are, which saves memory and its bandwidth.
    """
    kind = device.device_kind
    if device.platform == "cpu":
        is_narrow = name == "int8"
        kind = "a CPU"
    elif device.platform == "tpu":
        is_narrow = kind in (_INT8_TPUS if name == "int8" else _FP8_TPUS)
    else:
        least = _INT8_CAPABILITY if name == "int8" else _FP8_CAPABILITY
        is_narrow = tuple(map(int, str(device.compute_capability).split("."))) >= least
    if is_narrow:
        return narrow_product, f"{name} weights; {kind} multiplies them by rows that are brought to {name} one by one"
    return wide_product, f"{name} weights alone; {kind} has no fast products of {name}, so rows stay as they are"
