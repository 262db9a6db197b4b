"""The shape annotations are checked while tests run: each of these calls breaks one."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jax_engine.execution.step_batch import BatchLayout, Bucket, StepBatch
from jax_engine.models.layers import RMSNorm
from jax_engine.sampling.top_k import bisect_kth


def test_a_wrong_shape_is_caught_where_it_is_passed():
    with pytest.raises(TypeCheckError, match="top_k"):
        bisect_kth(jnp.ones((3, 1, 8)), jnp.ones(4, jnp.int32))  # three rows, four limits


def test_a_wrong_type_is_caught():
    with pytest.raises(TypeCheckError, match="buffer"):
        StepBatch.unpack(jnp.zeros(100), BatchLayout(Bucket(1, 1), page_size=8, num_slots=1))


def test_right_ones_pass():
    assert bisect_kth(jnp.ones((3, 1, 8)), jnp.ones(3, jnp.int32)).shape == (3,)
    assert RMSNorm(4, "embed", eps=1e-6, dtype=jnp.dtype("float32"), rngs=None)(jnp.ones((2, 4))).shape == (2, 4)
