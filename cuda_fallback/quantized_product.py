"""Products with weights of 8 bits in XLA operations. Specified by `pallas_kernels.reference.quantized_product`.

Nothing is written out wider than it is stored: with a scale for each output, XLA's compilers for TPUs and GPUs read the
8-bit weight within the product, and the scales come after it. (On a CPU, `wide_product` widens one weight at a time.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

# XLA:CPU does a product of one row of integers number by number, which took eight times as long as one of two rows.
_MIN_INTEGER_ROWS = 2


def wide_product(
    x: Float[Array, "T ..."], weight: Num[Array, "..."], scale: Float[Array, "..."], *, dtype: DTypeLike
) -> Float[Array, "T ..."]:
    """Rows as they are, and the weight, which has a scale for each output, widened to their type within the product."""
    num_in, sum_dtype = x.ndim - 1, _sum_dtype(x, dtype)
    out = jnp.tensordot(x, weight.astype(x.dtype), num_in, preferred_element_type=sum_dtype)
    return (out.astype(jnp.float32) * scale).astype(dtype)


def narrow_product(
    x: Float[Array, "T ..."], weight: Num[Array, "..."], scale: Float[Array, "..."], *, dtype: DTypeLike
) -> Float[Array, "T ..."]:
    """Rows brought to the weight's type, each by a scale of its own, and multiplied as 8-bit numbers.

    The weight has a scale for each output. Products of integers are exact, whatever the order of their sums.
    """
    num_in, num_rows, is_integer = x.ndim - 1, x.shape[0], weight.dtype == jnp.int8
    rows, row_scale = quantize(x, weight.dtype, axes=tuple(range(1, x.ndim)))
    if is_integer and num_rows < _MIN_INTEGER_ROWS:
        rows = jnp.pad(rows, ((0, _MIN_INTEGER_ROWS - num_rows), *((0, 0),) * num_in))
    sum_dtype = jnp.dtype(jnp.int32) if is_integer else _sum_dtype(x, dtype)
    out = jnp.tensordot(rows, weight, num_in, preferred_element_type=sum_dtype)[:num_rows]
    row_scale = row_scale.reshape(num_rows, *(1,) * (weight.ndim - num_in))
    return (out.astype(jnp.float32) * (row_scale * scale)).astype(dtype)


def quantize(
    values: Float[Array, "..."], dtype: DTypeLike, axes: Sequence[int]
) -> tuple[Num[Array, "..."], Float[Array, "..."]]:
    """Values as 8-bit numbers of `dtype` (int8 or e4m3), and the float32 scales that bring them back, one for all that
    lie along `axes`: what is largest of them becomes the type's largest number.

    What is not finite makes its scale so.
    """
    is_integer = jnp.dtype(dtype) == jnp.int8
    top = float(jnp.iinfo(jnp.int8).max if is_integer else jnp.finfo(dtype).max)
    wide = values.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scale = jnp.where(most == 0, 1, most / top)
    stored = wide / scale
    return (jnp.round(stored) if is_integer else stored).astype(dtype), jnp.squeeze(scale, axes)


def _sum_dtype(x: Float[Array, "..."], dtype: DTypeLike) -> Any:
    """What products are given out in before their scales: partial ones, which devices add up, travel in it. Of 16 bits
    bfloat16 alone holds them, however large weights are without their scales.
    """
    is_narrow = x.dtype == jnp.bfloat16 and jnp.dtype(dtype) == jnp.bfloat16
    return jnp.dtype(jnp.bfloat16 if is_narrow else jnp.float32)


@dataclass(frozen=True)
class GroupedProduct:
    """Rows as they are, and a weight with a scale for each group of inputs.

    Up to `most_rows` are multiplied with each group by itself, and scales come after that: a compiler that fuses the
    sum over groups reads the 8-bit weight alone; one that does not writes all the products out, in float32. For more
    rows, the weight is widened and written out instead.
    """

    most_rows: int | None  # None: all

    def __call__(
        self, x: Float[Array, "T ..."], weight: Num[Array, "..."], scale: Float[Array, "..."], *, dtype: DTypeLike
    ) -> Float[Array, "T ..."]:
        num_in, num_rows = x.ndim - 1, x.shape[0]
        groups, outputs = scale.shape[:num_in], weight.shape[num_in:]
        size = weight.shape[num_in - 1] // groups[-1]
        by_group = weight.reshape(*groups, size, *outputs)
        if self.most_rows is not None and num_rows > self.most_rows:
            wide = by_group.astype(jnp.float32) * jnp.expand_dims(scale, num_in)
            wide = wide.reshape(weight.shape).astype(x.dtype)
            return jnp.tensordot(x, wide, num_in, preferred_element_type=dtype)
        rows = x.reshape(num_rows, *groups, size)
        group_axes = tuple(range(num_in))
        dimensions = (((num_in + 1,), (num_in,)), (tuple(axis + 1 for axis in group_axes), group_axes))
        products = lax.dot_general(rows, by_group.astype(x.dtype), dimensions, preferred_element_type=jnp.float32)
        return jnp.sum(products * jnp.expand_dims(scale, num_in), axis=group_axes).astype(dtype)
