"""A model laid out on devices: what a step program is lowered from, on devices that are here and on those that are not.

The runner serves with it. Without weights and without the devices, it compiles ahead of time for the devices of a
`jax.experimental.topologies` description: give `PlacedModel.of` a mesh of them.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike
from numpy.typing import NDArray

from jax_engine.compilation.gpu_settings import CompilerOptions, compiler_options
from jax_engine.compilation.planner import CacheGeometry
from jax_engine.execution.full_program import Undrawn, draw_function, forward_function
from jax_engine.execution.row_blocks import row_block
from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.execution.step_program import DeviceState, step_function
from jax_engine.loading.model_structure import ModelStructure, Parameter
from jax_engine.models.adapters import AdapterShape
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import PAGE_AXES
from jax_engine.models.kv_scales import MeasuringAttention, is_quantized
from jax_engine.models.layers import run_layers
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.ops import KernelShapes, Ops, select_ops
from jax_engine.sampling.full_sampling import DrawInputs, ForwardInputs, FullState
from jax_engine.sampling.logits_processors import LogitsProcessor, argument_names
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.quantized_model import check_blocks, quantization_of
from jax_engine.sharding.sharding import Placement, place
from jax_engine.sharding.strategies import STRATEGIES, Strategy
from jax_engine.speculation.draft_program import draft_function

logger = logging.getLogger(__name__)

Shapes = TypeVar("Shapes")  # a pytree of `jax.ShapeDtypeStruct`s


@dataclass(frozen=True)
class StateSize:
    """How large the device state is."""

    num_pages: int
    num_slots: int
    max_pages: int  # of one sequence


@dataclass(frozen=True)
class PlacedModel:
    """A model's structure, its pages, and where its arrays lie."""

    structure: ModelStructure
    geometry: CacheGeometry
    placement: Placement
    vocab_size: int
    hidden_size: int
    dtype: jnp.dtype  # of weights and activations
    num_logprobs: int  # of the likeliest tokens, that a step finds if it is asked for any
    row_block: int | None = None  # rows of a step that run together; None: all
    processors: tuple[LogitsProcessor, ...] = ()
    compiler_options: CompilerOptions = ()
    draft: "PlacedModel | None" = None  # a smaller model, which drafts for this one
    num_drafts: int = 0  # tokens that are drafted for a sequence in one step, at most, by whatever method
    measuring: ModelStructure | None = None  # the same, over `MeasuredPages`, where the cache's scales are calculated

    @classmethod
    def of(
        cls,
        model_class: type[LlamaForCausalLM],
        config: ModelConfig,
        *,
        platform: str,
        mesh: Mesh | None,
        attention_backend: str,
        dtype: DTypeLike,
        page_size: int,
        scan_layers: bool,
        strategy: Strategy = STRATEGIES["tensor"],
        deterministic: bool = False,
        max_logprobs: int = 20,
        processors: tuple[LogitsProcessor, ...] = (),
        adapters: AdapterShape | None = None,
        quantization: str | None = None,
        num_drafts: int = 0,
        cache_dtype: DTypeLike | None = None,
        calculate_kv_scales: bool = False,
    ) -> "PlacedModel":
        """Choose the operations and lay the model out on `mesh` by a strategy, or on one device without a mesh.

        If `deterministic`, all rows of all steps go through the same instructions (see `row_blocks`). With `adapters`,
        there is room for so many, and step layouts need their number of slots. With `quantization`, one of
        `QUANTIZATIONS`, projections have weights of 8 bits. Pages are of `cache_dtype` (None: of `dtype`).

        Raises:
            ValueError: the attention backend does not run on `platform`, or is not deterministic; or the mesh does not
                fit the model.
        """
        placement = place(config, mesh, strategy)
        cache_dtype = jnp.dtype(dtype if cache_dtype is None else cache_dtype)
        shapes = KernelShapes(dtype, cache_dtype, config.head_dim, page_size)
        ops = _chosen_ops(attention_backend, config, placement, shapes, platform, deterministic=deterministic)
        how = quantization_of(quantization, config, _devices_of(placement)[0])
        model_of = partial(ModelStructure.of, model_class, config, dtype=dtype, scan_layers=scan_layers)
        added = {"adapters": adapters, "quantization": how, "kv_scales": is_quantized(cache_dtype)}
        structure_of = partial(model_of, widening=placement.widening, **added)
        structure = structure_of(ops=ops)
        check_blocks(structure, placement)
        geometry = CacheGeometry.of(
            config,
            model_class.cache_layout(config, ops.num_stages),
            page_size=page_size,
            dtype=cache_dtype,
            page_shape=ops.page_shape,
            placement=placement,
            floats_as_bits=platform == "cpu" and ops.attention_name == "xla",
        )
        sizes = config.vocab_size, config.hidden_size, jnp.dtype(dtype), _num_logprobs(max_logprobs, config.vocab_size)
        options = _options(structure, placement, deterministic=deterministic) if platform == "gpu" else ()
        block = row_block(platform) if deterministic else None
        placed = cls(structure, geometry, placement, *sizes, block, processors, options, None, num_drafts)
        if not calculate_kv_scales:
            return placed
        return replace(placed, measuring=structure_of(ops=replace(ops, attention=MeasuringAttention(ops.attention))))

    def sharding_of(self, parameter: Parameter) -> Sharding:
        """Where a parameter lies."""
        return self.placement.of(parameter.logical_axes) or SingleDeviceSharding(jax.devices()[0])

    def zero_state(self, size: StateSize) -> DeviceState:
        """The device state before the first step, on its devices."""
        if self.placement.mesh is None:
            return self._zeros(size)
        return jax.jit(lambda: self._zeros(size), out_shardings=_shardings(self.state_shapes(size)))()

    def state_shapes(self, size: StateSize) -> DeviceState:
        """The device state as `jax.ShapeDtypeStruct`s."""
        whole, pages = self.placement.of(), self.placement.activations.of(PAGE_AXES)
        state = jax.eval_shape(lambda: self._zeros(size))
        caches = jax.tree.map(lambda leaf: _shape(leaf.shape, leaf.dtype, pages), (state.cache, state.draft_cache))
        state = jax.tree.map(lambda leaf: _shape(leaf.shape, leaf.dtype, whole), state)
        return replace(state, cache=caches[0], draft_cache=caches[1])

    def full_state_shapes(self, num_slots: int) -> FullState:
        """What the FULL mode keeps for the slots, as `jax.ShapeDtypeStruct`s; a copy on every device."""
        return self._whole(jax.eval_shape(lambda: self._full_zeros(num_slots)))

    def zero_full_state(self, num_slots: int) -> FullState:
        """What the FULL mode keeps, before its first step, on its devices."""
        if self.placement.mesh is None:
            return self._full_zeros(num_slots)
        shardings = _shardings(self.full_state_shapes(num_slots))
        return jax.jit(lambda: self._full_zeros(num_slots), out_shardings=shardings)()

    def whole_array(self, values: NDArray[Any]) -> jax.Array:
        """An array on the devices, a copy on each."""
        sharding = self.placement.of() or SingleDeviceSharding(jax.devices()[0])
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def lower(
        self, layout: BatchLayout, mode: SamplingMode, size: StateSize, *, num_steps: int = 1, draft_rows: int = 0
    ) -> jax.stages.Lowered:
        """Trace the step program of a bucket; its arguments are those of `step_function` or `forward_function`."""
        leaves, state, whole = self.leaf_shapes(), self.state_shapes(size), self.placement.of()
        buffer = _shape((layout.size,), jnp.int32, whole)
        on_mesh, options = self.placement.mesh is not None, dict(self.compiler_options)
        if mode is not SamplingMode.FULL:
            step = step_function(
                self.structure, layout, mode, self.placement, self.row_block, num_steps=num_steps, draft_rows=draft_rows
            )
            shardings = (_shardings(state), whole) if on_mesh else None
            jitted = jax.jit(step, donate_argnums=1, out_shardings=shardings, compiler_options=options)
            return jitted.lower(leaves, state, buffer)
        assert num_steps == 1, "a step of the FULL mode runs the model once"
        vectors, bucket = self.full_state_shapes(size.num_slots).vectors, layout.bucket
        inputs = self._whole(jax.eval_shape(lambda: ForwardInputs.zeros(bucket.num_sequences, bucket.num_tokens)))
        forward = forward_function(
            self.structure,
            layout,
            self.placement,
            self.row_block,
            num_logprobs=self.num_logprobs,
            vocab_size=self.vocab_size,
            draft_rows=draft_rows,
            num_drafts=self.num_drafts,
        )
        forward_shardings = (_shardings(state), whole, whole, whole) if on_mesh else None
        jitted = jax.jit(forward, donate_argnums=(1, 2), out_shardings=forward_shardings, compiler_options=options)
        return jitted.lower(leaves, state, vectors, buffer, inputs)

    def lower_draw(self, bucket: Bucket, size: StateSize, *, drafts: bool) -> jax.stages.Lowered:
        """Trace the program that draws from as many rows as a bucket has tokens, with drafts or without; its arguments
        are those of `draw_function`.
        """
        rows, num_sequences = bucket.num_tokens, bucket.num_sequences
        leaves, state, whole = self.leaf_shapes(), self.state_shapes(size), self.placement.of()
        full, num_drafts = self.full_state_shapes(size.num_slots), self.num_drafts if drafts else None
        undrawn = jax.eval_shape(lambda: Undrawn.zeros(rows, num_sequences, self.hidden_size, self.dtype, num_drafts))
        inputs = jax.eval_shape(lambda: DrawInputs.zeros(num_sequences, rows, self.vocab_size))
        draw = draw_function(
            self.structure,
            self.placement,
            self.row_block,
            num_logprobs=self.num_logprobs,
            processors=self.processors,
        )
        shardings = (whole, _shardings(full), whole) if self.placement.mesh is not None else None
        options = dict(self.compiler_options)
        jitted = jax.jit(draw, donate_argnums=(1, 2), out_shardings=shardings, compiler_options=options)
        return jitted.lower(leaves, state.last_tokens, full, self._whole(undrawn), self._whole(inputs))

    def lower_draft(self, layout: BatchLayout, size: StateSize) -> jax.stages.Lowered:
        """Trace a program of the draft model; its arguments are those of `draft_function`."""
        assert self.draft is not None
        state, whole = self.state_shapes(size), self.placement.of()
        function = draft_function(self.draft.structure, layout, self.draft.placement, num_drafts=self.num_drafts)
        shardings = (_shardings(state), whole) if self.placement.mesh is not None else None
        buffer = _shape((layout.size,), jnp.int32, whole)
        options = dict(self.compiler_options)
        jitted = jax.jit(function, donate_argnums=1, out_shardings=shardings, compiler_options=options)
        return jitted.lower(self.draft.leaf_shapes(), state, buffer)

    def leaf_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The parameters, in their order, as `jax.ShapeDtypeStruct`s."""
        return tuple(
            _shape(parameter.shape, parameter.dtype, self.placement.of(parameter.logical_axes))
            for parameter in self.structure.parameters
        )

    def _full_zeros(self, num_slots: int) -> FullState:
        return FullState.zeros(num_slots, self.vocab_size, self.hidden_size, len(argument_names(self.processors)))

    def _whole(self, shapes: Shapes) -> Shapes:
        """Shapes, each with a copy on every device."""
        whole = self.placement.of()
        return jax.tree.map(lambda leaf: _shape(leaf.shape, leaf.dtype, whole), shapes)

    def _zeros(self, size: StateSize) -> DeviceState:
        state = DeviceState.zeros(
            self.geometry.empty_cache(size.num_pages),
            num_slots=size.num_slots,
            num_groups=self.geometry.layout.num_groups,
            max_pages=size.max_pages,
        )
        if self.draft is None:
            return state
        return state.with_draft_cache(self.draft.geometry.empty_cache(size.num_pages), num_drafts=self.num_drafts)


def _log_choices(config: ModelConfig, ops: Ops, attention_reason: str, placement: Placement) -> None:
    """What was chosen for a model, with the reasons."""
    logger.info("attention: %s (%s)", ops.attention_name, attention_reason)
    if config.experts is not None:
        logger.info("experts: %s (%s)", ops.experts.name, ops.experts.reason)
    if placement.mesh is not None:
        logger.info("%s", placement.describe(config))


def _chosen_ops(
    backend: str, config: ModelConfig, placement: Placement, shapes: KernelShapes, platform: str, *, deterministic: bool
) -> Ops:
    """The operations for a model that lies as `placement` says."""
    partition = placement.activations
    ops, reason = select_ops(
        backend, platform=platform, partition=partition, deterministic=deterministic, shapes=shapes
    )
    ops = _gathering(ops, placement).in_stages(platform)
    _log_choices(config, ops, reason, placement)
    return ops


def _options(structure: ModelStructure, placement: Placement, *, deterministic: bool) -> CompilerOptions:
    """What programs for GPUs are compiled with."""
    quantized = structure.quantization is not None
    return compiler_options(_devices_of(placement), deterministic=deterministic, quantized=quantized)


def _gathering(ops: Ops, placement: Placement) -> Ops:
    """The operations for layers whose weights are brought together first, where a strategy says so."""
    if placement.weights_in_use.mesh is None:
        return ops
    return replace(ops, run_layers=partial(run_layers, weights_in_use=placement.weights_in_use))


def _devices_of(placement: Placement) -> list[jax.Device]:
    """The devices of a model, which need not be here."""
    return jax.devices()[:1] if placement.mesh is None else placement.mesh.devices.flatten().tolist()


def _shape(shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _num_logprobs(most: int, vocab_size: int) -> int:
    """Of how many of the likeliest tokens a step finds them; -1 is all."""
    return vocab_size if most < 0 else min(most, vocab_size)


def _shardings(shapes: Shapes) -> Shapes:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def resolve_dtype(asked: str, stored: str, platform: str) -> jnp.dtype:
    """The dtype of weights and activations: `auto` is float32 on a CPU, whose bfloat16 is slow, else the
    checkpoint's.
    """
    if asked != "auto":
        return jnp.dtype(asked)
    if platform == "cpu":
        return jnp.dtype(jnp.float32)
    return jnp.dtype(stored if stored in ("bfloat16", "float16") else jnp.bfloat16)


def resolve_cache_dtype(asked: str, dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of pages, by `kv_cache_dtype`; `auto` is that of the model."""
    names = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
    return dtype if asked == "auto" else jnp.dtype(names.get(asked, asked))
