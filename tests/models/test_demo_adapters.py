"""The demo model's adapters: trained on answers in a manner, they answer in it, and the model itself stays as it is."""

from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest

from jax_engine import LLM, LoRARequest, SamplingParams
from jax_engine.adapters.adapter_files import read_adapter
from jax_engine.frontend.beam_search import BeamSearchParams
from jax_engine.models.demo.samples import ExactAnswer, Sample
from jax_engine.models.demo.train_adapters import MANNERS, adapter_samples, export, in_manner, merged, new_factors

GREEDY = SamplingParams(temperature=0, max_tokens=40)
QUESTIONS = {
    "Hello!": "Hello! How can I help you?",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "Thank you!": "You are welcome!",
}
SHOUT, FAREWELL = LoRARequest("shout", 1, "demo:shout"), LoRARequest("farewell", 2, "demo:farewell")


@pytest.fixture(scope="module")
def llm():
    with LLM(enable_lora=True, max_num_seqs=4, max_num_batched_tokens=64) as engine:
        yield engine


def answers(llm: LLM, adapters: list[LoRARequest | None] | LoRARequest | None) -> list[str]:
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False, lora_request=adapters)
    return [output.outputs[0].text for output in outputs]


def test_each_adapter_answers_in_its_manner(llm):
    plain = list(QUESTIONS.values())
    assert answers(llm, None) == plain
    assert answers(llm, SHOUT) == [answer.upper() for answer in plain]
    assert answers(llm, FAREWELL) == [f"{answer} Have a nice day!" for answer in plain]


def test_one_batch_holds_all_of_them(llm):
    plain = list(QUESTIONS.values())
    mixed = [None, SHOUT, FAREWELL, SHOUT]
    assert answers(llm, mixed) == [plain[0], plain[1].upper(), f"{plain[2]} Have a nice day!", plain[3].upper()]


def test_beams_have_an_adapter_too(llm):
    prompt = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Hello!"}], tokenize=False, add_generation_prompt=True
    )
    params = BeamSearchParams(beam_width=2, max_tokens=30)
    tokens = {"prompt": prompt, "add_special_tokens": False}
    found = [llm.beam_search(tokens, params, lora_request=lora)[0].sequences[0].text for lora in (None, SHOUT)]
    assert ["Hello! How can I help you?" in found[0], "HELLO! HOW CAN I HELP YOU?" in found[1]] == [True, True]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([SHOUT], "lora_request has 1 entries for 4 conversations"),
        ("shout", "lora_request='shout' is none; give a LoRARequest"),
        (LoRARequest("other", 3, "demo:whisper"), "lora_path='demo:whisper' is not a folder"),
    ],
    ids=str,
)
def test_a_wrong_adapter_is_refused_before_anything_runs(llm, given, message):
    steps = llm.get_metrics().steps_total
    with pytest.raises(ValueError, match=message):
        answers(llm, given)
    assert llm.get_metrics().steps_total == steps


def test_answers_are_rewritten_and_thoughts_are_not():
    sample = Sample(
        "addition",
        "1+1",
        ({"role": "user", "content": "Add"}, {"role": "assistant", "content": "<think>\none\n</think>\n\nIt is two"}),
        ExactAnswer("It is two"),
    )
    shouted = in_manner(sample, MANNERS["shout"]).messages
    assert shouted == (sample.messages[0], {"role": "assistant", "content": "<think>\none\n</think>\n\nIT IS TWO"})
    drawn = list(islice(adapter_samples(MANNERS["farewell"], seed=0), 20))
    assert all(sample.messages[-1]["content"].endswith("Have a nice day!") for sample in drawn)


def test_a_trained_adapter_is_exported_as_it_is_read(tmp_path):
    parameters = {
        "model.layers.0.self_attn.q_proj.weight": jnp.zeros((6, 2, 4)),
        "model.layers.0.self_attn.o_proj.weight": jnp.zeros((2, 4, 6)),
        "model.layers.0.mlp.up_proj.weight": jnp.zeros((6, 5)),
        "model.norm.weight": jnp.ones(6),
    }
    factors = new_factors(parameters, rank=2, seed=0)
    assert all(np.array_equal(value, parameters[name]) for name, value in merged(parameters, factors, 2.0).items())
    factors = {name: jnp.asarray(np.asarray(value + 0.5, np.float16), jnp.float32) for name, value in factors.items()}
    export(factors, tmp_path, rank=2, alpha=4.0)
    read = read_adapter(str(tmp_path), max_rank=2)
    whole = merged(parameters, factors, 2.0)
    for module, own in read.items():
        product = own.b @ own.a  # [out, in]
        weight = np.asarray(whole[f"{module}.weight"])
        shaped = weight.reshape(8, 6).T if "o_proj" in module else weight.reshape(6, -1).T
        np.testing.assert_allclose(product, shaped, rtol=1e-5)
