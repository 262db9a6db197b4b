"""`LLM` on a tiny random model: vLLM's calls, the same tokens alone or in company, and every page free afterwards."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_engine import TINY

from jax_engine import LLM, RequestOutput, SamplingParams
from jax_engine.frontend.interrupts import interrupts_between_steps
from jax_engine.frontend.llm_settings import engine_config
from jax_engine.loading.model_files import resolve_model_path

MAX_MODEL_LEN = 96
PROMPTS = [
    "The quick brown fox",
    [5, 6, 7, 8],
    {"prompt": "What is 17 + 25?"},
    {"prompt_token_ids": list(range(40, 70))},
]
# Many, so that random tokens soon hold one.
EOS_TOKEN_IDS = list(range(100, 116))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small engine over random weights, with the built-in tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY | {"vocab_size": 1024, "num_hidden_layers": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_TOKEN_IDS}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model_path("demo") / name, folder)
    return {
        "model": str(folder),
        "load_format": "dummy",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 8,
        "compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
    }


@pytest.fixture(scope="module")
def shared_llm(settings: dict[str, Any]) -> Iterator[LLM]:
    with LLM(**settings) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The shared engine; whatever a test does with it, nothing may stay in it."""
    yield shared_llm
    stats = shared_llm.get_metrics()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use) == (0, 0, 0)


def generate(llm: LLM, prompts: Any, params: Any) -> list[RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False)


def tokens(llm: LLM, prompt: Any, **params: Any) -> list[int]:
    (output,) = generate(llm, prompt, SamplingParams(**params))
    return output.outputs[0].token_ids


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True, **params})


def test_outputs_come_in_the_order_of_the_prompts_with_their_own_parameters(llm: LLM) -> None:
    params = [
        greedy(max_tokens=9),
        greedy(max_tokens=1),
        SamplingParams(seed=1, ignore_eos=True),
        greedy(max_tokens=20),
    ]
    outputs = generate(llm, PROMPTS, params)
    assert [output.prompt for output in outputs] == ["The quick brown fox", None, "What is 17 + 25?", None]
    assert [output.prompt_token_ids for output in outputs[1::2]] == [[5, 6, 7, 8], list(range(40, 70))]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 16, 20]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    tokenizer = llm.get_tokenizer()
    for output in outputs:
        whole = tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
        assert output.outputs[0].text == whole


def test_one_prompt_is_a_list_of_one(llm: LLM) -> None:
    as_text, as_ids = generate(llm, "abc", greedy()), generate(llm, [5, 6, 7], greedy())
    assert len(as_text) == len(as_ids) == 1
    assert as_ids[0].prompt_token_ids == [5, 6, 7]
    assert generate(llm, [], greedy()) == []


def test_a_seed_gives_the_same_tokens_alone_and_in_company(llm: LLM) -> None:
    params = [SamplingParams(seed=seed, max_tokens=20, top_k=50, ignore_eos=True) for seed in range(4)]
    together = generate(llm, PROMPTS, params)
    alone = [generate(llm, prompt, one)[0] for prompt, one in zip(PROMPTS, params, strict=True)]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    assert len({tuple(tokens(llm, "abc", seed=seed)) for seed in range(4)}) == 4


def test_completions_of_one_prompt_differ_and_repeat_with_the_seed(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True)
    (first,), (again,) = generate(llm, "abc", params), generate(llm, "abc", params)
    assert [c.index for c in first.outputs] == [0, 1, 2]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 3
    assert first.outputs == again.outputs
    assert first.outputs[0].token_ids == tokens(llm, "abc", seed=5, max_tokens=12, ignore_eos=True)


def test_a_fresh_engine_repeats_itself_and_one_engine_does_not(settings: dict[str, Any]) -> None:
    runs = []
    for seed in (0, 0, 1):
        with LLM(**settings, seed=seed) as llm:
            runs.append([tokens(llm, "abc", max_tokens=12) for _ in range(2)])
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.generate("abc")
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.get_metrics()


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (plain,) = generate(llm, "abc", greedy(max_tokens=30))
    text = plain.outputs[0].text
    stop = text[len(text) // 2 :][:3]
    (stopped, included) = generate(
        llm,
        ["abc"] * 2,
        [greedy(max_tokens=30, stop=stop), greedy(max_tokens=30, stop=stop, include_stop_str_in_output=True)],
    )
    cut = text.index(stop)
    assert (stopped.outputs[0].text, included.outputs[0].text) == (text[:cut], text[: cut + len(stop)])
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    count = len(stopped.outputs[0].token_ids)
    assert count < 30 and stopped.outputs[0].token_ids == plain.outputs[0].token_ids[:count]


def test_a_stop_id_ends_the_sequence_after_min_tokens(llm: LLM) -> None:
    ids = tokens(llm, "abc", seed=1, max_tokens=30, ignore_eos=True)
    stop = ids[4]
    given = {"seed": 1, "max_tokens": 30, "ignore_eos": True, "stop_token_ids": [stop]}
    (output,) = generate(llm, "abc", SamplingParams(**given))
    assert output.outputs[0].token_ids == ids[: ids.index(stop) + 1]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    later = tokens(llm, "abc", **given, min_tokens=10)
    assert len(later) > 10 and stop not in later[:10], "the id cannot be sampled before"


def test_an_end_of_sequence_id_ends_the_sequence_unless_ignored(llm: LLM) -> None:
    params = [SamplingParams(seed=seed, max_tokens=80) for seed in range(16)]
    ended = [output.outputs[0] for output in generate(llm, ["abc"] * 16, params)]
    natural = [c for c in ended if c.finish_reason == "stop"]
    assert natural, "with 16 of 1024 ids, some sequence of 80 random tokens ends by itself"
    for completion in natural:
        assert completion.stop_reason is None
        assert completion.token_ids[-1] in EOS_TOKEN_IDS and not set(completion.token_ids[:-1]) & set(EOS_TOKEN_IDS)
    index = ended.index(natural[0])
    unending = tokens(llm, "abc", seed=index, max_tokens=80, ignore_eos=True)
    assert len(unending) == 80 and unending[: len(natural[0].token_ids)] == natural[0].token_ids
    held = tokens(llm, "abc", seed=index, max_tokens=80, min_tokens=80)
    assert len(held) == 80 and not set(held[:-1]) & set(EOS_TOKEN_IDS)


def test_without_max_tokens_the_context_is_filled(llm: LLM) -> None:
    (output,) = generate(llm, PROMPTS[3], greedy(max_tokens=None))
    assert len(output.prompt_token_ids) + len(output.outputs[0].token_ids) == MAX_MODEL_LEN
    assert output.outputs[0].finish_reason == "length"


def test_chat_renders_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is 17 + 25?"}]
    rendered = llm.get_tokenizer().apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = llm.get_tokenizer().apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    (output,) = llm.chat(conversation, greedy(), use_tqdm=False)
    assert (output.prompt, output.prompt_token_ids) == (rendered, ids)
    first, second = llm.chat([conversation, [{"role": "user", "content": "Hi"}]], greedy(), use_tqdm=False)
    assert first.outputs == output.outputs and second.prompt != output.prompt
    with pytest.raises(ValueError, match=r"conversations\[1\]: .*must be a list of at least one message"):
        llm.chat([conversation, []], greedy())
    (tail,) = llm.chat(
        [*conversation, {"role": "assistant", "content": "It is"}],
        greedy(),
        use_tqdm=False,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert tail.prompt is not None and tail.prompt.endswith("It is")


def test_a_bad_prompt_is_named_before_anything_runs(llm: LLM) -> None:
    steps = llm.get_metrics().steps_total
    with pytest.raises(ValueError, match=r"prompts\[2\]: prompt_token_ids holds 1024"):
        llm.generate(["abc", [1, 2], [1024]])
    with pytest.raises(ValueError, match=r"^prompt is empty"):
        llm.generate("")
    with pytest.raises(
        ValueError, match=r"prompts\[1\]: max_tokens=96 and the prompt's 4 tokens exceed max_model_len=96"
    ):
        llm.generate(["abc", PROMPTS[1]], [greedy(), greedy(max_tokens=96)])
    with pytest.raises(ValueError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(["abc", "def"], [greedy()])
    with pytest.raises(ValueError, match="sampling_params holds 'temperature'; give SamplingParams"):
        llm.generate("abc", {"temperature": 0})  # type: ignore[arg-type]
    assert llm.get_metrics().steps_total == steps


def test_more_prompts_than_slots_are_all_answered(llm: LLM) -> None:
    outputs = generate(llm, [f"prompt {i}" for i in range(30)], greedy(max_tokens=5))
    assert [output.prompt for output in outputs] == [f"prompt {i}" for i in range(30)]
    assert all(len(output.outputs[0].token_ids) == 5 for output in outputs)


def test_priorities_decide_who_runs_first(settings: dict[str, Any]) -> None:
    with LLM(**settings | {"max_num_seqs": 1, "scheduling_policy": "priority"}) as llm:
        outputs = llm.generate(PROMPTS, greedy(max_tokens=2), use_tqdm=False, priority=[2, -1, 0, 1])
        times = [output.metrics.first_scheduled_time for output in outputs if output.metrics]
        assert sorted(range(4), key=lambda index: times[index] or 0) == [1, 2, 3, 0]
        with pytest.raises(ValueError, match="priority has 1 entries for 4 prompts"):
            llm.generate(PROMPTS, priority=[1])


def test_the_progress_bar_counts_prompts_and_rates(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["abc", "def"], greedy())
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown and "2/2" in shown and "output: " in shown
    llm.generate("abc", greedy(), use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal; a shell starts its background jobs with Ctrl-C ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_aborts_and_leaves_the_engine_usable(llm: LLM) -> None:
    before = generate(llm, "abc", greedy())

    def press_ctrl_c() -> None:
        while llm.get_metrics().num_running == 0:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc"] * 200, greedy(max_tokens=90), use_tqdm=False)
    thread.join()
    assert llm.get_metrics().num_pages_in_use == 0
    assert generate(llm, "abc", greedy())[0].outputs == before[0].outputs


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_waits_for_the_step_to_end_and_a_second_does_not() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with interrupts_between_steps() as deliver:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            deliver()
        deliver()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_threads_take_turns(llm: LLM) -> None:
    expected = [generate(llm, prompt, greedy())[0].outputs for prompt in PROMPTS]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        found[index] = generate(llm, PROMPTS[index], greedy())[0].outputs

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(PROMPTS))] == expected


def test_settings_are_engine_configs_and_vllms_harmless_ones() -> None:
    config = engine_config({"model": "demo", "max_num_seqs": 3, "data_parallel_size": 1, "async_scheduling": True})
    assert (config.model, config.max_num_seqs) == ("demo", 3)
    assert [engine_config({"enable_prefix_caching": on}).enable_prefix_caching for on in (True, False)] == [True, False]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_num_seq": 3}, "LLM has no setting 'max_num_seq'; did you mean 'max_num_seqs'"),
        ({"color": "red"}, "LLM has no setting 'color'; known are model, tokenizer"),
        ({"cpu_offload_gb": 2}, r"cpu_offload_gb=2 is not supported yet; leave it out \(.* is 0\)"),
        ({"quantization": "awq"}, "quantization='awq' must be one of None, fp8, int8, compressed-tensors"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching=1 must be true or false"),
        ({"deterministic": "yes"}, "deterministic='yes' must be true or false; leave it out for false"),
        ({"lora_modules": ["a=b"], "enable_lora": True}, "lora_modules=a=b names an adapter for clients of a server"),
        ({"trust_remote_code": True}, "trust_remote_code=True is refused: a checkpoint's code is for PyTorch"),
        ({"max_num_queued_reqs": 5}, "max_num_queued_reqs=5 bounds what clients may send to a server"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be a whole number"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM("demo", **given)


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        LLM(str(tmp_path / "missing"))
