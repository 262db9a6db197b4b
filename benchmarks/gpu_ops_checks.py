"""Samplers and mixtures of experts against what they are to compute, worked out in NumPy and by the specification."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import sampling
from gpu_timing import compiled_as_steps
from jax_engine.cuda_fallback.experts import blocked_experts, gathered_experts, ragged_experts
from jax_engine.pallas_kernels import reference
from jax_engine.sampling.full_sampling import Ask, FullRows, sample_full
from jax_engine.sampling.sampler import SamplingMode, SamplingRows, sample

EXPERTS = {"blocked": blocked_experts, "gathered": gathered_experts, "ragged_dot": ragged_experts}
NORM_LIMIT = 1e-2  # of experts' results in bfloat16
MOST_OFF = 0.02  # of tokens that may be no likelier than rounding makes them
NUM_DRAWS = 2048  # of one distribution


def logits_shape(*, tiny: bool) -> tuple[int, int]:
    """Rows and vocabulary of what is drawn from."""
    return (2048, 64) if tiny else (256, 128256)


@cache
def draw_in(mode: SamplingMode) -> Callable[[Array, SamplingRows], Array]:
    """The tokens drawn in a mode: one program a shape, whatever rows ask for."""
    return compiled_as_steps(partial(sample, mode=mode))


def mixture(num_rows: int, *, tiny: bool, seed: int) -> dict[str, Any]:
    """Rows and experts of Qwen3-30B-A3B's shape, in bfloat16."""
    hidden, inner, experts, chosen = (32, 48, 8, 2) if tiny else (2048, 768, 128, 8)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 6)

    def normal(key: Array, *shape: int) -> Array:
        return (jax.random.normal(key, shape, jnp.float32) * shape[-2] ** -0.5).astype(jnp.bfloat16)

    scores = jax.random.uniform(keys[0], (num_rows, experts))
    return {
        "x": jax.random.normal(keys[1], (num_rows, hidden), jnp.bfloat16),
        "chosen": jax.lax.top_k(scores, chosen)[1],
        "shares": jax.random.uniform(keys[2], (num_rows, chosen)),
        "gate": normal(keys[3], 1, experts, hidden, inner),
        "up": normal(keys[4], 1, experts, hidden, inner),
        "down": normal(keys[5], 1, experts, inner, hidden),
    }


def checks(*, seed: int, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(name, check) of samplers and experts; a check gives a record's fields."""
    logits = 3 * jax.random.normal(jax.random.key(seed, impl="rbg"), logits_shape(tiny=tiny))
    for mode in (SamplingMode.GREEDY, SamplingMode.SAMPLE):
        yield f"sampling, {mode}, the likeliest", partial(check_greedy, logits, mode)
    kept: dict[str, Mapping[str, Any]] = {
        "top-k 50": {"top_k": 50},
        "top-p 0.9": {"top_p": 0.9},
        "min-p 0.1": {"min_p": 0.1},
    }
    for name, given in kept.items():
        yield f"sampling, {name}, what is kept", partial(check_kept, logits, given)
    yield "sampling, full, controlled", partial(check_full, logits)
    yield "sampling, temperature, how often each", partial(check_distribution, seed=seed)
    for name, kernel in EXPERTS.items():
        yield f"experts, {name}", partial(check_experts, kernel, seed=seed, tiny=tiny)


def verdict(*, ok: bool, value: float, unit: str, limit: float) -> dict[str, Any]:
    return {"status": "passed" if ok else "failed", "value": value, "unit": unit, "note": f"limit {limit:g}"}


def check_greedy(logits: Array, mode: SamplingMode) -> dict[str, Any]:
    """A temperature of zero takes each row's likeliest token."""
    asked = sampling.sampling_rows(*logits.shape, temperature=0.0)
    drawn = np.asarray(draw_in(mode)(logits, asked))
    wrong = float((drawn != np.asarray(logits).argmax(axis=1)).mean())
    return verdict(ok=wrong == 0, value=wrong, unit="of the rows wrong", limit=0)


def check_kept(logits: Array, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn is among the tokens that a sort in float64 keeps, but for those at the very edge."""
    asked = sampling.sampling_rows(*logits.shape, temperature=1.0, **given)
    drawn = np.asarray(draw_in(SamplingMode.SAMPLE)(logits, asked))
    wide = np.asarray(logits, np.float64)
    weights = np.exp(wide - wide.max(axis=1, keepdims=True))
    ranked = -np.sort(-weights, axis=1)
    own = weights[np.arange(len(drawn)), drawn]
    if "top_k" in given:
        edge = ranked[:, given["top_k"] - 1]
    elif "top_p" in given:
        sums = np.cumsum(ranked, axis=1)
        edge = ranked[np.arange(len(drawn)), (sums < given["top_p"] * sums[:, -1:]).sum(axis=1)]
    else:
        edge = np.full(len(drawn), given["min_p"])
    wrong = float((own < edge * (1 - 1e-5)).mean())
    return verdict(ok=wrong <= MOST_OFF, value=wrong, unit="of the rows outside", limit=MOST_OFF)


def check_full(logits: Array) -> dict[str, Any]:
    """Biases, penalties, masks and bad words together, and then the likeliest, as NumPy has them."""
    rows, vocab_size = logits.shape
    state, slots = sampling.full_state(rows, vocab_size), np.arange(rows)[::-1]
    everything = jnp.full(state.allowed.shape, 0xFFFFFFFF, jnp.uint32)
    asked = sampling.sampling_rows(rows, vocab_size, temperature=0.0)
    full = FullRows(asked, jnp.asarray(slots), jnp.ones(rows, bool), everything, jnp.zeros(rows, bool))
    run = compiled_as_steps(partial(sample_full, num_logprobs=1))
    drawn = np.asarray(run(logits, full, state, jnp.ones(len(Ask), bool)).tokens)
    columns = ("allowed", "in_prompt", "counts", "penalties", "bias_tokens", "bias_values", "bad_words")
    own = {name: np.asarray(getattr(state, name))[slots] for name in columns}
    wanted = np.pad(np.asarray(logits, np.float64), ((0, 0), (0, 1)))  # the last is where nothing is asked for
    index = np.arange(rows)[:, None]
    np.add.at(wanted, (index, own["bias_tokens"]), own["bias_values"])
    wanted = wanted[:, :vocab_size]

    def bits(words: np.ndarray) -> np.ndarray:
        return (words[:, :, None] >> np.arange(32) & 1).reshape(rows, -1)[:, :vocab_size].astype(bool)

    presence, frequency, repetition = (own["penalties"][:, [column]] for column in range(3))
    is_seen = (own["counts"] > 0) | bits(own["in_prompt"])
    wanted = np.where(is_seen, np.where(wanted > 0, wanted / repetition, wanted * repetition), wanted)
    wanted -= frequency * own["counts"] + presence * (own["counts"] > 0)
    wanted[~bits(own["allowed"])] = -np.inf
    wanted = np.pad(wanted, ((0, 0), (0, 1)))
    wanted[index, own["bad_words"][:, :, -1]] = -np.inf
    wrong = float((drawn != wanted[:, :vocab_size].argmax(axis=1)).mean())
    return verdict(ok=wrong <= MOST_OFF, value=wrong, unit="of the rows wrong", limit=MOST_OFF)


def check_distribution(*, seed: int) -> dict[str, Any]:
    """Many rows of the same logits draw each token as often as its probability says."""
    rows, vocab_size = NUM_DRAWS, 64
    logits = jnp.tile(jax.random.normal(jax.random.key(seed), (1, vocab_size)), (rows, 1))
    asked = sampling.sampling_rows(rows, vocab_size, temperature=1.0)
    drawn = np.asarray(draw_in(SamplingMode.SAMPLE)(logits, asked))
    weights = np.exp(np.asarray(logits[0], np.float64))
    frequencies = np.bincount(drawn, minlength=vocab_size)[:vocab_size] / rows
    distance = float(np.abs(frequencies - weights / weights.sum()).sum() / 2)
    limit = 0.12  # 0.07 is to be expected of so many draws
    return verdict(ok=distance <= limit, value=distance, unit="total variation", limit=limit)


def check_experts(kernel: Callable[..., Array], *, seed: int, tiny: bool) -> dict[str, Any]:
    given = mixture(16 if tiny else 64, tiny=tiny, seed=seed)
    options: dict[str, Any] = {"layer": 0, "activation": jax.nn.silu}
    found = np.asarray(jax.jit(partial(kernel, **options))(**given), np.float32)
    with jax.default_matmul_precision("highest"):  # no TF32
        wanted = np.asarray(jax.jit(partial(reference.expert_feed_forward, **options))(**given), np.float32)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return verdict(ok=error <= NORM_LIMIT, value=error, unit="of the norm", limit=NORM_LIMIT)
