"""Weights of 8 bits: how they are stored, and which operation multiplies with them.

The projections of a decoder's layers have them, as in vLLM; embeddings, head, norms and routers do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from jax_engine.cuda_fallback.quantized_product import GroupedProduct, narrow_product, quantize, wide_product
from jax_engine.models.stored_quantization import StoredQuantization

STORED_TYPES = {"fp8": "float8_e4m3fn", "int8": "int8"}  # types of stored weights, by vLLM's names
# TPUs that multiply integers of 8 bits twice as fast as bfloat16, and those that do so with e4m3 (Google Cloud's pages
# on each), by JAX's names.
_INT8_TPUS = ("TPU v5 lite", "TPU v5", "TPU v5p", "TPU v6 lite")
_FP8_TPUS = ("TPU7x",)
_INT8_CAPABILITY, _FP8_CAPABILITY = (8, 0), (8, 9)  # the first GPUs with such tensor cores
# Rows that are multiplied group by group where products are written out (see `GroupedProduct`): of 64 rows and
# groups of 128 inputs, they are as many bytes as the widened weight.
MOST_GROUPED_ROWS = 64


class QuantizedProduct(Protocol):
    """A product with a weight of 8 bits (`reference.quantized_product`), given out in `dtype`."""

    def __call__(
        self, x: Float[Array, "T ..."], weight: Num[Array, "..."], scale: Float[Array, "..."], *, dtype: DTypeLike
    ) -> Float[Array, "T ..."]: ...


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model's projections are held: 8-bit numbers, and float32 scales.

    A weight [*in, *out] has scales [*out]. Where a checkpoint has a scale for each block, they are [*in', *out], and
    in' is `in` with groups of inputs for its last dimension.
    """

    name: str  # of `STORED_TYPES`
    product: QuantizedProduct = wide_product
    stored: StoredQuantization | None = None  # as a checkpoint has them; None: they are made of wider ones

    @property
    def dtype(self) -> jnp.dtype:
        """What weights are stored in."""
        return jnp.dtype(STORED_TYPES[self.name])

    def group_size(self, last_input: int) -> int | None:
        """How many neighbours in the last dimension of inputs share a scale; None: all inputs do."""
        block = None if self.stored is None else self.stored.block
        return None if block is None else gcd(block[1], last_input)

    def scale_shape(self, sizes: tuple[int, ...], num_in: int) -> tuple[int, ...]:
        """The scales' shape, of a weight of these sizes."""
        group = self.group_size(sizes[num_in - 1])
        return sizes[num_in:] if group is None else (*sizes[: num_in - 1], sizes[num_in - 1] // group, *sizes[num_in:])

    def quantize(self, values: Float[Array, "..."], num_in: int) -> tuple[Num[Array, "..."], Float[Array, "..."]]:
        """A weight [*in, *out] and its scales."""
        sizes = values.shape
        group = self.group_size(sizes[num_in - 1])
        if group is None:
            return quantize(values, self.dtype, axes=tuple(range(num_in)))
        grouped = values.reshape(*sizes[: num_in - 1], -1, group, *sizes[num_in:])
        stored, scale = quantize(grouped, self.dtype, axes=(num_in,))
        return stored.reshape(sizes), scale

    def keeps(self, modules: Sequence[str]) -> bool:
        """Whether modules that share a program stay as they are.

        Raises:
            ValueError: some do and some do not.
        """
        ignored = [self.stored is not None and self.stored.is_ignored(module) for module in modules]
        if len(set(ignored)) > 1:
            raise ValueError(
                f"quantization_config leaves {modules[ignored.index(True)]} as it is and not "
                f"{modules[ignored.index(False)]}, and layers that run as one loop must be alike; use "
                "scan_layers=False (and pipeline_parallel_size=1)"
            )
        return ignored[0]


def select_product(name: str, device: jax.Device, *, in_blocks: bool = False) -> tuple[QuantizedProduct, str]:
    """The product for `quantization` on a device, which need not be here, and the reason in one sentence.

    Rows are multiplied as 8-bit numbers where the device does that natively and faster than it multiplies its own
    types; elsewhere as they are, which saves memory and its bandwidth. So they are where blocks have scales.
    """
    kind = device.device_kind
    if in_blocks:
        most_rows = None if device.platform == "tpu" else MOST_GROUPED_ROWS
        return GroupedProduct(most_rows), f"{name} weights alone, as stored: a scale for each block"
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
