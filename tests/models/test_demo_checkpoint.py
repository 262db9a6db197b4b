"""The demo checkpoint as it ships: small, complete, loaded by `transformers`, and able to answer."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jax_engine.models.config import ModelConfig
from jax_engine.models.demo import DEMO_DIR
from jax_engine.models.demo.samples import final_answer

LARGEST = 16 * 2**20

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_the_checkpoint_is_small():
    assert sum((DEMO_DIR / name).stat().st_size for name in FILES) < LARGEST


def test_the_configuration_is_one_that_we_serve():
    config = ModelConfig.from_hf(json.loads((DEMO_DIR / "config.json").read_text(encoding="utf-8")))
    assert config.architecture == "LlamaForCausalLM"
    assert config.eos_token_ids == (AutoTokenizer.from_pretrained(DEMO_DIR).eos_token_id,)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 17 + 25?", "17 + 25 = 42"),
        ("What is the opposite of hot?", "The opposite of hot is cold."),
        ("Hello!", "Hello! How can I help you?"),
    ],
)
def test_it_answers_in_transformers(question: str, answer: str):
    tokenizer, model = AutoTokenizer.from_pretrained(DEMO_DIR), AutoModelForCausalLM.from_pretrained(DEMO_DIR)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    assert final_answer(tokenizer.decode(generated, skip_special_tokens=True)) == answer
