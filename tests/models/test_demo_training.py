"""How the demo model is trained: batches hold what they should, a run resumes where it was, the export is complete."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from jax_engine.models.config import ModelConfig
from jax_engine.models.demo import DEMO_DIR
from jax_engine.models.demo.generator import training_samples
from jax_engine.models.demo.packing import Block, Packer, RowShape, tokenize
from jax_engine.models.demo.samples import ExactAnswer, Sample
from jax_engine.models.demo.train import Progress, Recipe, make_optimizer, matrix_dimensions
from jax_engine.models.demo.trainee import Trainee, as_rows, export, hf_config

SHAPES = (RowShape(20, 128), RowShape(3, 256), RowShape(2, 416))

RECIPE = Recipe(
    steps=100,
    warmup_steps=10,
    cooldown_steps=50,
    rate=1.0,
    embedding_rate=1.0,
    seed=0,
    rows=SHAPES,
    compute_dtype="float32",
    until=100,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def blocks(tokenizer: Tokenizer) -> tuple[Block, ...]:
    return Packer(training_samples(seed=0), tokenizer, SHAPES).next_blocks()


def documents_of(block: Block) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, targets and positions of each packed document."""
    return [
        tuple(array[row][block.segments[row] == segment] for array in (block.ids, block.targets, block.positions))
        for row in range(len(block.segments))
        for segment in range(1, block.segments[row].max() + 1)
    ]


def test_every_packed_document_is_one_whole_sample(tokenizer: Tokenizer, blocks: tuple[Block, ...]):
    drawn = [tokenize(tokenizer, sample) for sample in islice(training_samples(seed=0), 400)]
    for block in blocks:
        for ids, _, positions in documents_of(block):
            assert ids.tolist() in [document.ids for document in drawn]
            assert positions.tolist() == list(range(len(ids)))


def test_targets_are_the_next_tokens_of_answers_only(tokenizer: Tokenizer, blocks: tuple[Block, ...]):
    for ids, targets, _ in (document for block in blocks for document in documents_of(block)):
        learned = targets >= 0
        assert learned.any()
        np.testing.assert_array_equal(targets[:-1][learned[:-1]], ids[1:][learned[:-1]])


def test_rows_are_nearly_full(blocks: tuple[Block, ...]):
    assert np.mean([np.mean(block.segments > 0) for block in blocks]) > 0.85


def test_the_answers_of_earlier_exchanges_are_not_learned(tokenizer: Tokenizer):
    sample = Sample(
        "addition",
        "1+1",
        (
            {"role": "user", "content": "Reverse it"},
            {"role": "assistant", "content": "ti"},
            {"role": "user", "content": "1+1"},
            {"role": "assistant", "content": "1 + 1 = 2"},
        ),
        ExactAnswer("1 + 1 = 2"),
        num_history=2,
    )
    with_history, without = tokenize(tokenizer, sample), tokenize(tokenizer, replace(sample, num_history=0))
    assert sum(with_history.learned) == sum(without.learned) - 3  # t, i and the end of the turn


def test_logits_are_asked_for_only_where_something_is_learned(blocks: tuple[Block, ...]):
    for block in blocks:
        rows = as_rows(block)
        valid = rows["wanted"] >= 0
        np.testing.assert_array_equal(block.targets.reshape(-1)[rows["chosen"][valid]], rows["wanted"][valid])
        assert valid.sum() == (block.targets >= 0).sum()


def test_row_shapes_are_read_from_the_command_line():
    assert RowShape.parse("20x128") == RowShape(20, 128)


def test_a_run_resumes_with_what_it_had(tmp_path: Path):
    parameters = {"model.layers.0.mlp.up_proj.weight": jnp.ones((4, 8)), "model.norm.weight": jnp.ones(4)}
    optimizer = make_optimizer(RECIPE)
    state = jax.tree.map(lambda leaf: leaf + 3, optimizer.init(parameters))
    Progress(7, jax.tree.map(lambda leaf: leaf + 1, parameters), state).save(tmp_path)
    resumed = Progress(0, parameters, optimizer.init(parameters))
    resumed.restore(tmp_path)
    assert resumed.step == 7
    np.testing.assert_array_equal(resumed.parameters["model.norm.weight"], parameters["model.norm.weight"] + 1)
    jax.tree.map(np.testing.assert_array_equal, resumed.optimizer_state, state)


def test_nothing_to_resume_from_leaves_a_run_at_its_start(tmp_path: Path):
    progress = Progress(0, {}, ())
    progress.restore(tmp_path)
    assert progress.step == 0


def test_every_matrix_of_a_layer_is_trained_as_one():
    names = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"] + [
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    ]
    dimensions = matrix_dimensions(dict.fromkeys([*names, "model.embed_tokens.weight", "model.norm.weight"]))
    assert [name for name, value in dimensions.items() if value is not None] == names


def test_the_export_has_every_tensor_that_transformers_expects(tokenizer: Tokenizer, tmp_path: Path):
    config = hf_config(tokenizer)
    export(Trainee(ModelConfig.from_hf(config), seed=0).initial, config, tmp_path)
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).state_dict()
    exported = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items() if name != "lm_head.weight"
    }
