"""Layers that every family is built from.

Each parameter is an `nnx.Param` with metadata: `logical_axes`, one name a dimension (`vocab embed heads kv_heads
head_dim mlp`), which a sharding strategy maps to mesh axes; and `init_mean`, `init_std`, the distribution of a fresh
value. Parameters and activations have the model's dtype; products accumulate in float32, norms are computed in float32.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_engine.models.kv_pages import KVPages, SequenceTable
from jax_engine.models.rope import Rotation

Axes = tuple[str, ...]
Cache = KVPages | None
# With a cache, its pages and lengths; without one, a segment id for each token (see `ops.dense_ops`).
Sequences = SequenceTable | Int[Array, " T"]

ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def parameter(
    rngs: nnx.Rngs | None, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike, *, mean: float = 0.0, std: float = 0.0
) -> nnx.Param[Array]:
    """A parameter drawn from a normal distribution, carrying its axes and distribution.

    Constant when `std` is 0 or `rngs` is None, which is for `nnx.eval_shape`: there, drawing keys takes a time that is
    quadratic in their number, 4 s for 32 layers.
    """
    if std and rngs is not None:
        value = (mean + std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
    else:
        value = jnp.full(shape, mean, dtype)
    return nnx.Param(value, logical_axes=axes, init_mean=mean, init_std=std)


class Linear(nnx.Module):
    """`x @ weight + bias`, where input and output may each have several dimensions.

    weight [*in_shape, *out_shape], bias [*out_shape]; x [..., *in_shape] -> [..., *out_shape].
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: Axes,
        *,
        bias: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        self.num_in = len(in_shape)
        self.weight = parameter(rngs, (*in_shape, *out_shape), axes, dtype, std=math.prod(in_shape) ** -0.5)
        self.bias = parameter(rngs, out_shape, axes[self.num_in :], dtype) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return self.project(x).astype(x.dtype)

    def project(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product in float32, for callers that keep that precision (logits)."""
        out = jnp.tensordot(x, self.weight[...], axes=self.num_in, preferred_element_type=jnp.float32)
        return out if self.bias is None else out + self.bias[...]


class Embed(nnx.Module):
    """Token embedding, weight [V, D]; with tied embeddings also the output projection."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.weight = parameter(rngs, (vocab_size, hidden_size), ("vocab", "embed"), dtype, std=hidden_size**-0.5)

    def __call__(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        """The rows of `token_ids`, which must be in range (checked where requests enter)."""
        return self.weight[...][token_ids]

    def project(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Logits in float32."""
        return jnp.einsum("bd,vd->bv", hidden, self.weight[...], preferred_element_type=jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (arXiv 1910.07467) over the last dimension, in float32, returned in the input's dtype."""

    def __init__(self, size: int, axis: str, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.eps = eps
        self.weight = parameter(rngs, (size,), (axis,), dtype, mean=1.0)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...].astype(jnp.float32)).astype(x.dtype)


@runtime_checkable
class DecoderLayer(Protocol):
    """What `run_layers` runs; it reads and writes the cache at `layer` only."""

    def __call__(
        self, hidden: Float[Array, "T D"], cache: Cache, rotate: Rotation, sequences: Sequences, *, layer: int
    ) -> tuple[Float[Array, "T D"], Cache]: ...


def run_layers(
    layers: Iterable[DecoderLayer],
    hidden: Float[Array, "T D"],
    cache: Cache,
    rotate: Rotation,
    sequences: Sequences,
) -> tuple[Float[Array, "T D"], Cache]:
    """Run the decoder's layers in order; the only place that does. Hidden states and cache pass through all of them."""
    for index, layer in enumerate(layers):
        hidden, cache = layer(hidden, cache, rotate, sequences, layer=index)
    return hidden, cache
