"""The demo model's draft: small, of the same vocabulary, and it nearly always says what the demo model would."""

from itertools import cycle

import jax
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jax_engine.loading.loader import load_config
from jax_engine.models.demo import DEMO_DIR, DEMO_DRAFT_DIR
from jax_engine.models.demo.generator import TASKS, held_out_samples
from jax_engine.models.demo.packing import Packer, RowShape
from jax_engine.models.demo.train_adapters import load_checkpoint
from jax_engine.models.demo.train_draft import LAYERS, distil, draft_config, export_half, first_parameters
from jax_engine.models.demo.trainee import as_rows, hf_config


@pytest.fixture(scope="module")
def demo():
    return load_checkpoint(load_config(DEMO_DIR)[0], DEMO_DIR)


@pytest.fixture(scope="module")
def draft():
    return load_checkpoint(load_config(DEMO_DRAFT_DIR)[0], DEMO_DRAFT_DIR)


@pytest.fixture(scope="module")
def rows():
    samples = [sample for task in TASKS for sample in held_out_samples(task, seed=2, count=2)]
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))
    packer = Packer(cycle(samples), tokenizer, (RowShape(12, 256),))
    return [as_rows(block) for block in packer.next_blocks()]


def test_it_is_small_and_of_the_demo_models_vocabulary():
    assert sum(file.stat().st_size for file in DEMO_DRAFT_DIR.iterdir()) < 2_000_000
    ours, theirs = load_config(DEMO_DRAFT_DIR)[0], load_config(DEMO_DIR)[0]
    assert (ours.vocab_size, ours.max_model_len) == (theirs.vocab_size, theirs.max_model_len)
    assert ours.eos_token_ids == theirs.eos_token_ids


def test_it_says_what_the_demo_model_would_in_nine_of_ten_places(demo, draft, rows):
    (trainee, ours), (teacher, theirs) = draft, demo
    loss, agreed = jax.jit(lambda ours, theirs: distil(trainee, ours, teacher, theirs, rows, "float32"))(ours, theirs)
    assert agreed > 0.9
    assert 0 < loss < 0.5


def test_training_begins_with_layers_of_the_demo_model(demo, draft, tmp_path):
    parameters = first_parameters(draft[0], demo[1])
    name = "model.layers.{}.mlp.up_proj.weight"
    for place, layer in enumerate(LAYERS):
        assert (parameters[name.format(place)] == demo[1][name.format(layer)]).all()
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))
    export_half(parameters, draft_config(hf_config(tokenizer)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(DEMO_DRAFT_DIR / "model.safetensors").keys()
    assert load_config(tmp_path) == load_config(DEMO_DRAFT_DIR)
