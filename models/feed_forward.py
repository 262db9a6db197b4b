"""The feed-forward of a layer: one for all rows, or a mixture of experts of which each row goes through a few."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_engine.models.config import ExpertsConfig
from jax_engine.models.experts import ExpertWeights
from jax_engine.models.kv_pages import SequenceTable
from jax_engine.models.layers import (
    ACTIVATION_FUNCTIONS,
    Axes,
    Linear,
    Sequences,
    adapters_of,
    in_stack,
    parameter,
)
from jax_engine.models.ops import Ops


class MLP(nnx.Module):
    """Gated feed-forward (arXiv 2002.05202)."""

    def __init__(
        self, hidden_size: int, size: int, *, activation: str, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs | None
    ):
        hidden, inner = (hidden_size,), (size,)
        self.gate_proj = Linear(hidden, inner, ("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(hidden, inner, ("embed", "mlp"), bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(inner, hidden, ("mlp", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "T D"], sequences: Sequences) -> Float[Array, "T D"]:
        adapters = adapters_of(sequences)
        gate = ACTIVATION_FUNCTIONS[self.activation](self.gate_proj(x, adapters))
        return self.down_proj(gate * self.up_proj(x, adapters), adapters)


class Mixture(nnx.Module):
    """A mixture of experts (arXiv 1701.06538), each a gated feed-forward: a router sends rows to a few.

    Routed in float32. No row is ever dropped, whatever the loads, and rows of padding go through no expert. With
    `shared_expert_intermediate_size`, all rows go through one more, weighed by a gate of its own (arXiv 2401.06066).
    """

    def __init__(
        self,
        hidden_size: int,
        config: ExpertsConfig,
        *,
        activation: str,
        ops: Ops,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        # Every device routes all of its rows, so the router is not split as the experts are.
        hidden, count = (hidden_size,), (config.num_experts,)
        self.gate = Linear(hidden, count, ("embed", "choices"), bias=False, dtype=dtype, rngs=rngs)
        self.experts = Experts(hidden_size, config, dtype=dtype, rngs=rngs)
        self.shared_expert: MLP | None = nnx.data(None)
        self.shared_expert_gate: Linear | None = nnx.data(None)
        if (size := config.shared_expert_intermediate_size) is not None:
            self.shared_expert = MLP(hidden_size, size, activation=activation, bias=False, dtype=dtype, rngs=rngs)
            self.shared_expert_gate = Linear(hidden, (1,), ("embed", "one"), bias=False, dtype=dtype, rngs=rngs)
        self.config = config
        self.activation = activation
        self.ops = ops

    def __call__(self, x: Float[Array, "T D"], sequences: Sequences) -> Float[Array, "T D"]:
        chosen, shares = route(
            self.gate.project(x), self.config.num_experts_per_tok, normalised=self.config.norm_topk_prob
        )
        if isinstance(sequences, SequenceTable):
            is_real = sequences.token_sequences < sequences.kv_lengths.shape[0]
            chosen = jnp.where(is_real[:, None], chosen, self.config.num_experts)
        activation = ACTIVATION_FUNCTIONS[self.activation]
        out = self.ops.experts(x, chosen, shares, self.experts.weights, activation=activation)
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            share = jax.nn.sigmoid(self.shared_expert_gate.project(x))
            out += (share * self.shared_expert(x, sequences)).astype(x.dtype)
        return out


class Experts(nnx.Module):
    """The weights of all experts of a layer."""

    def __init__(self, hidden_size: int, config: ExpertsConfig, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        count, size = config.num_experts, config.moe_intermediate_size
        inner, outer = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.gate_proj = ExpertProjection((count, hidden_size, size), inner, dtype=dtype, rngs=rngs)
        self.up_proj = ExpertProjection((count, hidden_size, size), inner, dtype=dtype, rngs=rngs)
        self.down_proj = ExpertProjection((count, size, hidden_size), outer, dtype=dtype, rngs=rngs)

    @property
    def weights(self) -> ExpertWeights:
        """The arrays as the operation takes them: of all layers that are stacked with this one, and its place there."""
        (gate, layer), (up, _), (down, _) = (
            in_stack(projection.weight) for projection in (self.gate_proj, self.up_proj, self.down_proj)
        )
        return ExpertWeights(gate, up, down, layer)


class ExpertProjection(nnx.Module):
    """One projection of every expert, weight [E, in, out]."""

    def __init__(self, shape: tuple[int, int, int], axes: Axes, *, dtype: DTypeLike, rngs: nnx.Rngs | None):
        self.weight = parameter(rngs, shape, axes, dtype, std=shape[1] ** -0.5)


def route(
    logits: Float[Array, "T E"], num_chosen: int, *, normalised: bool
) -> tuple[Int[Array, "T C"], Float[Array, "T C"]]:
    """The likeliest experts of each row, and its shares of them: probabilities among all experts, or, `normalised`,
    among those chosen.
    """
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), num_chosen)
    return chosen, shares / jnp.sum(shares, axis=-1, keepdims=True) if normalised else shares
