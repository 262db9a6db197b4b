"""How heads, pages and lanes are arranged for the TPU kernel."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

LANES = 128
SUBLANES = 8  # of 32-bit values in a register
HALF_LANES = LANES // 2
MOST_HEADS_AT_ONCE = 8  # kv heads that decode unrolls side by side; more would only make the program longer


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def page_shape(num_kv_heads: int, page_size: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of one page of one layer: (planes, kv heads, page size, lanes).

    Keys are plane 0 and values plane 1, each padded to whole lanes. Heads of at most 64 share lanes instead: one plane
    with the key in the lower half of the lanes and the value in the upper half, which costs no memory in padding.
    """
    if head_dim <= HALF_LANES:
        return (1, num_kv_heads, page_size, LANES)
    return (2, num_kv_heads, page_size, round_up(head_dim, LANES))


@dataclass(frozen=True)
class Geometry:
    """The static sizes of one call.

    Decode rows of several kv heads share a register: a group is `heads_per_group` kv heads with all their query heads,
    `group_rows` rows (a multiple of 8, the last ones padding).
    """

    num_kv_heads: int
    queries_per_head: int
    head_dim: int
    page_size: int
    cache_dtype: np.dtype
    compute_dtype: np.dtype  # of queries and of attention weights in the matrix unit

    @classmethod
    def of(
        cls, num_heads: int, num_kv_heads: int, head_dim: int, page_size: int, cache_dtype: DTypeLike, dtype: DTypeLike
    ) -> "Geometry":
        """The sizes for queries of `dtype`; float32 on either side makes all products float32."""
        wide = jnp.float32 in (jnp.dtype(cache_dtype), jnp.dtype(dtype))
        compute_dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
        return cls(num_kv_heads, num_heads // num_kv_heads, head_dim, page_size, jnp.dtype(cache_dtype), compute_dtype)

    @property
    def planes(self) -> int:
        return page_shape(self.num_kv_heads, self.page_size, self.head_dim)[0]

    @property
    def width(self) -> int:
        return page_shape(self.num_kv_heads, self.page_size, self.head_dim)[3]

    @property
    def value_lane(self) -> int:
        """The lane of a page's row where the value begins, in the plane of values."""
        return HALF_LANES if self.planes == 1 else 0

    @property
    def heads_per_group(self) -> int:
        most = max(1, SUBLANES // self.queries_per_head)
        return max(count for count in range(1, most + 1) if self.num_kv_heads % count == 0)

    @property
    def num_groups(self) -> int:
        return self.num_kv_heads // self.heads_per_group

    @property
    def groups_at_once(self) -> int:
        """Groups that one trip of decode's loop over a chunk takes; divides `num_groups`."""
        most = max(1, MOST_HEADS_AT_ONCE // self.heads_per_group)
        return max(count for count in range(1, most + 1) if self.num_groups % count == 0)

    @property
    def group_rows(self) -> int:
        return round_up(self.heads_per_group * self.queries_per_head, SUBLANES)

    @property
    def native_rows(self) -> int:
        """Rows of a register of the cache's type."""
        return SUBLANES * 4 // self.cache_dtype.itemsize

    @property
    def tile_rows(self) -> int:
        """Tokens that a write to a page must cover at least."""
        return min(self.page_size, self.native_rows)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's row in one layer's pages."""
        return self.planes * self.num_kv_heads * self.width * self.cache_dtype.itemsize
