"""Logits processors that the tests register by name, and some that cannot be."""

import jax.numpy as jnp
from jax import Array

from jax_engine.sampling.logits_processors import ProcessorState


def never_again(logits: Array, state: ProcessorState, *, repeats: float = 1.0) -> Array:
    """No token that is in the output, unless a request gives `repeats=1` (the default: let them be)."""
    is_out = (state.output_counts > 0) & (repeats < 1)[:, None]
    return jnp.where(is_out, -jnp.inf, logits)


def in_turn(logits: Array, state: ProcessorState, *, first: float = -1.0) -> Array:
    """From a request's `first` token on, one after another; checks what positions say of the output on the way."""
    wanted = first.astype(jnp.int32) + state.num_output_tokens
    is_wanted = jnp.arange(logits.shape[1]) == wanted[:, None]
    return jnp.where((first >= 0)[:, None] & is_wanted, jnp.inf, logits)


def from_the_prompt(logits: Array, state: ProcessorState, *, prompt_only: float = 0.0) -> Array:
    """Tokens of the prompt alone, before the position that a request gives."""
    is_out = (state.positions < prompt_only)[:, None] & ~state.in_prompt
    return jnp.where(is_out, -jnp.inf, logits)


def of_one(logits: Array) -> Array:
    return logits


def without_default(logits: Array, state: ProcessorState, *, strength: float) -> Array:
    return logits * strength


def other_default(logits: Array, state: ProcessorState, *, repeats: float = 7.0) -> Array:
    return logits * repeats[:, None]


NOT_A_FUNCTION = 3
