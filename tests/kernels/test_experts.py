"""Every implementation of a mixture's experts computes what the float32 specification does, row for row."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine.cuda_fallback.experts import blocked_experts, gathered_experts, gpu_experts, ragged_experts
from jax_engine.pallas_kernels import reference

NUM_LAYERS, NUM_EXPERTS, HIDDEN, INNER = 3, 5, 16, 24
IMPLEMENTATIONS = {
    "blocked": blocked_experts,
    "gathered": gathered_experts,
    "ragged": ragged_experts,
    "ragged by pieces": partial(ragged_experts, parts=4, min_rows=8),
}
OPTIONS: dict[str, Any] = {"layer": 1, "activation": jax.nn.silu}


def case(num_rows: int, loads: str, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Rows that choose two experts each: any of them; all of them the same; or some none of those that are here."""
    rng = np.random.default_rng(num_rows)
    chosen = np.stack([rng.permutation(NUM_EXPERTS)[:2] for _ in range(num_rows)])
    if loads == "one expert":
        chosen[:] = (3, 0)
    if loads == "elsewhere":
        chosen = np.where(rng.random(chosen.shape) < 0.5, chosen, rng.choice([-7, NUM_EXPERTS, 99], chosen.shape))
    shapes = {"gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
    weights = {
        name: jnp.asarray(rng.normal(size=(NUM_LAYERS, NUM_EXPERTS, *shape)) * shape[0] ** -0.5, dtype)
        for name, shape in shapes.items()
    }
    x, shares = rng.normal(size=(num_rows, HIDDEN)), rng.random(chosen.shape)
    given = {"x": jnp.asarray(x, dtype), "chosen": jnp.asarray(chosen), "shares": jnp.asarray(shares, jnp.float32)}
    return given | weights


@pytest.mark.parametrize("loads", ["any", "one expert", "elsewhere"])
@pytest.mark.parametrize("num_rows", [1, 7, 64])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_experts_match_the_reference(name, num_rows, loads):
    given = case(num_rows, loads)
    out = jax.jit(partial(IMPLEMENTATIONS[name], **OPTIONS))(**given)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, reference.expert_feed_forward(**given, **OPTIONS), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bfloat16_is_added_up_in_float32(name):
    given = case(7, "any", jnp.bfloat16)
    out = jax.jit(partial(IMPLEMENTATIONS[name], **OPTIONS))(**given)
    np.testing.assert_allclose(out, reference.expert_feed_forward(**given, **OPTIONS), rtol=0, atol=0.03)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_chose_nothing_and_what_is_not_finite_stays_with_its_row(name):
    given = case(7, "any")
    run = jax.jit(partial(IMPLEMENTATIONS[name], **OPTIONS))
    x, chosen = given["x"].at[2].set(jnp.nan).at[5].set(1e30), given["chosen"].at[4].set(NUM_EXPERTS)
    out, expected = run(**given | {"x": x, "chosen": chosen}), run(**given)
    others = np.array([0, 1, 3, 6])
    np.testing.assert_allclose(out[others], expected[others], rtol=1e-6)
    np.testing.assert_array_equal(out[4], 0)


def test_on_a_gpu_few_rows_go_without_a_loop_and_many_with_one():
    def text(num_rows: int) -> str:
        return jax.jit(partial(gpu_experts, **OPTIONS)).lower(**case(num_rows, "any")).as_text()

    assert "stablehlo.while" not in text(NUM_EXPERTS)
    assert "stablehlo.while" in text(NUM_EXPERTS + 1)


def test_a_blocked_row_is_the_same_to_the_last_bit_in_any_company():
    """At every place among the rows, with experts that others crowd to, and with none there but its own."""
    given = case(64, "any")
    row = {name: given[name][3] for name in ("x", "chosen", "shares")}
    run = jax.jit(partial(blocked_experts, **OPTIONS))

    def among(company: dict[str, Any], place: int) -> np.ndarray:
        rows = {name: company[name].at[place].set(value) for name, value in row.items()}
        return np.asarray(run(**given | rows))[place]

    alone = among(given | {"chosen": jnp.full_like(given["chosen"], NUM_EXPERTS)}, 0)
    assert alone.any()
    for company in (given, case(64, "one expert"), case(64, "elsewhere")):
        for place in (0, 17, 63):
            np.testing.assert_array_equal(among({name: company[name] for name in row}, place), alone)
