"""What a model is, read from a Hugging Face `config.json`."""

import dataclasses

from jax_engine.models.fields import Fields, boolean, integer, listing, number, text
from jax_engine.models.rope import RopeConfig
from jax_engine.models.stored_quantization import StoredQuantization

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
LAYER_TYPES = ("full_attention", "sliding_attention")
# What a Qwen configuration means when it does not say.
_QWEN2_MAX_WINDOW_LAYERS = 28
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "max_model_len",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of a layer's feed-forward; field names are those of `config.json`."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most num_experts ({self.num_experts})"
            )

    @classmethod
    def from_hf(cls, hf: Fields) -> "ExpertsConfig | None":
        """Read a parsed `config.json`; None if it speaks of no experts."""
        # Mixtral's name and the Qwens', of which transformers 5 writes the former for both.
        name = "num_experts" if hf.get("num_experts") is not None else "num_local_experts"
        if hf.get(name) is None:
            return None
        shared = "shared_expert_intermediate_size"
        return cls(
            num_experts=integer(hf, name),
            num_experts_per_tok=integer(hf, "num_experts_per_tok"),
            moe_intermediate_size=integer(hf, "moe_intermediate_size", default=integer(hf, "intermediate_size")),
            norm_topk_prob=boolean(hf, "norm_topk_prob"),
            decoder_sparse_step=integer(hf, "decoder_sparse_step", default=1),
            mlp_only_layers=listing(hf, "mlp_only_layers", int),
            shared_expert_intermediate_size=None if hf.get(shared) is None else integer(hf, shared),
        )

    def are_in(self, layer: int) -> bool:
        """Whether a layer has them; the others have a plain feed-forward."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder's shape and options; field names are those of `config.json`. Lengths are in tokens.

    `max_model_len` is the longest sequence that will be served; it chooses the frequencies of the two rope scalings
    that depend on it (see `rope.py`) and nothing else. An engine that serves another length asks for
    `with_max_model_len`. Which of the options a family heeds is said in that family's file.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    max_model_len: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = True
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 0
    layer_types: tuple[str, ...] = ()
    dtype: str = "float32"
    quantization: StoredQuantization | None = None  # of the weights as they are stored
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        for name in _POSITIVE:
            _check_positive(name, values[name])
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.rope.rotary_dim > self.head_dim:
            raise ValueError(f"rotary dimension ({self.rope.rotary_dim}) must not exceed head_dim ({self.head_dim})")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; supported: {', '.join(ACTIVATIONS)}")
        if self.sliding_window is not None:
            _check_positive("sliding_window", self.sliding_window)
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries; it must have one a layer ({self.num_hidden_layers})"
            )
        for layer_type in self.layer_types:
            if layer_type not in LAYER_TYPES:
                raise ValueError(f"layer_types holds {layer_type!r}; supported: {', '.join(LAYER_TYPES)}")
        for layer in () if self.experts is None else self.experts.mlp_only_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"mlp_only_layers holds {layer}; its entries must be layers, 0 to {self.num_hidden_layers - 1}"
                )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types holds 'sliding_attention', so sliding_window must be set")

    @classmethod
    def from_hf(cls, hf: Fields) -> "ModelConfig":
        """Read a parsed `config.json`. Raises ValueError naming the field that is missing, wrong or not supported."""
        hidden_size, num_heads = integer(hf, "hidden_size"), integer(hf, "num_attention_heads")
        head_dim = integer(hf, "head_dim", default=hidden_size // num_heads)
        length = integer(hf, "max_position_embeddings")
        rope = RopeConfig.from_hf(hf, head_dim=head_dim, max_position_embeddings=length)
        return cls(
            architecture=architecture_of(hf),
            vocab_size=integer(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=integer(hf, "intermediate_size"),
            num_hidden_layers=integer(hf, "num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=integer(hf, "num_key_value_heads", default=num_heads),
            head_dim=head_dim,
            max_position_embeddings=length,
            max_model_len=default_max_model_len(rope, length),
            rope=rope,
            rms_norm_eps=number(hf, "rms_norm_eps", default=1e-6),
            hidden_act=text(hf, "hidden_act", default="silu"),
            tie_word_embeddings=boolean(hf, "tie_word_embeddings"),
            attention_bias=boolean(hf, "attention_bias"),
            qkv_bias=boolean(hf, "qkv_bias", default=True),
            mlp_bias=boolean(hf, "mlp_bias"),
            experts=ExpertsConfig.from_hf(hf),
            # transformers writes 0 for the window of some models that have none.
            sliding_window=integer(hf, "sliding_window", default=0, low=0) or None,
            use_sliding_window=boolean(hf, "use_sliding_window"),
            max_window_layers=integer(hf, "max_window_layers", default=_QWEN2_MAX_WINDOW_LAYERS, low=0),
            layer_types=listing(hf, "layer_types", str),
            dtype=text(hf, "dtype", default=text(hf, "torch_dtype", default="float32")),
            quantization=StoredQuantization.from_hf(hf),
            bos_token_id=None if hf.get("bos_token_id") is None else integer(hf, "bos_token_id", low=0),
            eos_token_ids=_eos_token_ids(hf),
        )

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of one layer, or None; of a family that has some. ValueError when there are none in any."""
        if self.experts is None:
            raise ValueError(f"num_experts is missing; it must be an integer, for {self.architecture} has experts")
        return self.experts if self.experts.are_in(layer) else None

    @property
    def feed_forward_sizes(self) -> tuple[int, ...]:
        """The widths of the feed-forwards that all rows go through; none, where each layer has experts alone."""
        if self.experts is None:
            return (self.intermediate_size,)
        plain = not all(self.experts.are_in(layer) for layer in range(self.num_hidden_layers))
        sizes = self.intermediate_size if plain else None, self.experts.shared_expert_intermediate_size
        return tuple(size for size in sizes if size is not None)

    def with_max_model_len(self, max_model_len: int) -> "ModelConfig":
        """The same model, to be served with sequences of up to `max_model_len` tokens."""
        return dataclasses.replace(self, max_model_len=max_model_len)


def architecture_of(hf: Fields) -> str:
    """The one entry of `architectures`; ValueError when there is not exactly one."""
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(f"architectures is {architectures!r}; it must list one class name, e.g. ['LlamaForCausalLM']")
    return str(architectures[0])


def default_max_model_len(rope: RopeConfig, max_position_embeddings: int) -> int:
    """The longest sequence the checkpoint says it can handle, in tokens.

    Linear, dynamic and YaRN checkpoints state the length before scaling; Llama 3 and LongRoPE ones the length after it.
    """
    if rope.rope_type == "yarn":
        return max(max_position_embeddings, int(rope.original_max_position_embeddings * rope.factor))
    if rope.rope_type in ("linear", "dynamic"):
        return int(max_position_embeddings * rope.factor)
    return max_position_embeddings


def _eos_token_ids(hf: Fields) -> tuple[int, ...]:
    value = hf.get("eos_token_id")
    return (value,) if isinstance(value, int) else listing(hf, "eos_token_id", int)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
