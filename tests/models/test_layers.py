"""Layers that are alike share one program: how they are found, and what a scan over them costs."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_engine import TINY

from jax_engine.execution.step_batch import BatchLayout, Bucket
from jax_engine.models.config import ModelConfig
from jax_engine.models.kv_pages import CacheLayout
from jax_engine.models.layers import layer_runs
from jax_engine.models.registry import resolve_model
from jax_engine.sampling.sampler import SamplingMode
from jax_engine.sharding.placed_model import PlacedModel, StateSize


@pytest.mark.parametrize(
    ("kinds", "runs"),
    [
        ("A", [(0, 1, 1)]),
        ("A" * 80, [(0, 1, 80)]),
        ("SF" * 5, [(0, 2, 5)]),
        ("SFSFS", [(0, 2, 2), (4, 1, 1)]),
        ("SSSSSF" * 4 + "SS", [(0, 6, 4), (24, 1, 2)]),  # five windows and one without, and what is left over
        ("F" * 28 + "S" * 20, [(0, 1, 28), (28, 1, 20)]),  # windows from some layer on
        ("D" + "M" * 60, [(0, 1, 1), (1, 1, 60)]),  # a first layer of its own
        ("ABC", [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
    ],
    ids=["one", "alike", "in turn", "odd", "five and one", "two runs", "first differs", "all differ"],
)
def test_layers_are_cut_into_repeating_runs(kinds, runs):
    found = layer_runs(kinds, scan=True)
    assert [(run.first, run.period, run.repeats) for run in found] == runs
    covered = sorted(layer for run in found for phase in range(run.period) for layer in run.layers_of(phase))
    assert covered == list(range(len(kinds)))


def test_without_a_scan_each_layer_is_a_run():
    assert [(run.first, run.period, run.repeats) for run in layer_runs("AAA", scan=False)] == [
        (0, 1, 1),
        (1, 1, 1),
        (2, 1, 1),
    ]


@pytest.mark.parametrize(
    ("windows", "length", "groups", "layers_a_page"),
    [
        ([0] * 32, 8192, (0,), 32),
        ([4096] * 32, 32768, (4096,), 32),
        ([4096, 0] * 21, 8192, (0, 4096), 21),  # Gemma 2: in turn
        (([1024] * 5 + [0]) * 8, 131072, (0,) + (1024,) * 5, 8),  # Gemma 3 12B: five and one
        ([0] * 28 + [4096] * 20, 32768, (0,) * 4 + (4096,) * 3, 7),  # one place of 49 is empty
        ([0] * 5 + [64] * 3, 64, (0,) * 5 + (64,) * 3, 1),
        (([512] * 5 + [0]) * 4 + [512] * 2, 32768, (0,) + (512,) * 6, 4),  # Gemma 3 1B, two of its places empty
        ([0] * 23 + [16] * 29, 4096, (0,) * 1 + (16,) * 2, 23),
    ],
)
def test_layers_that_see_equally_far_share_pages(windows, length, groups, layers_a_page):
    layout = CacheLayout.of([window or None for window in windows], length)
    assert (layout.windows, layout.layers_a_page) == (groups, layers_a_page)
    assert [layout.windows[group] for group in layout.groups] == windows
    assert len(set(zip(layout.groups, layout.places, strict=True))) == len(windows), "no two layers share a place"
    assert max(layout.places) < layers_a_page


def test_layers_in_turn_keep_one_group_for_each_place_of_the_pattern():
    layout = CacheLayout.of(([1024] * 5 + [None]) * 8, 131072)
    assert layout.groups == (1, 2, 3, 4, 5, 0) * 8


def lower(num_layers: int, *, scan: bool, **changes: Any) -> tuple[PlacedModel, jax.stages.Lowered]:
    """A decode step of eight rows over 256 pages."""
    config = ModelConfig.from_hf(TINY | {"num_hidden_layers": num_layers} | changes)
    placed = PlacedModel.of(
        resolve_model(config.architecture),
        config,
        platform="cpu",
        mesh=None,
        attention_backend="xla",
        dtype=jnp.float32,
        page_size=16,
        scan_layers=scan,
    )
    size = StateSize(num_pages=256, num_slots=8, max_pages=16)
    return placed, placed.lower(BatchLayout(Bucket(8, 8), page_size=16, num_slots=8), SamplingMode.GREEDY, size)


def program_size(num_layers: int, *, scan: bool) -> int:
    _, lowered = lower(num_layers, scan=scan)
    return len(lowered.as_text().splitlines())


def test_depth_does_not_grow_a_scanned_program():
    assert program_size(3, scan=True) == program_size(24, scan=True)
    assert program_size(24, scan=False) > 4 * program_size(24, scan=True)


def test_a_scan_copies_neither_the_weights_nor_the_cache():
    """What a step needs beside its arguments is less than two layers' weights and a fraction of the cache."""
    placed, lowered = lower(16, scan=True, hidden_size=256, intermediate_size=1024)
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    cache = 256 * placed.geometry.page_bytes
    stacked = sum(parameter.num_bytes for parameter in placed.structure.parameters if parameter.part_names)
    assert analysis.alias_size_in_bytes >= cache
    assert analysis.temp_size_in_bytes < min(cache, 2 * stacked / 16)


def test_a_scan_does_not_copy_experts():
    """They are read where they lie, each by its own product, and a step needs less than one layer's."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
    changes = {"architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 256} | experts
    _, lowered = lower(4, scan=True, **changes)
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    cache = 256 * 4 * 2 * 2 * 16 * 8 * 4
    assert analysis.temp_size_in_bytes < 3 * 8 * 256 * 256 * 4
    assert analysis.alias_size_in_bytes >= cache
