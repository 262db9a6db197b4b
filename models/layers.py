"""Layers that every family is built from.

Each parameter is an `nnx.Param` with metadata: `logical_axes`, one name a dimension (`layers vocab embed heads kv_heads
head_dim mlp`), which a sharding strategy maps to mesh axes; `init_mean`, `init_std`, the distribution of a fresh value;
and `layers`, the decoder layers that it belongs to (None: to none), one an entry of its axis `layers` if it has that.
Parameters and activations have the model's dtype; products accumulate in float32, norms are computed in float32.
"""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_engine.models.adapters import ADAPTED_MODULES, AdapterRows, AdapterShape, adapter_product
from jax_engine.models.kv_pages import CacheLayout, KVPages, SequenceTable
from jax_engine.models.partition import ONE_DEVICE, Partition
from jax_engine.models.quantization import Quantization
from jax_engine.models.rope import Rotation

Axes = tuple[str, ...]
Cache = KVPages | None
# With a cache, its pages and lengths; without one, a segment id for each token (see `ops.dense_ops`).
Sequences = SequenceTable | Int[Array, " T"]


def adapters_of(sequences: Sequences) -> AdapterRows | None:
    """The adapters of a step's rows; None in an engine without any, and outside of one."""
    return sequences.adapters if isinstance(sequences, SequenceTable) else None


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
    return nnx.Param(value, logical_axes=axes, init_mean=mean, init_std=std, layers=None)


class Linear(nnx.Module):
    """`x @ weight + bias`, where input and output may each have several dimensions.

    weight [*in_shape, *out_shape], bias [*out_shape]; x [..., *in_shape] -> [..., *out_shape]. With `add_adapters`,
    rows that have an adapter get what it adds. With `quantize_projections`, the weight is of 8 bits, with scales beside
    it, and x is [T, *in_shape].
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
        self.lora_a: nnx.Param[Array] | None = nnx.data(None)
        self.lora_b: nnx.Param[Array] | None = nnx.data(None)
        self.weight_scale: nnx.Param[Array] | None = nnx.data(None)
        self.quantization: Quantization | None = None

    def __call__(self, x: Float[Array, "..."], adapters: AdapterRows | None = None) -> Float[Array, "..."]:
        if adapters is not None and self.lora_a is not None and self.lora_b is not None:
            return (self.project(x) + adapter_product(x, self.lora_a[...], self.lora_b[...], adapters)).astype(x.dtype)
        if self.bias is not None:
            return self.project(x).astype(x.dtype)
        # Asked for in x's dtype, so that partial products which devices add up travel in it too, not in float32.
        return self._product(x, x.dtype)

    def project(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The product in float32, for callers that keep that precision (logits)."""
        out = self._product(x, jnp.dtype(jnp.float32))
        return out if self.bias is None else out + self.bias[...]

    def _product(self, x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
        if self.quantization is not None and self.weight_scale is not None:
            return self.quantization.product(x, self.weight[...], self.weight_scale[...], dtype=dtype)
        return jnp.tensordot(x, self.weight[...], axes=self.num_in, preferred_element_type=dtype)


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
    """What `run_layers` runs; it reads and writes the cache at `layer` only, an int or a traced int32 scalar, with the
    tables of its own cache group.
    """

    def __call__(
        self,
        hidden: Float[Array, "T D"],
        cache: Cache,
        rotate: Rotation,
        sequences: Sequences,
        *,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "T D"], Cache]: ...


LayerModule = TypeVar("LayerModule", bound=nnx.Module)


@dataclass(frozen=True)
class LayerRun:
    """Layers `first .. first + period * repeats - 1`, of which each is like the one `period` before it.

    The last `padding` of them no checkpoint has: their weights are zeros, so that they add nothing to what passes
    through.
    """

    first: int
    period: int
    repeats: int
    padding: int = 0

    def layers_of(self, phase: int) -> tuple[int, ...]:
        """The layers at one place of the period."""
        return tuple(range(self.first + phase, self.first + self.period * self.repeats - self.padding, self.period))


def layer_runs(kinds: Sequence[Hashable], *, scan: bool) -> tuple[LayerRun, ...]:
    """Cut a decoder into runs that can each be one loop, by what each layer is; layers of equal kind share a program.

    From the front, each run is the repeating pattern that covers the most layers, the shortest such: 80 equal layers
    are one run of period 1; sliding and full attention in turn, one of period 2; five sliding and one full, of period
    6 with what is left over after it. Without `scan`, and where nothing repeats, a layer is a run of its own.
    """
    runs: list[LayerRun] = []
    first = 0
    while first < len(kinds):
        best = LayerRun(first, 1, 1)
        for period in range(1, (len(kinds) - first) // 2 + 1 if scan else 1):
            repeats, pattern = 1, kinds[first : first + period]
            while kinds[(start := first + repeats * period) : start + period] == pattern:
                repeats += 1
            if repeats > 1 and period * repeats > best.period * best.repeats:
                best = LayerRun(first, period, repeats)
        runs.append(best)
        first += best.period * best.repeats
    return tuple(runs)


def stack_layers(layer: LayerModule, layers: tuple[int, ...], *, size: int) -> LayerModule:
    """`layer`, marked as that of all `layers`; if `size` is above 1, its parameters get a first axis `layers` of it.

    Every layer starts with the values of the given one: this is the shape that weights are loaded into.
    """
    for _, parameter in nnx.iter_graph(layer):
        if isinstance(parameter, nnx.Param):
            parameter.set_metadata(layers=layers)
            if size > 1:
                value = parameter[...]
                parameter.set_value(jnp.broadcast_to(value, (size, *value.shape)))
                parameter.set_metadata(logical_axes=("layers", *parameter.logical_axes))
    return layer


def run_layers(
    runs: Sequence[tuple[LayerRun, Sequence[DecoderLayer]]],
    hidden: Float[Array, "T D"],
    cache: Cache,
    rotate: Rotation,
    sequences: Sequences,
    layout: CacheLayout,
    *,
    weights_in_use: Partition = ONE_DEVICE,
) -> tuple[Float[Array, "T D"], Cache]:
    """Run the decoder's layers in order; the only place that does. Hidden states and cache pass through all of them.

    On the mesh of `weights_in_use`, a layer's weights are first brought to where that says, and freed after it.

    Each run comes with the layers of one period. A run that repeats is a `lax.scan` over their stacked parameters
    (`stack_layers`), whose body is one period: the program's size, and so the time it takes to compile, does not follow
    the depth. The cache is carried, never scanned over, which would hold it twice.
    """
    for run, period in runs:
        if run.repeats == 1:
            for phase, layer in enumerate(period):
                index = run.first + phase
                own = _of_group(sequences, layout.groups[index])
                if weights_in_use.mesh is not None:
                    graph, state = nnx.split(layer)
                    layer = nnx.merge(graph, _moved(state, weights_in_use))
                hidden, cache = layer(hidden, cache, rotate, own, layer=layout.places[index])
        else:
            hidden, cache = scan_layers(run, period, hidden, cache, rotate, sequences, layout, weights_in_use)
    return hidden, cache


def _moved(state: nnx.State, partition: Partition) -> nnx.State:
    """The weights of one layer where `partition` says."""
    if partition.mesh is None:
        return state

    def move(variable: nnx.Variable[Array]) -> nnx.Variable[Array]:
        value = variable[...]
        axes = variable.get_metadata()["logical_axes"][-value.ndim :]  # without `layers`
        return variable.replace(partition.constrain(value, axes))

    return jax.tree.map(move, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def scan_layers(
    run: LayerRun,
    period: Sequence[DecoderLayer],
    hidden: Float[Array, "T D"],
    cache: Cache,
    rotate: Rotation,
    sequences: Sequences,
    layout: CacheLayout,
    weights_in_use: Partition = ONE_DEVICE,
) -> tuple[Float[Array, "T D"], Cache]:
    """One run of `run_layers`, as a loop over the stacked parameters of its period's layers."""
    is_sliced = _is_sliced if weights_in_use.mesh is None else True  # what is moved is copied anyway
    graphs, weights, in_place = zip(*(nnx.split(layer, is_sliced, ...) for layer in period), strict=True)

    def body(
        carry: tuple[Float[Array, "T D"], Cache],
        step: tuple[Int[Array, ""], list[Int[Array, ""]], list[Int[Array, ""] | None], tuple[nnx.State, ...]],
    ) -> tuple[tuple[Float[Array, "T D"], Cache], None]:
        (hidden, cache), (repeat, places, groups, slices) = carry, step
        for phase, (graph, state) in enumerate(zip(graphs, slices, strict=True)):
            whole = jax.tree.map(lambda stack: InStack(stack, repeat), in_place[phase])
            layer: DecoderLayer = nnx.merge(graph, _moved(state, weights_in_use), whole)
            group = groups[phase]
            own = _of_group(sequences, layout.groups[run.first + phase] if group is None else group)
            hidden, cache = layer(hidden, cache, rotate, own, layer=places[phase])
        return (hidden, cache), None

    members = [run.layers_of(phase) for phase in range(run.period)]
    places = [_column(layout.places, layers) for layers in members]
    # Where all layers of a phase share a group, its table is taken outside of the loop.
    groups = [
        _column(layout.groups, layers) if len({layout.groups[layer] for layer in layers}) > 1 else None
        for layers in members
    ]
    repeats = jnp.arange(run.repeats, dtype=jnp.int32)
    (hidden, cache), _ = lax.scan(body, (hidden, cache), (repeats, places, groups, weights))
    return hidden, cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InStack:
    """One layer's part of a parameter of stacked layers, without having been cut out of it."""

    stack: Float[Array, "layers ..."]
    layer: Int[Array, ""]


def _is_sliced(path: tuple[object, ...], variable: nnx.Variable[Array]) -> bool:
    """Whether a scan hands each layer its part of a parameter.

    Not so where the product that it goes into is a kernel of its own, or a loop: there the part would be copied first,
    in every step, and experts are most of a model.
    """
    return "experts" not in variable.get_metadata()["logical_axes"]


def in_stack(parameter: nnx.Param[Array]) -> tuple[Float[Array, "layers ..."], int | Int[Array, ""]]:
    """A parameter of which all layers of a scan are given whole (`_is_sliced`), and the place of the present one."""
    value = parameter.get_value()
    return (value.stack, value.layer) if isinstance(value, InStack) else (value[None], 0)


def _column(values: Sequence[int], layers: Sequence[int]) -> Int[Array, " repeats"]:
    return jnp.asarray([values[layer] for layer in layers], jnp.int32)


def _of_group(sequences: Sequences, group: int | Int[Array, ""]) -> Sequences:
    return sequences.of_group(group) if isinstance(sequences, SequenceTable) else sequences


def add_adapters(model: nnx.Module, shape: AdapterShape) -> None:
    """Give the projections of `ADAPTED_MODULES` the factors of `shape`, all zero, with the axes `adapters` and `rank`
    before their own; those of stacked layers are stacked likewise.
    """
    for path, module in nnx.iter_modules(model):
        if path and path[-1] in ADAPTED_MODULES and isinstance(module, Linear):
            stacked = int(module.weight.logical_axes[0] == "layers")
            first_out = stacked + module.num_in
            module.lora_a = _factor(module.weight, shape, slice(stacked, first_out))
            module.lora_b = _factor(module.weight, shape, slice(first_out, None))


def _factor(weight: nnx.Param[Array], shape: AdapterShape, dims: slice) -> nnx.Param[Array]:
    """A factor beside `weight`, over some of its dimensions."""
    stacked = int(weight.logical_axes[0] == "layers")
    sizes, axes = weight[...].shape, weight.logical_axes
    value = jnp.zeros((*sizes[:stacked], shape.num_slots, shape.rank, *sizes[dims]), weight.dtype)
    names = (*axes[:stacked], "adapters", "rank", *axes[dims])
    return nnx.Param(value, logical_axes=names, init_mean=0.0, init_std=0.0, layers=weight.layers)


def quantize_projections(model: nnx.Module, quantization: Quantization) -> None:
    """Give the projections of `ADAPTED_MODULES` weights of 8 bits, and a `weight_scale` beside each; not those that a
    checkpoint has otherwise.

    A weight says in its metadata what it was in (`unquantized_dtype`), and how many dimensions inputs have (`num_in`).
    """
    for path, module in nnx.iter_modules(model):
        if path and path[-1] in ADAPTED_MODULES and isinstance(module, Linear):
            weight, names = module.weight, _names(path, module.weight.layers)
            if quantization.keeps(names):
                continue
            stacked = int(weight.logical_axes[0] == "layers")
            sizes, axes = weight[...].shape, weight.logical_axes
            shape = quantization.scale_shape(sizes[stacked:], module.num_in)
            module.quantization = quantization
            module.weight_scale = nnx.Param(
                jnp.ones((*sizes[:stacked], *shape), jnp.float32),
                logical_axes=(*axes[:stacked], *axes[len(axes) - len(shape) :]),
                init_mean=1.0,
                init_std=0.0,
                layers=weight.layers,
            )
            weight.set_metadata(unquantized_dtype=weight.dtype, num_in=module.num_in)
            weight.set_value(jnp.zeros(sizes, quantization.dtype))


def _names(path: Sequence[object], layers: Sequence[int]) -> list[str]:
    """A module's name in a checkpoint for each of the layers that it is of, whose place is the path's first number."""
    place = next(index for index, key in enumerate(path) if isinstance(key, int))
    return [".".join(map(str, (*path[:place], layer, *path[place + 1 :]))) for layer in layers]
