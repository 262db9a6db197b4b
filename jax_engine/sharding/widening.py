"""A model wider than its checkpoint, so that devices divide it: heads are there several times, with zeros behind."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jax_engine.models.config import ModelConfig


@dataclass(frozen=True)
class Spread:
    """How the entries of a stored dimension lie in a wider one: in equal groups, of which each is there `copies` times,
    side by side, and then has `padding` zeros behind it.
    """

    stored: int  # entries in a checkpoint
    group: int  # entries of a group
    copies: int = 1
    padding: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether all lie as they are stored."""
        return self.copies == 1 and not self.padding

    def stored_range(self, start: int, stop: int) -> tuple[int, int]:
        """The least range of stored entries, not empty, that holds all that lie at places `start .. stop - 1`."""
        if self.is_plain:
            return start, stop
        found = self._sources(start, stop)
        found = found[found >= 0]
        return (int(np.min(found)), int(np.max(found)) + 1) if found.size else (0, 1)

    def fill(self, values: NDArray[Any], axis: int, start: int, stop: int) -> NDArray[Any]:
        """What lies at places `start .. stop - 1` of a dimension, from the values of `stored_range`."""
        if self.is_plain:
            return values
        sources = self._sources(start, stop)
        filled = values.take(np.maximum(sources - self.stored_range(start, stop)[0], 0), axis)
        filled[(slice(None),) * axis + (sources < 0,)] = 0
        return filled

    def widen(self, values: jax.Array, axis: int) -> jax.Array:
        """The whole of a dimension, within a program."""
        if self.is_plain:
            return values
        before, after = values.shape[:axis], values.shape[axis + 1 :]
        groups = values.reshape(*before, -1, self.group, *after)
        copies = jnp.concatenate([groups] * self.copies, axis + 1)
        widths = [(0, 0)] * copies.ndim
        widths[axis + 1] = (0, self.padding)
        return jnp.pad(copies, widths).reshape(*before, -1, *after)

    def _sources(self, start: int, stop: int) -> NDArray[np.int64]:
        """The stored entry at each place, -1 for zeros."""
        group, place = np.divmod(np.arange(start, stop), self.copies * self.group + self.padding)
        return np.where(place < self.copies * self.group, group * self.group + place % self.group, -1)


@dataclass(frozen=True)
class Widening:
    """What a model has beside what its checkpoint stores."""

    kv_head_copies: int = 1  # of each key and value head, which share its query heads
    head_padding: int = 0  # query heads of zeros behind those of each stored key and value head
    vocab_padding: int = 0  # rows of zeros behind the vocabulary

    @classmethod
    def of(cls, model: ModelConfig, *, head_parts: int, vocab_parts: int) -> "Widening":
        """What it takes for so many parts to be equal."""
        heads = model.num_key_value_heads
        copies = head_parts // np.gcd(heads, head_parts)
        queries = model.num_attention_heads // heads
        return cls(int(copies), int(-queries % copies), -model.vocab_size % vocab_parts)

    def config(self, model: ModelConfig) -> ModelConfig:
        """A model's configuration as it is then."""
        heads = model.num_key_value_heads
        return replace(
            model,
            num_attention_heads=model.num_attention_heads + heads * self.head_padding,
            num_key_value_heads=heads * self.kv_head_copies,
            vocab_size=model.vocab_size + self.vocab_padding,
        )

    def spread(self, axis: str, size: int, model: ModelConfig) -> Spread:
        """How a dimension of a parameter lies, by its logical axis; `size` is its own."""
        if axis == "heads":
            heads = model.num_attention_heads
            return Spread(heads, heads // model.num_key_value_heads, padding=self.head_padding)
        if axis == "kv_heads":
            return Spread(model.num_key_value_heads, 1, copies=self.kv_head_copies)
        if axis == "vocab":
            return Spread(model.vocab_size, model.vocab_size, padding=self.vocab_padding)
        return Spread(size, size)


AS_STORED = Widening()
