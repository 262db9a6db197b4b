"""What drawing a step's tokens costs in each sampling mode, beside XLA's argmax: rows of logits in, tokens out.

    python benchmarks/sampling.py [--rows 64] [--vocab-size 131072] [--repeats 15]

Every case is run in turn, again and again, and its quickest run counts: other load on the machine slows all of them.
Logits are normal with a standard deviation of 3, where 256 tokens hold 90 % of a row's probability at a temperature of
0.6, and thousands at 1, which the cases named "flat" have.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_engine.grammar.bitmasks import num_words
from jax_engine.sampling.full_sampling import Ask, FullRows, FullState, sample_full
from jax_engine.sampling.sampler import SamplingMode, SamplingRows, sample

PEER = "XLA's argmax"  # what greedy decoding usually does
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy, full": {"temperature": 0.0},
    "temperature": {},
    "top-k 50": {"top_k": 50},
    "top-p 0.9": {"top_p": 0.9},
    "top-p 0.9, flat": {"top_p": 0.9, "temperature": 1.0},
    "top-p 0.1, flat": {"top_p": 0.1, "temperature": 1.0},
    "top-k 1000": {"top_k": 1000, "temperature": 1.0},
    "masks": {"temperature": 0.0, "asks": [Ask.MASKS]},
    "penalties": {"temperature": 0.0, "asks": [Ask.PENALTIES]},
    "logit bias": {"temperature": 0.0, "asks": [Ask.BIAS]},
    "bad words": {"temperature": 0.0, "asks": [Ask.BAD_WORDS]},
    "everything": {"top_k": 50, "top_p": 0.9, "min_p": 0.02, "asks": list(Ask)},
}


def sampling_rows(num_rows: int, vocab_size: int, **given: Any) -> SamplingRows:
    """Rows that all ask for the same."""
    values: dict[str, Any] = {"temperature": 0.6, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | given
    columns = {name: jnp.full(num_rows, value) for name, value in values.items()}
    return SamplingRows(
        **columns,
        keys=jnp.tile(jnp.arange(2, dtype=jnp.uint32), (num_rows, 1)),
        positions=jnp.arange(num_rows),
        hold_until=jnp.zeros(num_rows, jnp.int32),
        held_back=jnp.full((num_rows, 32), vocab_size),
    )


def full_state(num_rows: int, vocab_size: int) -> FullState:
    """Slots that ask for everything: 1,000 tokens of output and 50 of bias each, and two bad words."""
    generator = np.random.default_rng(0)
    state = FullState.zeros(num_rows, vocab_size, hidden_size=1)
    counts = np.zeros((num_rows, vocab_size), np.int32)
    tokens = generator.integers(0, vocab_size, (num_rows, 1000))
    np.add.at(counts, (np.arange(num_rows)[:, None], tokens), 1)
    bias = np.full(state.bias_tokens.shape, vocab_size)
    bias[:, :50] = tokens[:, :50]
    bad_words = np.full(state.bad_words.shape, -1)
    bad_words[:, :, -1] = vocab_size
    bad_words[:, :2, -1] = tokens[:, :2]
    return replace(
        state,
        allowed=jnp.full((num_rows, num_words(vocab_size)), 0xFFFFFFFE, jnp.uint32),
        in_prompt=jnp.full((num_rows, num_words(vocab_size)), 1 << 7, jnp.uint32),
        counts=jnp.asarray(counts),
        penalties=jnp.tile(jnp.array([0.5, 0.5, 1.2]), (num_rows, 1)),
        bias_tokens=jnp.asarray(bias, jnp.int32),
        bias_values=jnp.ones(state.bias_values.shape),
        bad_words=jnp.asarray(bad_words, jnp.int32),
    )


def cases(num_rows: int, vocab_size: int) -> dict[str, Callable[..., Any]]:
    """What to time, by name: XLA's argmax and each mode. Each takes `logits`, which it may write over, as in a step."""
    state = full_state(num_rows, vocab_size)
    greedy = jax.jit(partial(sample, mode=SamplingMode.GREEDY), donate_argnames="logits")
    full = jax.jit(partial(sample_full, num_logprobs=20), donate_argnames="logits")
    everything = jnp.full((num_rows, num_words(vocab_size)), 0xFFFFFFFF, jnp.uint32)
    argmax = jax.jit(lambda logits: jnp.argmax(logits, axis=-1))
    found: dict[str, Callable[..., Any]] = {
        PEER: argmax,
        "greedy": partial(greedy, rows=sampling_rows(num_rows, vocab_size)),
    }
    for name, settings in SETTINGS.items():
        given = dict(settings)
        asks = np.isin(np.arange(len(Ask)), given.pop("asks", []))
        sampling = sampling_rows(num_rows, vocab_size, **given)
        slots, is_controlled = jnp.arange(num_rows)[::-1], jnp.full(num_rows, bool(asks.any()))
        rows = FullRows(sampling, slots, is_controlled, everything, jnp.zeros(num_rows, bool))
        found[name] = partial(full, rows=rows, state=state, asks=asks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--rows", 64), ("--vocab-size", 131072), ("--repeats", 15)):
        parser.add_argument(name, type=int, default=default)
    arguments = parser.parse_args()
    timed = cases(arguments.rows, arguments.vocab_size)
    logits = jax.random.normal(jax.random.key(0), (arguments.rows, arguments.vocab_size)) * 3
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(arguments.repeats + 1):  # the first is for warming up, and never the quickest
        for name, run in timed.items():
            given = jax.block_until_ready(logits + 0)
            start = time.perf_counter()
            jax.block_until_ready(run(logits=given))
            best[name] = min(best[name], time.perf_counter() - start)
    print(f"{arguments.rows} rows, vocabulary {arguments.vocab_size}, {jax.devices()[0].device_kind}")
    for name, seconds in best.items():
        ratios = f"{seconds / best[PEER]:5.2f} x argmax {seconds / best['greedy']:6.2f} x greedy"
        print(f"{name:<18} {seconds * 1e3:8.2f} ms {ratios}")


if __name__ == "__main__":
    main()
