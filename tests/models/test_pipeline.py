"""How a decoder is cut into stages, and a step into microbatches."""

import pytest

from jax_engine.models.pipeline import num_microbatches, of_one_stage, staged_run


@pytest.mark.parametrize(
    ("kinds", "num_stages", "run", "of_phases"),
    [
        ("A" * 8, 2, (1, 8, 0), [tuple(range(8))]),
        ("A" * 94, 4, (1, 96, 2), [tuple(range(94))]),  # Qwen3-235B-A22B: two layers of zeros in the last stage
        ("SF" * 4, 4, (2, 4, 0), [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("SFSFSFS", 2, (2, 4, 1), [(0, 2, 4, 6), (1, 3, 5)]),  # the last period half of zeros
        ("AAAAB", 1, (5, 1, 0), [(0,), (1,), (2,), (3,), (4,)]),
    ],
    ids=["even", "padded", "in turn", "odd in turn", "one stage"],
)
def test_every_stage_has_whole_repeats_of_the_pattern(kinds, num_stages, run, of_phases):
    found = staged_run(kinds, num_stages)
    assert (found.period, found.repeats, found.padding) == run
    assert [found.layers_of(phase) for phase in range(found.period)] == of_phases
    assert found.repeats % num_stages == 0
    stage = "".join(of_one_stage(kinds, num_stages))
    assert (stage * num_stages)[: len(kinds)] == kinds, "all stages are alike"


@pytest.mark.parametrize(
    ("kinds", "num_stages", "message"),
    [
        ("A" * 5, 4, r"pipeline_parallel_size=4 does not fit the model's 5 layers, which are alike.* are 1, 2, 3, 5$"),
        ("A" * 4, 8, r"sizes that fit are 1, 2, 4$"),
        ("SSSSSF" * 4, 8, r"24 layers, which repeat after 6: .* are 1, 2, 4$"),
        ("D" + "M" * 60, 2, r"61 layers, which follow no repeating pattern: .* sizes that fit are 1$"),
    ],
)
def test_numbers_of_stages_that_do_not_fit_are_refused_with_those_that_do(kinds, num_stages, message):
    with pytest.raises(ValueError, match=message):
        staged_run(kinds, num_stages)


def test_a_step_is_cut_into_as_many_microbatches_as_have_enough_rows():
    assert [num_microbatches(rows, 256) for rows in (1, 64, 256, 511, 512, 768, 2048)] == [1, 1, 1, 1, 2, 3, 8]
    assert num_microbatches(1000, 256) == 2, "three would not be equal"
    assert num_microbatches(521, 256) == 1, "a prime"
