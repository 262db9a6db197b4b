"""A model without its weights: what a step is traced with, and what is to be loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jax_engine.models.adapters import AdapterShape
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_scales import KV_SCALE_AXES, add_kv_scales
from jax_engine.models.layers import add_adapters, quantize_projections
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.ops import Ops
from jax_engine.models.quantization import Quantization
from jax_engine.models.weights import Layout, layout_of, stored_name
from jax_engine.sharding.widening import AS_STORED, Spread, Widening


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
    spreads: tuple[Spread, ...]  # how what a checkpoint has lies in each dimension
    mean: float
    std: float
    part_names: tuple[str, ...] = ()  # of stacked layers: the name of each
    unquantized_dtype: np.dtype[Any] | None = None  # of a weight of 8 bits: what its scales bring it back to
    num_in: int = 0  # of such a weight: its dimensions of inputs, which come first in a part

    @property
    def is_scale(self) -> bool:
        """Whether it holds the scales of a weight of 8 bits."""
        return self.name.endswith(".weight_scale")

    @property
    def scale_name(self) -> str:
        """Of a weight of 8 bits, the name of its scales."""
        return f"{self.name}_scale"

    @property
    def unquantized(self) -> "Parameter":
        """A weight of 8 bits as it was before."""
        return self if self.unquantized_dtype is None else replace(self, dtype=self.unquantized_dtype)

    @property
    def is_of_adapters(self) -> bool:
        """Whether it holds factors of adapters, which no checkpoint of the model has."""
        return "adapters" in self.logical_axes

    @property
    def is_kv_scales(self) -> bool:
        """Whether it holds scales of the cache, of one layer or of stacked ones (see `kv_scales.py`)."""
        return self.logical_axes[-2:] == KV_SCALE_AXES

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
        shape, axes, spreads = self.shape[1:], self.logical_axes[1:], self.spreads[1:]
        return replace(self, name=name, shape=shape, logical_axes=axes, spreads=spreads, part_names=())

    @property
    def base_shape(self) -> tuple[int, ...]:
        """The shape of what a checkpoint has."""
        return tuple(spread.stored for spread in self.spreads)


@dataclass(frozen=True)
class ModelStructure:
    """A model without its weights: hashable, made without allocating any."""

    graphdef: nnx.GraphDef[LlamaForCausalLM]
    treedef: jax.tree_util.PyTreeDef
    parameters: tuple[Parameter, ...]
    quantization: Quantization | None = None

    @classmethod
    def of(
        cls,
        model_class: type[LlamaForCausalLM],
        config: ModelConfig,
        *,
        ops: Ops,
        dtype: DTypeLike,
        scan_layers: bool = False,
        widening: Widening = AS_STORED,
        adapters: AdapterShape | None = None,
        quantization: Quantization | None = None,
        kv_scales: bool = False,
    ) -> "ModelStructure":
        """The structure of `model_class` for `config`, every parameter in `dtype`.

        `scan_layers` stacks the parameters of like layers and runs them as a loop. By `widening`, heads are there
        several times, and zeros beside them, so that devices divide them. With `adapters`, there is room for so many
        beside the weights; with `kv_scales`, for those of an 8-bit cache, in float32. With `quantization`, projections
        have weights of 8 bits.
        """

        def build(config: ModelConfig) -> LlamaForCausalLM:
            model = model_class(config, ops=ops, dtype=dtype, rngs=None, scan_layers=scan_layers)
            if adapters is not None:
                add_adapters(model, adapters)
            if quantization is not None:
                quantize_projections(model, quantization)
            if kv_scales:
                add_kv_scales(model)
            return model

        graphdef, state = nnx.split(nnx.eval_shape(partial(build, widening.config(config))))
        # Random values are those of the model itself, whose deviations follow from how many heads it has.
        own = nnx.state(nnx.eval_shape(partial(build, config))) if widening.head_padding else state
        stds = [variable.get_metadata()["init_std"] for _, variable in nnx.to_flat_state(own)]
        parameters = []
        for (path, variable), std in zip(nnx.to_flat_state(state), stds, strict=True):
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
                    layout=_layout(path, len(axes) - num_stacked, model_class),
                    spreads=tuple(widening.spread(*of, config) for of in zip(axes, leaf.shape, strict=True)),
                    mean=metadata["init_mean"],
                    std=std,
                    part_names=tuple(names) if is_stack else (),
                    unquantized_dtype=metadata.get("unquantized_dtype"),
                    num_in=metadata.get("num_in", 0),
                )
            )
        return cls(graphdef, jax.tree.structure(state), tuple(parameters), quantization)

    @property
    def stored(self) -> tuple[Parameter, ...]:
        """The parameters that a checkpoint has."""
        own = (one for one in self.parameters if not one.is_of_adapters and not one.is_kv_scales)
        return tuple(one for one in own if not one.is_scale or self.is_stored_quantized)

    @property
    def is_stored_quantized(self) -> bool:
        """Whether a checkpoint has weights of 8 bits, and their scales."""
        return self.quantization is not None and self.quantization.stored is not None

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


def _layout(path: Sequence[object], num_dimensions: int, model_class: type[LlamaForCausalLM]) -> Layout:
    """How a parameter is stored: the scales of a weight as that is, with inputs or without them."""
    name = _own_name(path, None)
    if not name.endswith(".weight_scale"):
        return layout_of(name, num_dimensions, model_class.HF_WEIGHTS)
    return layout_of(name.removesuffix("_scale"), num_dimensions, model_class.HF_WEIGHTS).of_last(num_dimensions)
