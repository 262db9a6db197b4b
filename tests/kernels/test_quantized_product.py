"""Every product with 8-bit weights computes what the float32 specification does, and 8 bits hold what they promise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.cuda_fallback.quantized_product import GroupedProduct, narrow_product, quantize, wide_product
from jax_engine.pallas_kernels import reference

PRODUCTS = {"wide": wide_product, "narrow": narrow_product}
TYPES = ["float8_e4m3fn", "int8"]
INPUTS, OUTPUTS = (4, 24), (3, 8)  # as of an output projection, whose inputs are heads


def case(num_rows: int, stored: str, dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows and outputs of very different sizes."""
    rng = np.random.default_rng(num_rows)
    rows = rng.normal(size=(num_rows, *INPUTS)) * 10.0 ** rng.integers(-3, 3, (num_rows, 1, 1))
    values = rng.normal(size=INPUTS + OUTPUTS) * 10.0 ** rng.integers(-3, 3, OUTPUTS)
    return jnp.asarray(rows, dtype), *quantize(jnp.asarray(values), stored, axes=(0, 1))


@pytest.mark.parametrize(("num_rows", "dtype"), [(1, jnp.float32), (5, jnp.float32), (5, jnp.float16)])
@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_match_the_reference(name, stored, num_rows, dtype):
    x, weight, scale = case(num_rows, stored, dtype)
    out = jax.jit(PRODUCTS[name], static_argnames="dtype")(x, weight, scale, dtype=jnp.float32)
    assert (out.shape, out.dtype) == ((num_rows, *OUTPUTS), jnp.float32)
    expected = reference.quantized_product(x, weight, scale, quantizes_rows=name == "narrow")
    # Of terms of either sign, the error is of the size of the largest: of float32's sums.
    sizes = jnp.tensordot(jnp.abs(x.astype(jnp.float32)), jnp.abs(weight.astype(jnp.float32)) * scale, 2)
    np.testing.assert_array_less(jnp.abs(out - expected), 1e-6 * sizes + 1e-30)


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_bfloat16_adds_up_it_rounds_twice_at_most(name, stored):
    x, weight, scale = case(5, stored, jnp.bfloat16)
    out = PRODUCTS[name](x, weight, scale, dtype=jnp.bfloat16)
    expected = reference.quantized_product(x, weight, scale, quantizes_rows=name == "narrow")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2 * 2**-8, atol=1e-30)


def test_scales_of_groups_of_inputs_are_those_of_their_neighbours():
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.integers(-127, 128, INPUTS + OUTPUTS), jnp.int8)
    scale = jnp.asarray(rng.random((4, 3, *OUTPUTS)), jnp.float32)  # each of 8 inputs of a head
    x = jnp.asarray(rng.normal(size=(5, *INPUTS)), jnp.float32)
    by_hand = np.einsum("tgi,giO->tO", x.reshape(5, 12, 8), (weight.reshape(12, 8, 24) * scale.reshape(12, 1, 24)))
    expected = reference.quantized_product(x, weight, scale)
    np.testing.assert_allclose(expected.reshape(5, 24), by_hand, rtol=1e-4, atol=1e-3)
    for most_rows in (None, 4):  # by groups, and by the widened weight
        found = GroupedProduct(most_rows)(x, weight, scale, dtype=jnp.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("stored", TYPES)
def test_a_number_moves_by_half_a_step_at_most(stored):
    values = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    values[:, 7] = 0
    numbers, scale = quantize(jnp.asarray(values), stored, axes=(0,))
    moved = np.abs(np.asarray(numbers, np.float32) * np.asarray(scale) - values)
    # int8 has steps of one scale; e4m3 three bits behind the first, and below 2^-6 steps of 2^-9.
    half = np.full_like(values, 0.5) if stored == "int8" else np.maximum(np.abs(values) / scale / 2**4, 2.0**-10)
    assert np.all(moved <= half * scale * (1 + 1e-5))
    assert np.all(np.asarray(numbers, np.float32)[:, 7] == 0)
    largest = np.abs(np.asarray(numbers, np.float32)).max(0)
    assert set(largest) == {0.0, 127.0 if stored == "int8" else 448.0}


@pytest.mark.parametrize("stored", TYPES)
def test_rows_of_8_bits_move_a_product_by_half_a_step_of_each_number(stored):
    x, weight, scale = case(5, stored, jnp.float32)
    moved = narrow_product(x, weight, scale, dtype=jnp.float32) - wide_product(x, weight, scale, dtype=jnp.float32)
    most = jnp.max(jnp.abs(x), axis=(1, 2), keepdims=True)
    half = 0.5 * most / 127 if stored == "int8" else jnp.maximum(jnp.abs(x) / 2**4, most / 448 / 2**10)
    bound = jnp.tensordot(jnp.broadcast_to(half, x.shape), jnp.abs(weight.astype(jnp.float32)) * scale, 2)
    assert jnp.all(jnp.abs(moved) <= bound * 1.001)


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_what_is_not_finite_stays_with_its_row(name, stored):
    x, weight, scale = case(5, stored, jnp.float32)
    out = PRODUCTS[name](x.at[2, 1, 3].set(jnp.nan).at[3].set(0), weight, scale, dtype=jnp.float32)
    assert jnp.isnan(out[2]).all() and not out[3].any()
    assert jnp.isfinite(out[jnp.asarray([0, 1, 4])]).all()


@pytest.mark.parametrize("stored", TYPES)
def test_a_row_meets_no_other(stored):
    """Rows beside it change neither its scale nor, of integers, a bit of it."""
    x, weight, scale = case(5, stored, jnp.float32)
    alone = narrow_product(x[:1], weight, scale, dtype=jnp.float32)
    together = narrow_product(x, weight, scale, dtype=jnp.float32)[:1]
    np.testing.assert_allclose(alone, together, rtol=0 if stored == "int8" else 1e-5)
