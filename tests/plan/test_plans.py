"""Plans of a tiny model on this machine's CPU, and in place of a GPU; what fits, what does not, and why."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from jax.sharding import AbstractMesh
from tiny_engine import TINY, placed_model

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.memory_check import DeviceMemory, check_memory
from jax_engine.config import EngineConfig
from jax_engine.models.config import ModelConfig
from jax_engine.plan.chips import Target, cpu, parse_target
from jax_engine.plan.compare import Candidate, Impossible, candidates_of, compare
from jax_engine.plan.drawing import check_plot
from jax_engine.plan.figure_cache import FigureCache
from jax_engine.plan.figures import Plan, Question, as_json
from jax_engine.plan.planning import make_plan
from jax_engine.plan.plot import comparison_drawing
from jax_engine.plan.report import comparison_text, plan_text
from jax_engine.plan.targets import devices_of
from jax_engine.sharding.sharding import place
from jax_engine.sharding.strategies import MESH_AXES, Strategy

GIB = 2**30
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64, "scan_layers": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which nothing but the configuration is there."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module")
def question(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Question:
    config = EngineConfig(model=str(folder), compilation_cache_dir=str(tmp_path_factory.mktemp("cache")), **LIMITS)
    return Question(config, "tiny", parse_target("cpu-1", host_bytes=GIB), input_len=32, output_len=8)


@pytest.fixture(scope="module")
def plan(question: Question) -> Plan:
    return make_plan(question)


@pytest.fixture(scope="module")
def on_a_gpu(question: Question) -> Plan:
    """Without XLA for GPUs, as where it is not installed."""
    return make_plan(replace(question, target=replace(parse_target("h200-1"), has_stand_in=True)))


def test_memory_by_arithmetic_is_what_the_compiler_says(plan: Plan):
    assert [one.rows for one in plan.compiled] == [4, 16]
    for one in plan.compiled:
        assert one.predicted_bytes == pytest.approx(one.argument_bytes, rel=0.01)


def test_pages_fill_what_is_left(plan: Plan):
    """Weights, temporaries and pages are nine tenths of the device, but for the staging of copies and one page."""
    taken = max(one.temporary_bytes + one.code_bytes for one in plan.compiled)
    cache = plan.num_pages * plan.memory.page
    assert plan.usable_bytes == int(0.9 * GIB)
    assert 0 <= plan.usable_bytes - plan.memory.weights - taken - cache < 3 * 2**20
    tokens = plan.memory.page_tokens
    assert plan.memory.page == tokens * 2 * 2 * 2 * 8 * 4, "keys and values of two layers' two heads"
    assert plan.sequences[64] == plan.num_pages // (64 // tokens)


def test_a_step_counts_every_weight_once_for_each_row(plan: Plan):
    layer = 32 * 8 * (4 + 2 + 2) + 4 * 8 * 32 + 3 * 32 * 48
    attention = 2 * 4 * 40 * 4 * 8 * 4  # two layers, four sequences of 40 tokens, four heads of 8
    assert plan.steps["decode"].flops == 2 * 4 * (2 * layer + 32 * 101) + attention
    assert plan.steps["decode"].time is None and plan.bounds is None, "a CPU has no figures"


def test_a_gpu_is_planned_by_arithmetic_and_says_so(on_a_gpu: Plan, plan: Plan):
    assert "no program for a GPU was compiled" in on_a_gpu.notes[0]
    assert (on_a_gpu.basis, on_a_gpu.dtype) == ("analytic", "bfloat16")
    assert "h200-1 (1 h200 chip): tensor, one device, bfloat16; figures by arithmetic" in plan_text(on_a_gpu)
    assert "figures of XLA:CPU" in plan_text(plan)
    assert on_a_gpu.memory.weights == plan.memory.weights / 2
    assert on_a_gpu.usable_bytes == int(int(151_397_597_184 * 0.95) * 0.9)
    step, bounds = on_a_gpu.steps["decode"], on_a_gpu.bounds
    assert step.time is not None and bounds is not None
    assert step.moved_bytes < 2 * on_a_gpu.memory.weights + 4 * 40 * 2 * 2 * 2 * 8 * 2 * 2
    assert bounds.tpot == step.time.total == max(step.time.compute, step.time.memory), "alone, it exchanges nothing"
    assert bounds.ttft == pytest.approx(2 * on_a_gpu.steps["prefill"].time.total), "32 tokens are two steps of 16"


def test_what_was_compiled_is_not_compiled_again(question: Question, plan: Plan):
    again = make_plan(question)
    assert [replace(one, seconds=0.0) for one in again.compiled] == [replace(one, seconds=0.0) for one in plan.compiled]
    (kept,) = {file.parent for file in Path(question.config.compilation_cache_dir or "").rglob("*.json")}
    cache = FigureCache(kept)
    key = next(kept.glob("*.json")).stem
    (kept / f"{key}.json").write_text("half of")
    assert cache.read(key) is None, "what cannot be read is compiled"


def test_as_many_sequences_as_are_asked_for_must_fit(question: Question, plan: Plan):
    """A device with room for a few sequences beside the weights has none for a hundred thousand."""
    taken = max(one.taken_bytes for one in plan.compiled) + plan.memory.state + 2 * 2**20
    small = cpu((taken + 6 * plan.memory.page) / 0.9)
    asked = replace(question, target=Target("cpu-1", small, 1))
    assert make_plan(asked).fits
    refused = make_plan(replace(asked, max_num_seqs=100_000))
    assert not refused.fits and refused.binds == "memory"
    assert "100000 sequences of 64 tokens need" in refused.problems[0]
    assert refused.remedies[0].startswith("lower max_num_seqs to ")


def test_weights_that_do_not_fit_are_refused_before_anything_is_compiled(question: Question):
    refused = make_plan(replace(question, target=Target("cpu-1", cpu(10_000), 1)))
    assert (refused.fits, refused.compiled, refused.steps) == (False, (), {})
    assert "of weights" in refused.problems[0]
    assert "nothing was compiled" in plan_text(refused)


def test_the_engine_refuses_what_cannot_fit_before_it_reads_weights(question: Question):
    blueprint = Blueprint.of(question.config, devices_of(question.target))
    needs = DeviceMemory.of(blueprint)
    check_memory(blueprint, None)
    on_an_accelerator = replace(blueprint, device=_Accelerator())
    check_memory(on_an_accelerator, int(needs.least / 0.9) + 1)
    with pytest.raises(ValueError, match=r"needs .* of weights, .* for one sequence of 64 tokens; lower max_model_len"):
        check_memory(on_an_accelerator, int((needs.least - needs.page) / 0.9))
    with pytest.raises(ValueError, match=r"share it between more devices|devices with more memory"):
        check_memory(on_an_accelerator, needs.weights // 2)


def test_a_weight_that_is_left_whole_and_is_too_large_is_named_with_what_would_split_it(question: Question):
    """A strategy of one's own splits all but the embedding and the head, which are larger than the rest."""
    hf = TINY | {"vocab_size": 2**20}
    model, mesh = ModelConfig.from_hf(hf), AbstractMesh((1, 1, 1, 2), MESH_AXES)
    rules = Strategy("mine", weights=dict.fromkeys(("heads", "kv_heads", "mlp"), ("tensor",)))
    placed = replace(placed_model(hf=hf), placement=place(model, mesh, rules))
    blueprint = Blueprint.of(question.config, devices_of(question.target))
    blueprint = replace(blueprint, model=model, placed=placed, device=_Accelerator())
    needs = DeviceMemory.of(blueprint)
    spared = 2**20 * 32 * 4 // 2
    with pytest.raises(ValueError) as refused:
        check_memory(blueprint, int((needs.least - spared) / 0.9) + 2)
    said = str(refused.value)
    assert (
        "lm_head.weight (embed=32, vocab=1048576) takes 0.12 GiB of each device, whole over the 2 devices along "
        in said
    )
    assert "split over 'tensor' by embed or vocab (`weights` of the sharding rules), it would take 0.06 GiB" in said
    assert "model.embed_tokens.weight" not in said, "one of them is enough"
    with pytest.raises(ValueError) as refused:
        check_memory(blueprint, int((needs.least - 2 * spared) / 0.9) + 2)
    assert "model.embed_tokens.weight (vocab=1048576, embed=32)" in str(refused.value)
    with pytest.raises(ValueError) as refused:
        check_memory(blueprint, spared)
    assert "whole over" not in str(refused.value), "no split would make it fit"


class _Accelerator:
    """Of a device, its platform."""

    platform = "gpu"


def test_an_impossible_strategy_is_a_row_with_its_reason(question: Question, on_a_gpu: Plan):
    bad = Candidate(question.target, "sideways", "", {"sharding_strategy": "sideways"})
    (row,) = compare(question, [bad])
    assert isinstance(row, Impossible) and "must be one of tensor" in row.reason
    rows = [on_a_gpu, row]
    assert f"sideways on cpu-1: {row.reason}" in comparison_text(rows)
    svg = comparison_drawing(rows, "tiny & small").svg()
    assert "tiny &amp; small" in svg and "sideways" in svg and row.reason[:40] in svg.replace("&#x27;", "'")
    assert f"{1e3 * on_a_gpu.steps['decode'].time.memory:.3g} ms" in svg


def test_a_comparison_has_every_strategy_on_every_device(question: Question):
    targets = [parse_target("v6e-8"), parse_target("tpu7x-8"), parse_target("h200-1")]
    found = candidates_of(question.config, targets, strategies=None)
    whole = [one for one in found if one.strategy != "pipeline"]
    names = {candidate.strategy for candidate in whole}
    assert "tensor" in names and len(whole) == len(targets) * len(names)
    sizes = {one.target.name: one.changes["tensor_parallel_size"] for one in whole}
    assert sizes == {"v6e-8": 8, "tpu7x-8": 8, "h200-1": 1}
    assert [one.mesh for one in found if one.strategy == "pipeline"] == ["stage=2,tensor=4"] * 2
    by_xla = {one.strategy for one in found if one.changes.get("attention_backend") == "xla"}
    assert by_xla == {"context"}, "no kernel attends over stripes of pages"
    every = candidates_of(question.config, targets[:1], strategies=None, all_meshes=True)
    assert "stage=8" in [one.mesh for one in every]
    rules = replace(question.config, sharding_rules="my.toml")
    (own,) = candidates_of(rules, targets[:1], strategies=())
    assert own.strategy == "my.toml"


@pytest.mark.parametrize("kind", ["html", "svg", "png"])
def test_a_drawing_is_written_in_the_form_that_its_name_says(tmp_path: Path, on_a_gpu: Plan, kind: str):
    if kind == "png":
        pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{kind}"
    check_plot(path)
    comparison_drawing([on_a_gpu], "tiny").write(path, title="tiny", table="a table")
    starts = {"html": b"<!doctype html>", "svg": b"<svg ", "png": b"\x89PNG"}
    assert path.read_bytes().startswith(starts[kind])


def test_a_drawing_in_another_form_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must end in \.html, \.svg or \.png"):
        check_plot(tmp_path / "plot.gif")
    with pytest.raises(ValueError, match="no folder that exists"):
        check_plot(tmp_path / "nowhere" / "plot.svg")


def test_a_plan_is_json(on_a_gpu: Plan):
    found = json.loads(json.dumps(as_json(on_a_gpu)))
    assert found["fits"] and found["steps"]["decode"]["seconds"]["binds"] == on_a_gpu.binds
    assert found["bounds"]["tpot"] == on_a_gpu.bounds.tpot
