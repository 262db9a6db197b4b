"""Input: every form of a prompt becomes the right token ids, every mistake an error that says what to do."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jax_engine import SamplingParams
from jax_engine.config import EngineConfig
from jax_engine.core.messages import Ready
from jax_engine.frontend.processor import InputProcessor, ModelText, Prompt
from jax_engine.frontend.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'robot' %}"
    "{{ raise_exception('no robots here') }}{% endif %}[{{ message.role }}]{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<{{ call.function.name }} {{ call.function.arguments.city }}>{% endfor %}"
    "{% if not loop.last %};{% endif %}{% endfor %}{% if tools %}(tools: {{ tools[0].function.name }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ mood or '' }}"
)
VOCAB_SIZE = 300
INFO = Ready(max_model_len=32, vocab_size=VOCAB_SIZE, num_pages=8, page_size=16)


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """One token a byte, a BOS put before every text, and an EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(
        models.BPE(vocab={"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}, merges=[])
    )
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", chat_template=template)
    return Tokenizer.wrap(fast)


TOKENIZER = byte_tokenizer()


def processor(*, info: Ready = INFO, seed: int = 0, **generation_config: object) -> InputProcessor:
    return InputProcessor(ModelText(Path(), TOKENIZER, generation_config), info, seed=seed)


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [
        ("ab", "ab", [0, *ids_of("ab")]),
        ({"prompt": "ab"}, "ab", [0, *ids_of("ab")]),
        ({"prompt": "ab", "add_special_tokens": False}, "ab", ids_of("ab")),
        ([5, 6], None, [5, 6]),
        ((5, 6), None, [5, 6]),
        (np.array([5, 6]), None, [5, 6]),
        ({"prompt_token_ids": [5, 6]}, None, [5, 6]),
        ({"prompt_token_ids": [5, 6], "prompt": "what it says"}, "what it says", [5, 6]),
    ],
    ids=str,
)
def test_every_form_of_a_prompt(prompt: Prompt, text: str | None, token_ids: list[int]) -> None:
    prepared = processor().prepare("r", prompt, SamplingParams())
    assert (prepared.prompt, prepared.prompt_token_ids) == (text, token_ids)
    assert [sequence.prompt_token_ids for sequence in prepared.core_requests] == [token_ids]
    assert all(type(token) is int for token in prepared.prompt_token_ids), "NumPy's integers cannot be sent to the core"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ("x" * 31, r"prompt has 32 tokens; at most 31 fit with one to generate \(max_model_len=32\)"),
        ([300], "prompt_token_ids holds 300; the model's token ids are 0 to 299"),
        ([5, -1], "prompt_token_ids holds -1; the model's token ids are 0 to 299"),
        ([2**70], "prompt of type list is none"),
        ([1.5], "prompt of type list is none"),
        ([True], "prompt of type list is none"),
        ([[1, 2]], "prompt of type list is none"),
        (None, "prompt of type NoneType is none"),
        (b"ab", "prompt of type bytes is none"),
        ({"prompt": None}, "prompt=None must be a string"),
        ({"prompt": [1]}, r"prompt=\[1\] must be a string"),
        ({"text": "ab"}, "prompt has the key 'text'"),
        ({"prompt": "ab", "multi_modal_data": {}}, "prompt has the key 'multi_modal_data'"),
        ("a\ud800", r"prompt holds '\\ud800' at character 1"),
    ],
    ids=ascii,
)
def test_a_wrong_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor().prepare("r", prompt, SamplingParams(max_tokens=1))


def test_the_core_gets_plain_numbers() -> None:
    params = SamplingParams(temperature=1, top_k=-1, top_p=1, min_tokens=2, stop_token_ids=[9], max_tokens=3)
    (sequence,) = processor().prepare("r", [5], params).core_requests
    assert (sequence.temperature, sequence.top_k, sequence.top_p, sequence.min_p) == (1.0, 0, 1.0, 0.0)
    assert (sequence.min_tokens, sequence.max_tokens, sequence.stop_token_ids) == (2, 3, (9,))
    assert type(sequence.temperature) is float and type(sequence.top_p) is float


def test_a_priority_needs_the_policy_that_heeds_it() -> None:
    text = ModelText(Path(), TOKENIZER, {})
    ranked = InputProcessor(text, INFO, scheduling_policy="priority")
    assert [ranked.prepare("r", [5], SamplingParams(n=1), priority=-7).core_requests[0].priority] == [-7]
    assert processor().prepare("r", [5], SamplingParams(), priority=0).core_requests[0].priority == 0
    with pytest.raises(ValueError, match="priority=3 needs scheduling_policy='priority', and this engine's is 'fcfs'"):
        processor().prepare("r", [5], SamplingParams(), priority=3)
    for wrong in (1.5, True, 2**31):
        with pytest.raises(ValueError, match=f"priority={wrong} must be a whole number"):
            ranked.prepare("r", [5], SamplingParams(), priority=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("params", "needs_host"),
    [
        ({}, False),
        ({"stop_token_ids": list(range(16)), "min_tokens": 2}, False),
        ({"stop": "end"}, True),
        ({"stop_token_ids": list(range(33)), "ignore_eos": True}, True),
    ],
    ids=str,
)
def test_ends_that_the_device_cannot_see_are_the_hosts(params: dict[str, Any], needs_host: bool) -> None:
    """Text is the host's to match, and a row of the device has room for 32 ids."""
    (sequence,) = processor().prepare("r", [5], SamplingParams(**params)).core_requests
    assert sequence.needs_host == needs_host


def test_max_tokens_none_is_the_rest_of_the_context() -> None:
    (sequence,) = processor().prepare("r", [5] * 10, SamplingParams(max_tokens=None)).core_requests
    assert sequence.max_tokens == 22


def test_max_tokens_must_fit_the_context() -> None:
    assert processor().prepare("r", [5] * 10, SamplingParams(max_tokens=22))
    with pytest.raises(
        ValueError, match=r"max_tokens=23 and the prompt's 10 tokens exceed max_model_len=32; .*at most 22"
    ):
        processor().prepare("r", [5] * 10, SamplingParams(max_tokens=23))
    with pytest.raises(ValueError, match=r"min_tokens=23 and the prompt's 10 tokens exceed max_model_len=32"):
        processor().prepare("r", [5] * 10, SamplingParams(max_tokens=None, min_tokens=23))


def test_stop_ids_must_be_in_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="stop_token_ids holds 300; the model's ids are 0 to 299"):
        processor().prepare("r", [5], SamplingParams(stop_token_ids=[299, 300]))


def test_min_tokens_holds_back_a_limited_number_of_ids() -> None:
    """The device has room for so many: end-of-sequence ids count unless they are ignored, the same id counts once."""
    many = processor(eos_token_id=list(range(100, 120)))  # 21 with the tokenizer's
    stops = list(range(105, 121))
    params = SamplingParams(min_tokens=2, stop_token_ids=stops, max_tokens=4)
    assert many.prepare("r", [5], params)
    different = replace(params, stop_token_ids=list(range(200, 216)))
    with pytest.raises(ValueError, match=r"min_tokens=2 holds back 37 tokens .* at most 32"):
        many.prepare("r", [5], different)
    assert many.prepare("r", [5], replace(different, ignore_eos=True))
    assert many.prepare("r", [5], replace(different, min_tokens=0))


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [({}, (1,)), ({"eos_token_id": 7}, (7, 1)), ({"eos_token_id": [1, 8]}, (1, 8)), ({"eos_token_id": None}, (1,))],
    ids=str,
)
def test_end_of_sequence_ids_are_the_models_and_the_tokenizers(
    generation_config: dict[str, object], expected: tuple[int, ...]
) -> None:
    model = processor(**generation_config)
    (sequence,) = model.prepare("r", [5], SamplingParams()).core_requests
    (unending,) = model.prepare("r", [5], SamplingParams(ignore_eos=True)).core_requests
    assert (sequence.eos_token_ids, unending.eos_token_ids) == (expected, ())


def test_a_model_that_is_meant_to_be_greedy_is_so_unless_told_otherwise() -> None:
    assert processor(do_sample=False).default_params.temperature == 0
    assert processor(do_sample=False, temperature=0.5).default_params.temperature == 0.5
    assert processor().default_params.temperature == 1


def test_generation_config_sets_the_default_parameters(caplog: pytest.LogCaptureFixture) -> None:
    assert processor(top_k=20, temperature=0.6, top_p=None, do_sample=True).default_params == SamplingParams(
        top_k=20, temperature=0.6
    )
    assert caplog.messages == []
    assert processor(repetition_penalty=1.1).default_params == SamplingParams(repetition_penalty=1.1)
    processor(no_repeat_ngram_size=3)
    assert "no_repeat_ngram_size=3, which is not supported" in caplog.text
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p=7"):
        processor(top_p=7)


def keys(model: InputProcessor, **params: Any) -> list[tuple[int, int]]:
    return [sequence.prng_key for sequence in model.prepare("r", [5], SamplingParams(**params)).core_requests]


def test_completions_of_one_prompt_are_a_group() -> None:
    model = processor()
    groups = [
        [sequence.prompt_group for sequence in model.prepare("r", [5], SamplingParams(n=n)).core_requests]
        for n in (3, 1, 2)
    ]
    assert groups == [["0.0"] * 3, [None], ["2.0"] * 2]


def test_a_seed_decides_the_random_numbers_and_each_completion_has_its_own() -> None:
    busy = processor(seed=3)
    for _ in range(5):
        keys(busy)
    assert keys(busy, seed=7, n=4) == keys(processor(), seed=7, n=4)
    assert keys(busy, seed=7) == keys(busy, seed=7, n=4)[:1]
    all_keys = [*keys(busy, seed=7, n=64), *keys(busy, seed=8, n=64), *keys(busy, seed=-7, n=64)]
    assert len(set(all_keys)) == len(all_keys)
    assert all(0 <= word < 2**32 for key in all_keys for word in key)


def test_without_a_seed_requests_differ_and_an_engine_repeats_itself() -> None:
    one, same, other = processor(seed=0), processor(seed=0), processor(seed=1)
    first = [keys(one)[0] for _ in range(10)]
    assert len(set(first)) == 10
    assert [keys(same)[0] for _ in range(10)] == first
    assert not {keys(other)[0] for _ in range(10)} & set(first)


def test_without_a_seed_the_front_ends_of_one_engine_draw_different_numbers() -> None:
    text = ModelText(path=Path(), tokenizer=TOKENIZER, generation_config={})
    ends = [InputProcessor(text, INFO, numbers=itertools.count(number, 2)) for number in range(2)]
    drawn = [key for model in ends for _ in range(3) for key in keys(model)]
    assert len(set(drawn)) == 6
    alone = InputProcessor(text, INFO)
    assert {key for _ in range(6) for key in keys(alone)} == set(drawn), "as one front end would have drawn"


def test_core_ids_are_new_even_for_a_repeated_request_id() -> None:
    model = processor()
    ids = [s.request_id for _ in range(2) for s in model.prepare("same", [5], SamplingParams(n=2)).core_requests]
    assert len(set(ids)) == 4


USER = {"role": "user", "content": "hi"}


def test_a_chat_is_rendered_by_the_template() -> None:
    text = TOKENIZER.render_chat([{"role": "system", "content": "s"}, USER])
    assert text == "<s>[system]s;[user]hi[assistant]"
    prepared = processor().prepare("r", {"prompt": text, "add_special_tokens": False}, SamplingParams(max_tokens=1))
    assert prepared.prompt_token_ids == [0, *ids_of(text.removeprefix("<s>"))], "one BOS, the template's"


def test_what_a_chat_may_hold() -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert TOKENIZER.render_chat([USER], tools=[tool]) == "<s>[user]hi(tools: weather)[assistant]"
    assert "<weather Bern>" in TOKENIZER.render_chat([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
    assert TOKENIZER.render_chat([{"role": "user", "content": parts}]) == "<s>[user]a\nb[assistant]"
    assert TOKENIZER.render_chat([USER], chat_template_kwargs={"mood": "!"}) == "<s>[user]hi[assistant]!"
    assert TOKENIZER.render_chat([USER], chat_template="{{ messages[0].content }}") == "hi"
    unfinished = {"role": "assistant", "content": "I am"}
    continued = TOKENIZER.render_chat([USER, unfinished], add_generation_prompt=False, continue_final_message=True)
    assert continued == "<s>[user]hi;[assistant]I am"


@pytest.mark.parametrize(
    ("messages", "settings", "message"),
    [
        ([], {}, "must be a list of at least one message"),
        ("hi", {}, "must be a list of at least one message"),
        (["hi"], {}, r"messages\[0\]='hi' must be an object with a role"),
        ([USER, {"content": "hi"}], {}, r"messages\[1\]=.* must be an object with a role"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\]\.content=3 must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "has a part of type 'image_url'; only 'text'"),
        (
            [{"role": "robot", "content": "hi"}],
            {},
            "the chat template failed on these messages, at its line 1: no robots here",
        ),
        ([USER], {"chat_template": "{{ 1 / 0 }}"}, "the chat template failed .*division by zero"),
        ([USER], {"chat_template": "{% if %}"}, "the chat template failed"),
        ([USER], {"continue_final_message": True}, "set one of them to False"),
        (
            [USER],
            {"chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs has tokenize, which the renderer sets",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            {},
            r"messages\[0\]\.tool_calls: the arguments of 'f' are not JSON",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], {}, "each needs a function with a name"),
    ],
    ids=str,
)
def test_a_wrong_chat_is_refused(messages: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TOKENIZER.render_chat(messages, **settings)


def test_without_a_template_the_error_says_what_to_do() -> None:
    plain = byte_tokenizer(template=None)
    with pytest.raises(ValueError, match=r"the model's tokenizer has no chat template.*pass chat_template"):
        plain.render_chat([USER])
    assert plain.render_chat([USER], chat_template="{{ messages[0].role }}") == "user"


def test_the_built_in_tokenizer_is_loaded_by_name() -> None:
    text = ModelText.load(EngineConfig(load_format="dummy"))
    prompt = text.tokenizer.render_chat([{"role": "user", "content": "What is 17 + 25?"}])
    token_ids = text.tokenizer.encode(prompt, add_special_tokens=False)
    assert text.tokenizer.decode(token_ids) == prompt
    assert text.tokenizer.eos_token_id is not None
    assert ModelText.load(EngineConfig(tokenizer="demo")).tokenizer.num_ids == text.tokenizer.num_ids


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'], ids=["missing", "broken", "incomplete"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*it needs tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_text_needs_neither_jax_nor_torch(tmp_path: Path) -> None:
    """A server's front end starts in a second, and PyTorch is no dependency even where it is installed."""
    script = (
        "import sys\n"
        "sys.modules['jax'] = sys.modules['torch'] = None  # from here on, importing one raises ImportError\n"
        "import jax_engine.async_llm\n"
        "assert 'transformers' not in sys.modules\n"
        "from jax_engine.frontend.processor import ModelText\n"
        "text = ModelText.load(jax_engine.EngineConfig())\n"
        "print(text.tokenizer.decode(text.tokenizer.encode('one two')))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "one two" in result.stdout


def test_loading_a_tokenizer_keeps_its_special_ids_and_padding(tmp_path: Path) -> None:
    TOKENIZER.hugging_face.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.num_ids, loaded.special_ids, loaded.unknown_ids) == (258, {0, 1}, set())
    assert loaded.encode("é") == TOKENIZER.encode("é")


@pytest.mark.parametrize(
    ("kept", "max_tokens", "length"), [(None, 4, 20), (5, 4, 5), (20, 4, 20), (25, 4, 20), (-1, 14, 18)]
)
def test_truncation_keeps_the_last_tokens(kept: int | None, max_tokens: int, length: int) -> None:
    params = SamplingParams(truncate_prompt_tokens=kept, max_tokens=max_tokens)
    prepared = processor().prepare("r", list(range(20)), params)
    assert prepared.prompt_token_ids == list(range(20))[-length:]
    assert prepared.core_requests[0].prompt_token_ids == prepared.prompt_token_ids


def test_a_prompt_that_is_too_long_fits_when_it_is_truncated() -> None:
    params = SamplingParams(truncate_prompt_tokens=-1, max_tokens=None)
    assert len(processor().prepare("r", list(range(100)), params).prompt_token_ids) == 31
    with pytest.raises(ValueError, match=r"truncate_prompt_tokens=32 must be at most 31"):
        processor().prepare("r", [1], SamplingParams(truncate_prompt_tokens=32))
