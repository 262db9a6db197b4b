"""Every family computes what `transformers` computes, from the checkpoint that `transformers` writes.

Tiny random models in float32. Every parameter is random, also norms and biases, so that one which is ignored, swapped
or transposed shows. Sequences are longer than the sliding windows and than the original length of the rope scalings.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from jax_engine.loading.loader import load_config, load_model
from jax_engine.models.ops import dense_ops
from jax_engine.models.registry import MODELS

NUM_TOKENS = 48
NUM_PROMPT = 16
ORIGINAL_LENGTH = 12
VOCAB_SIZE = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
PAIRS = 8  # rotated pairs of a head of 64 / 4 elements
LENGTHS: dict[str, Any] = {"max_position_embeddings": 4 * ORIGINAL_LENGTH}


def rope(rope_type: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **settings}}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL_LENGTH,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_LENGTH)
LONGROPE = rope(
    "longrope",
    original_max_position_embeddings=ORIGINAL_LENGTH,
    short_factor=[1.0 + 0.1 * pair for pair in range(PAIRS)],
    long_factor=[1.0 + 0.7 * pair for pair in range(PAIRS)],
)
MOE: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# One row a family, and one for each option of it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama heads": ("llama", {"head_dim": 20, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "llama linear": ("llama", rope("linear", factor=4.0) | {"max_position_embeddings": ORIGINAL_LENGTH}),
    "llama dynamic": ("llama", rope("dynamic", factor=4.0) | {"max_position_embeddings": ORIGINAL_LENGTH}),
    "llama yarn": ("llama", YARN | LENGTHS),
    "llama longrope": ("llama", LONGROPE | LENGTHS),
    "llama 3.1": ("llama", LLAMA3 | LENGTHS),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral full": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7}),
    "qwen2 moe": (
        "qwen2_moe",
        MOE | {"shared_expert_intermediate_size": 56, "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen2 moe options": (
        "qwen2_moe",
        MOE | {"shared_expert_intermediate_size": 56, "num_hidden_layers": 1, "qkv_bias": False},
    ),
    "qwen3 moe": ("qwen3_moe", MOE | {"head_dim": 24}),
    "qwen3 moe some layers": (
        "qwen3_moe",
        MOE
        | {
            "norm_topk_prob": True,
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [5],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3 in turn": (
        "qwen3",
        {
            "num_hidden_layers": 5,
            "layer_types": [f"{kind}_attention" for kind in "sliding full sliding full full".split()],
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "qwen3 options": (
        "qwen3",
        {
            "head_dim": 24,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
}
# Their frequencies depend on the length, so that cached generation in transformers mixes two sets of them.
LENGTH_DEPENDENT = ("llama dynamic", "llama longrope")


def random_model(model_type: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(model_type, **(SHAPE | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        # Matrices keep the scale of what passes; norms and biases are visibly away from 1 and 0.
        parameter.data = noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else noise * 0.3 + 1
    return model


class OurModel:
    """A checkpoint run by this package, over one sequence without a cache."""

    def __init__(self, folder: Path, dtype: Any = jnp.float32, max_model_len: int | None = None, **options: Any):
        config, model_class = load_config(folder)
        self.config = config if max_model_len is None else config.with_max_model_len(max_model_len)
        settings = {"model_class": model_class, "ops": dense_ops(), "dtype": dtype} | options
        structure, self.leaves = load_model(folder, self.config, **settings)

        @jax.jit
        def forward(leaves: tuple[jax.Array, ...], tokens: jax.Array, positions: jax.Array, segments: jax.Array):
            model = structure.merge(leaves)
            hidden, _ = model(tokens, positions, None, segments)
            return model.compute_logits(hidden)

        self.forward = functools.partial(forward, self.leaves)

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """Logits [len(token_ids), V]; what pads the sequence lies in every token's future."""
        padded = np.zeros(NUM_TOKENS, np.int32)
        padded[: len(token_ids)] = token_ids
        logits = self.forward(padded, np.arange(NUM_TOKENS), np.zeros(NUM_TOKENS, np.int32))
        return np.asarray(logits)[: len(token_ids)]

    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        token_ids = list(token_ids)
        for _ in range(num_tokens):
            token_ids.append(int(self.logits(token_ids)[-1].argmax()))
        return token_ids


def random_token_ids(count: int) -> list[int]:
    return np.random.default_rng(1).integers(0, VOCAB_SIZE, count).tolist()


@torch.no_grad()
def their_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> np.ndarray:
    return model(torch.tensor([token_ids])).logits[0].float().numpy()


@torch.no_grad()
def their_greedy(model: transformers.PreTrainedModel, token_ids: list[int], num_tokens: int) -> list[int]:
    prompt = torch.tensor([token_ids])
    settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, generation_config=settings)[0].tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_gives_the_logits_and_tokens_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = random_model(*CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = OurModel(tmp_path, max_model_len=NUM_TOKENS)
    token_ids = random_token_ids(NUM_TOKENS)
    np.testing.assert_allclose(ours.logits(token_ids), their_logits(theirs, token_ids), rtol=2e-5, atol=2e-5)
    scanned = OurModel(tmp_path, max_model_len=NUM_TOKENS, scan_layers=True)
    np.testing.assert_allclose(scanned.logits(token_ids), ours.logits(token_ids), rtol=2e-5, atol=2e-5)
    if case not in LENGTH_DEPENDENT:
        prompt, num_tokens = token_ids[:NUM_PROMPT], NUM_TOKENS - NUM_PROMPT
        assert ours.greedy(prompt, num_tokens) == their_greedy(theirs, prompt, num_tokens)


def test_every_registered_family_is_compared() -> None:
    names = {type(transformers.AutoConfig.for_model(kind)) for kind, _ in CASES.values()}
    compared = {transformers.AutoModelForCausalLM._model_mapping[name].__name__ for name in names}
    assert compared == MODELS.keys()


@pytest.mark.parametrize("case", LENGTH_DEPENDENT)
def test_length_dependent_rope_within_the_original_length(case: str, tmp_path: Path) -> None:
    """Served no longer than the original length, the frequencies are the unscaled (short) ones for every sequence."""
    theirs = random_model(*CASES[case])
    theirs.save_pretrained(tmp_path)
    token_ids = random_token_ids(ORIGINAL_LENGTH)
    ours = OurModel(tmp_path, max_model_len=ORIGINAL_LENGTH)
    np.testing.assert_allclose(ours.logits(token_ids), their_logits(theirs, token_ids), rtol=2e-5, atol=2e-5)


def test_a_sharded_checkpoint_equals_a_single_file(tmp_path: Path) -> None:
    theirs = random_model(*CASES["llama"])
    theirs.save_pretrained(tmp_path / "single")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    single, sharded = OurModel(tmp_path / "single"), OurModel(tmp_path / "sharded")
    for one, other in zip(single.leaves, sharded.leaves, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bfloat16_checkpoint_keeps_its_values(tmp_path: Path) -> None:
    random_model(*CASES["qwen2"]).to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    token_ids = random_token_ids(NUM_TOKENS)
    expected = their_logits(theirs, token_ids)
    wide, narrow = OurModel(tmp_path), OurModel(tmp_path, dtype=jnp.bfloat16)
    assert wide.config.dtype == "bfloat16"
    assert {leaf.dtype for leaf in narrow.leaves} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(wide.logits(token_ids), expected, rtol=2e-5, atol=2e-5)
    # bfloat16 keeps 8 bits; the error of a step grows with the square root of the few dozen it passes through.
    assert np.abs(narrow.logits(token_ids) - expected).mean() < 0.03 * expected.std()


def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    """Two sequences in one row of flat tokens give the logits of each alone."""
    random_model(*CASES["mistral"]).save_pretrained(tmp_path)
    ours = OurModel(tmp_path)
    first, second = random_token_ids(20), random_token_ids(28)[::-1]
    positions, segments = np.array([*range(20), *range(28)]), np.array([0] * 20 + [1] * 28)
    together = np.asarray(ours.forward(np.array(first + second), positions, segments))
    np.testing.assert_allclose(together[:20], ours.logits(first), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(together[20:], ours.logits(second), rtol=2e-5, atol=2e-5)
