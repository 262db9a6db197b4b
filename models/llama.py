"""Llama 2, 3 and 3.1+ (arXiv 2307.09288, 2407.21783), and the decoder that its descendants share.

A family that differs by a bias, a norm on queries and keys, or a window says so in its `AttentionSpec`.
"""

import dataclasses
import itertools
from functools import partial
from typing import ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jax_engine.models.config import ExpertsConfig, ModelConfig
from jax_engine.models.feed_forward import MLP, Mixture
from jax_engine.models.kv_pages import CacheLayout, SequenceTable
from jax_engine.models.layers import (
    Cache,
    Embed,
    Linear,
    RMSNorm,
    Sequences,
    adapters_of,
    layer_runs,
    stack_layers,
)
from jax_engine.models.ops import Ops
from jax_engine.models.pipeline import of_one_stage, staged_run
from jax_engine.models.rope import Rotation, inverse_frequencies, rotation
from jax_engine.models.weights import Rule


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """How one layer's attention departs from the plain one; `window` counts the tokens seen, the current one too."""

    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    window: int | None = None


LayerKind = tuple[AttentionSpec, ExpertsConfig | None]  # what a layer is; equal ones share a program


class Attention(nnx.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config: ModelConfig, spec: AttentionSpec, *, ops: Ops, dtype: DTypeLike, rngs: nnx.Rngs | None):
        head_dim, hidden = config.head_dim, (config.hidden_size,)
        heads, kv_heads = (config.num_attention_heads, head_dim), (config.num_key_value_heads, head_dim)
        queries, values = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        output = ("heads", "head_dim", "embed")
        self.q_proj = Linear(hidden, heads, queries, bias=spec.qkv_bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, kv_heads, values, bias=spec.qkv_bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, kv_heads, values, bias=spec.qkv_bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(heads, hidden, output, bias=spec.output_bias, dtype=dtype, rngs=rngs)
        norm = partial(RMSNorm, head_dim, "head_dim", eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)
        self.q_norm = norm() if spec.qk_norm else None
        self.k_norm = norm() if spec.qk_norm else None
        self.kv_scales: nnx.Param[Array] | None = nnx.data(None)  # of `kv_scales.add_kv_scales`
        self.window = spec.window
        self.scale = head_dim**-0.5
        self.ops = ops

    def __call__(
        self,
        x: Float[Array, "T D"],
        cache: Cache,
        rotate: Rotation,
        sequences: Sequences,
        *,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "T D"], Cache]:
        adapters = adapters_of(sequences)
        queries, keys, values = self.q_proj(x, adapters), self.k_proj(x, adapters), self.v_proj(x, adapters)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        lies, rows = self.ops.partition.constrain, "block_tokens"
        queries, keys = lies(rotate(queries), (rows, "heads")), lies(rotate(keys), (rows, "kv_heads"))
        values = lies(lies(values, (rows, "kv_heads")), (None, "kv_heads"))
        queries, keys = lies(queries, (None, "heads")), lies(keys, (None, "kv_heads"))
        scales = None if self.kv_scales is None else self.kv_scales[...]
        out, cache = self.ops.attention(
            queries, keys, values, cache, sequences, layer=layer, scale=self.scale, window=self.window, kv_scales=scales
        )
        out = lies(out, (rows, "output_heads"))
        return self.o_proj(out, adapters), cache


class Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        config: ModelConfig,
        spec: AttentionSpec,
        experts: ExpertsConfig | None,
        *,
        ops: Ops,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ):
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, "embed", eps=eps, dtype=dtype, rngs=rngs)
        self.self_attn = Attention(config, spec, ops=ops, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(size, "embed", eps=eps, dtype=dtype, rngs=rngs)
        activation, inner = config.hidden_act, config.intermediate_size
        self.mlp = (
            MLP(size, inner, activation=activation, bias=config.mlp_bias, dtype=dtype, rngs=rngs)
            if experts is None
            else Mixture(size, experts, activation=activation, ops=ops, dtype=dtype, rngs=rngs)
        )
        self.ops = ops

    def __call__(
        self,
        hidden: Float[Array, "T D"],
        cache: Cache,
        rotate: Rotation,
        sequences: Sequences,
        *,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "T D"], Cache]:
        lies, between, within = self.ops.partition.constrain, ("tokens", "embed"), ("block_tokens", "embed")
        x = lies(self.input_layernorm(hidden), within)
        attended, cache = self.self_attn(x, cache, rotate, sequences, layer=layer)
        hidden = hidden + lies(attended, between)
        x = lies(self.post_attention_layernorm(hidden), within)
        return hidden + lies(self.mlp(x, sequences), between), cache


class Decoder(nnx.Module):
    """Token ids to final hidden states: what checkpoints store under `model.`.

    `layers` has one entry for every layer that is not like an earlier one of its run, with the parameters of all that
    are; unrolled, one a layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        kinds: list[LayerKind],
        *,
        ops: Ops,
        dtype: DTypeLike,
        rngs: nnx.Rngs | None,
        scan_layers: bool,
    ):
        self.config = config
        self.ops = ops
        stages = ops.num_stages
        windows = [spec.window for spec, _ in of_one_stage(kinds, stages)]
        self.cache_layout = CacheLayout.of(windows, config.max_model_len)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.runs = (staged_run(kinds, stages),) if stages > 1 else layer_runs(kinds, scan=scan_layers)
        self.layers = nnx.List(
            [
                stack_layers(
                    Layer(config, *kinds[indices[0]], ops=ops, dtype=dtype, rngs=rngs), indices, size=run.repeats
                )
                for run in self.runs
                for indices in map(run.layers_of, range(run.period))
            ]
        )
        self.norm = RMSNorm(config.hidden_size, "embed", eps=config.rms_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(
        self, token_ids: Int[Array, " T"], positions: Int[Array, " T"], cache: Cache, sequences: Sequences
    ) -> tuple[Float[Array, "T D"], Cache]:
        config = self.config
        frequencies, attention_factor = inverse_frequencies(
            config.rope, max_position_embeddings=config.max_position_embeddings, max_model_len=config.max_model_len
        )
        rotate = rotation(positions, frequencies, attention_factor)
        if isinstance(sequences, SequenceTable):
            assert cache is not None
            sequences = self.ops.prepare(
                sequences,
                cache,
                windows=self.cache_layout.windows,
                num_heads=config.num_attention_heads,
                head_dim=config.head_dim,
                dtype=self.embed_tokens.weight.dtype,
            )
        layers = iter(self.layers)
        runs = [(run, list(itertools.islice(layers, run.period))) for run in self.runs]
        lies = self.ops.partition.constrain
        # First as the table gives it: rows that are split at once would split what the token ids come from.
        hidden = lies(lies(self.embed_tokens(token_ids), (None, "embed")), ("tokens", "embed"))
        hidden, cache = self.ops.run_layers(runs, hidden, cache, rotate, sequences, self.cache_layout)
        return self.norm(hidden), cache


class LlamaForCausalLM(nnx.Module):
    """A decoder over flat tokens; subclasses state how their attention differs.

    With `rngs=None` nothing is drawn: build it so inside `nnx.eval_shape` for its shapes and axes without its memory.
    With `scan_layers`, the parameters of like layers are stacked and the layers run as a loop (see `layer_runs`).
    """

    # Checkpoint layout -> ours; parameter names are the same. Anything else is stored as it is used.
    HF_WEIGHTS: ClassVar[tuple[Rule, ...]] = (
        Rule(r"self_attn\.(q|k|v)_proj\.weight", "(heads head_dim) embed -> embed heads head_dim"),
        Rule(r"self_attn\.(q|k|v)_proj\.bias", "(heads head_dim) -> heads head_dim"),
        Rule(r"self_attn\.o_proj\.weight", "embed (heads head_dim) -> heads head_dim embed"),
        Rule(r"mlp\.\w+_proj\.weight", "out in -> in out"),
        Rule(r"lm_head\.weight", "vocab embed -> embed vocab"),
    )

    def __init__(
        self, config: ModelConfig, *, ops: Ops, dtype: DTypeLike, rngs: nnx.Rngs | None, scan_layers: bool = False
    ):
        kinds = self.layer_kinds(config)
        self.model = Decoder(config, kinds, ops=ops, dtype=dtype, rngs=rngs, scan_layers=scan_layers)
        size, vocab_size = (config.hidden_size,), (config.vocab_size,)
        head = partial(Linear, size, vocab_size, ("embed", "vocab"), bias=False, dtype=dtype, rngs=rngs)
        self.lm_head = None if config.tie_word_embeddings else head()

    @staticmethod
    def attention_spec(config: ModelConfig, layer: int) -> AttentionSpec:
        """The attention of one layer; a family's one point of difference."""
        if "sliding_attention" in config.layer_types:
            raise ValueError(f"layer_types of layer {layer} asks for sliding_attention, which Llama does not have")
        return AttentionSpec(qkv_bias=config.attention_bias, output_bias=config.attention_bias)

    @staticmethod
    def layer_experts(config: ModelConfig, layer: int) -> ExpertsConfig | None:
        """The experts of one layer, which a family of mixtures has; None: a plain feed-forward."""
        if config.experts is not None:
            raise ValueError(f"num_experts is {config.experts.num_experts}, and {config.architecture} has no experts")
        return None

    @classmethod
    def attention_specs(cls, config: ModelConfig) -> list[AttentionSpec]:
        """The attention of every layer; a window that no sequence outgrows is none."""
        specs = [cls.attention_spec(config, layer) for layer in range(config.num_hidden_layers)]
        longest = config.max_model_len
        return [dataclasses.replace(spec, window=None) if (spec.window or 0) >= longest else spec for spec in specs]

    @classmethod
    def layer_kinds(cls, config: ModelConfig) -> list[LayerKind]:
        """What every layer is."""
        return [(spec, cls.layer_experts(config, layer)) for layer, spec in enumerate(cls.attention_specs(config))]

    @classmethod
    def cache_layout(cls, config: ModelConfig, num_stages: int = 1) -> CacheLayout:
        """How the layers, or those of one of several stages, share pages."""
        kinds = of_one_stage(cls.layer_kinds(config), num_stages)
        return CacheLayout.of([spec.window for spec, _ in kinds], config.max_model_len)

    def __call__(
        self, token_ids: Int[Array, " T"], positions: Int[Array, " T"], cache: Cache, sequences: Sequences
    ) -> tuple[Float[Array, "T D"], Cache]:
        """Hidden states after the final norm, and the cache with the tokens' keys and values.

        The tokens of all sequences lie one after another; `positions` count from 0 within a sequence. Without a cache,
        `sequences` holds each token's segment id.
        """
        return self.model(token_ids, positions, cache, sequences)

    def compute_logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Float32 logits of what follows each token, from its hidden state after the final norm."""
        lies = self.model.ops.partition.constrain
        hidden = lies(hidden, (None, "embed"))
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return lies(head.project(hidden), (None, "vocab"))
