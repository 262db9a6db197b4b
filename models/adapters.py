"""Low-rank adapters (LoRA, arXiv 2106.09685) beside a model's weights: many at once, one for each token row or none.

Every adapted `Linear` has two more parameters, `lora_a` and `lora_b`, which hold the factors of all slots. A row takes
those of its own slot, as in Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285): here by one product for each
adapter that a step has rows of, which costs nothing for slots that nobody uses, needs no copy of the factors for each
row, and gives a row the same bits whatever slot its adapter is in and whoever else is there.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# The projections of a decoder layer that adapters may change, by their names in checkpoints.
ADAPTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NO_ADAPTER = -1  # in place of a slot


@dataclass(frozen=True)
class AdapterShape:
    """Room for adapters: `num_slots` of them on the device at once, each of up to `rank`."""

    num_slots: int
    rank: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdapterRows:
    """Which slot each of a step's token rows takes its adapter from."""

    slots: Int[Array, " T"]  # or NO_ADAPTER
    present: Int[Array, " slots"]  # those that some row takes, ascending; the rest is not looked at
    num_present: Int[Array, ""]

    @classmethod
    def of(cls, slots: Int[Array, " T"], num_slots: int) -> "AdapterRows":
        """The rows of a step whose rows have these slots, of `num_slots` (static)."""
        used = jnp.zeros(num_slots, bool).at[jnp.where(slots < 0, num_slots, slots)].set(True, mode="drop")
        present = jnp.nonzero(used, size=num_slots, fill_value=0)[0]
        return cls(slots, present.astype(jnp.int32), jnp.sum(used, dtype=jnp.int32))

    def block(self, first: Int[Array, ""], size: int) -> "AdapterRows":
        """Rows `first` to `first + size`."""
        return AdapterRows.of(lax.dynamic_slice_in_dim(self.slots, first, size), self.present.shape[0])


def adapter_product(
    x: Float[Array, "T ..."], a: Float[Array, "S R ..."], b: Float[Array, "S R ..."], rows: AdapterRows
) -> Float[Array, "T ..."]:
    """What the adapters add to a projection of x, in float32: each row's `x @ a[slot] @ b[slot]`, zero without one.

    x [T, *in], a [slots, rank, *in], b [slots, rank, *out] -> [T, *out].
    """
    num_in = x.ndim - 1
    contracted = (tuple(range(1, 1 + num_in)), tuple(range(1, 1 + num_in)))

    def add(index: Int[Array, ""], total: Float[Array, "T ..."]) -> Float[Array, "T ..."]:
        slot = rows.present[index]
        inner = jnp.tensordot(x, a[slot], axes=contracted, preferred_element_type=jnp.float32)
        inner = jnp.where((rows.slots == slot)[:, None], inner, 0).astype(x.dtype)
        return total + jnp.tensordot(inner, b[slot], axes=1, preferred_element_type=jnp.float32)

    return lax.fori_loop(0, rows.num_present, add, jnp.zeros((x.shape[0], *b.shape[2:]), jnp.float32))
