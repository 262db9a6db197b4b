"""Layouts: what is read by parts is what would be read whole."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.weights import Layout, Rule, layout_of

SPLIT_HEADS = Layout.parse("(heads head_dim) embed -> embed heads head_dim")


def test_split_heads_is_a_reshape_and_a_transpose() -> None:
    stored = np.arange(6 * 5).reshape(6, 5)
    assert SPLIT_HEADS.stored_shape((5, 2, 3)) == (6, 5)
    whole = SPLIT_HEADS.arrange(stored, (5, 2, 3), ((0, 5), (0, 2), (0, 3)))
    np.testing.assert_array_equal(whole, stored.reshape(2, 3, 5).transpose(2, 0, 1))


def test_a_part_of_the_heads_reads_only_their_rows() -> None:
    ranges = ((1, 3), (1, 2), (0, 3))
    assert SPLIT_HEADS.stored_ranges((5, 2, 3), ranges) == ((3, 6), (1, 3))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """A random layout, the shape of a parameter, and ranges of it that are not empty."""
    order = draw(st.permutations(range(draw(st.integers(1, 4)))))
    cuts = sorted(draw(st.sets(st.integers(1, len(order) - 1)))) if len(order) > 1 else []
    bounds = [0, *cuts, len(order)]
    groups = tuple(tuple(order[a:b]) for a, b in itertools.pairwise(bounds))
    shape = tuple(draw(st.integers(1, 5)) for _ in order)
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    stops = [draw(st.integers(start + 1, size)) for start, size in zip(starts, shape, strict=True)]
    return Layout(groups), shape, tuple(zip(starts, stops, strict=True))


@given(layouts())
def test_reading_a_part_equals_a_part_of_the_whole(case: tuple[Layout, tuple[int, ...], tuple[tuple[int, int], ...]]):
    layout, shape, ranges = case
    stored = np.arange(math.prod(shape)).reshape(layout.stored_shape(shape))
    block = stored[tuple(slice(*bounds) for bounds in layout.stored_ranges(shape, ranges))]
    whole = layout.arrange(stored, shape, tuple((0, size) for size in shape))
    expected = whole[tuple(slice(*bounds) for bounds in ranges)]
    np.testing.assert_array_equal(layout.arrange(block, shape, ranges), expected)


@pytest.mark.parametrize("text", ["(a b) c -> a b", "a b -> a b c", "a a -> a", "a b -> a a b"])
def test_a_layout_must_name_each_dimension_once_on_both_sides(text: str) -> None:
    with pytest.raises(ValueError, match="same dimensions"):
        Layout.parse(text)


def test_rules_match_the_end_of_a_name() -> None:
    rule = Rule(r"mlp\.\w+_proj\.weight", "out in -> in out")
    assert rule.matches("model.layers.11.mlp.up_proj.weight")
    assert not rule.matches("model.layers.11.mlp.up_proj.weight_scale")
    assert not rule.matches("model.layers.11.shared_mlp.up_proj.weight")


def test_what_no_rule_matches_is_stored_as_used() -> None:
    assert layout_of("model.embed_tokens.weight", 2, LlamaForCausalLM.HF_WEIGHTS) == Layout.identity(2)
    assert layout_of("lm_head.weight", 2, LlamaForCausalLM.HF_WEIGHTS) == Layout(((1,), (0,)))
