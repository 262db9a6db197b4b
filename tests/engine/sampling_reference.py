"""What the sampling parameters mean, in float64 NumPy, a row and a token at a time; nothing of the product's own."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


def controlled_logits(logits: NDArray[Any], prompt: list[int], output: list[int], controls: dict[str, Any]) -> Row:
    """The logits of the token after `output`, as `TokenControls` by these names change them."""
    row = np.array(logits, np.float64)
    for token, bias in controls.get("logit_bias", {}).items():
        row[token] += bias
    repetition = controls.get("repetition_penalty", 1.0)
    for token in {*prompt, *output}:
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token in output:
        row[token] -= controls.get("frequency_penalty", 0.0)
    for token in set(output):
        row[token] -= controls.get("presence_penalty", 0.0)
    allowed = controls.get("allowed_token_ids")
    if allowed is not None:
        row[[token for token in range(len(row)) if token not in allowed]] = -np.inf
    for *front, last in controls.get("bad_words", ()):
        if output[len(output) - len(front) :] == front and len(front) <= len(output):
            row[last] = -np.inf
    return row


def distribution(row: Row, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Row:
    """Temperature, min-p, top-k, top-p, by sorting."""
    scaled = np.asarray(row, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    weights[weights < min_p] = 0
    order = np.argsort(-weights, kind="stable")
    if top_k > 0:
        weights[order[top_k:]] = 0
    shares = weights[order] / weights.sum()
    # The fewest that reach top_p: a token stays if those before it fall short.
    weights[order[np.cumsum(shares) - shares >= top_p]] = 0
    return weights / weights.sum()


def uniform(key: tuple[int, int], position: int, tries: int) -> float:
    """The number that the token at a position is drawn with, after so many others were rejected."""
    own = jax.random.fold_in(jax.random.wrap_key_data(np.asarray(key, np.uint32), impl="threefry2x32"), position)
    return float(jax.random.uniform(jax.random.fold_in(own, tries) if tries else own)) + 2.0**-24


def drawn_tokens(
    shares: Row, top_p: float, number: Callable[[int], float], *, tries: int = 0, tolerance: float = 1e-4
) -> set[int]:
    """The first token at which the cumulative distribution passes the number of its try, and in front of which there is
    less than `top_p`; after one that is not so, of what is likelier. And others where either is a close call.
    """
    cumulative = np.cumsum(shares) / shares.sum()
    last = int(np.flatnonzero(shares)[-1])
    near = [number(tries) - tolerance, number(tries), number(tries) + tolerance]
    found = set()
    for token in {min(int(np.searchsorted(cumulative, max(value, 0.0), side="right")), last) for value in near}:
        above = np.where(shares > shares[token], shares, 0)
        if top_p == 1 or above.sum() < top_p + tolerance:
            found.add(token)
        if top_p < 1 and above.sum() >= top_p - tolerance:
            found |= drawn_tokens(above, top_p, number, tries=tries + 1, tolerance=tolerance)
    return found
