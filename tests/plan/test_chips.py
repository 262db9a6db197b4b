"""Chips and slices by their names."""

import pytest

from jax_engine.plan.chips import CHIPS, next_sizes, parse_target, torus_sizes


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v6e-8", 8, 8), ("v5e-1", 1, 1), ("v4-8", 4, 8), ("v5p-8", 4, 4), ("tpu7x-8", 4, 8), ("h200-2", 2, 2)],
)
def test_a_name_counts_chips_or_cores_as_the_cloud_does(name: str, chips: int, devices: int):
    target = parse_target(name)
    assert (target.num_chips, target.num_devices) == (chips, devices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v6e", "must be a chip and a number, such as v6e-8"),
        ("v9-8", "chips are v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200 and cpu"),
        ("v6e-3", "no size of a v6e slice; sizes are v6e-1, v6e-4, v6e-8"),
    ],
)
def test_a_name_that_is_none_is_refused_with_those_that_are(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_target(name)


def test_every_slice_has_a_topology_of_its_size():
    tpus = [chip for chip in CHIPS.values() if chip.platform == "tpu"]
    for chip in tpus:
        for size in chip.sizes:
            target = parse_target(f"{chip.name}-{size * chip.cores_in_name}")
            assert len(torus_sizes(target)) == chip.dimensions
    assert [target.name for target in next_sizes(parse_target("v5p-256"))] == ["v5p-512"]


def test_half_a_chip_has_half_of_everything():
    whole, half = CHIPS["v6e"], CHIPS["tpu7x"]
    assert whole.peak("bf16") == 918e12 and half.peak("bf16") == 2307e12 / 2
    assert half.device_bytes_per_second == 7380e9 / 2
    assert half.peak("f8e4m3fn") == 2 * half.peak("bf16")
    assert whole.peak("f32") < whole.peak("bf16"), "a product of float32 takes several of bfloat16"
