"""`LLM.sleep` and what follows: memory is given up and had again, and nothing of the answers changes."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from adapters import write_adapter, write_base

from jax_engine import LLM, EngineAsleepError, EngineBusyError, LoRARequest, SamplingParams
from jax_engine.core.admin_client import is_named

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PENALIZED = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, repetition_penalty=1.3)
PROMPT = [5, 17, 80, 3, 3, 41, 9, 60, 2, 77]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    return LoRARequest("own", 1, write_adapter(tmp_path_factory.mktemp("adapter") / "own", rank=4, seed=1, alpha=8))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        str(write_base(tmp_path_factory.mktemp("base"))),
        tokenizer="demo",
        max_num_seqs=2,
        max_num_batched_tokens=8,
        block_size=8,
        max_model_len=64,
        enable_lora=True,
        max_loras=1,
        compilation_cache_dir="",
        profile_dir=str(tmp_path_factory.mktemp("profiles")),
    ) as llm:
        yield llm


def answers(llm: LLM, adapter: LoRARequest) -> list[list[int]]:
    outputs = llm.generate(PROMPT, GREEDY, use_tqdm=False)
    outputs += llm.generate(PROMPT, PENALIZED, use_tqdm=False)
    outputs += llm.generate(PROMPT, GREEDY, lora_request=adapter, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


@pytest.mark.parametrize("level", [1, 2])
def test_what_sleeps_has_no_arrays_and_answers_as_before_once_awake(llm: LLM, adapter: LoRARequest, level: int) -> None:
    before = answers(llm, adapter)
    devices = llm._core._core.runner.devices  # type: ignore[union-attr]
    held = [*devices.weights.leaves, *jax.tree.leaves((devices.state, devices.full))]
    num_bytes, awake = sum(array.nbytes for array in held), live_bytes()
    compiled = llm.get_metrics().programs_compiled
    llm.sleep(level)
    assert llm.is_sleeping()
    assert all(array.is_deleted() for array in held)
    assert live_bytes() <= awake - num_bytes
    with pytest.raises(EngineAsleepError, match="wake_up"):
        llm.generate(PROMPT, GREEDY)
    llm.wake_up(["weights"])
    assert llm.is_sleeping()
    llm.wake_up()
    assert not llm.is_sleeping()
    first = llm.generate(PROMPT, GREEDY, use_tqdm=False)[0]
    assert first.num_cached_tokens == 0, "what the cache held is gone"
    assert answers(llm, adapter) == before
    assert len(set(map(tuple, before))) == 3, "penalty and adapter matter"
    stats = llm.get_metrics()
    assert stats.programs_compiled >= compiled
    assert stats.compiles_in_request_path_total == 0


def test_to_sleep_deeper_lets_go_of_the_weights_in_host_memory(llm: LLM, adapter: LoRARequest) -> None:
    before = answers(llm, adapter)
    llm.sleep(1)
    llm.sleep(2)
    assert llm._core._core.runner.devices.weights._on_host is None  # type: ignore[union-attr]
    llm.wake_up()
    llm.wake_up()
    assert answers(llm, adapter) == before


@pytest.mark.parametrize("level", [0, 3, True, "1"])
def test_another_level_is_refused(llm: LLM, level: int) -> None:
    with pytest.raises(ValueError, match="must be 1"):
        llm.sleep(level)


@pytest.mark.parametrize("tags", [["scheduling"], [], "weights"])
def test_other_tags_are_refused(llm: LLM, tags: list[str]) -> None:
    with pytest.raises(ValueError, match="must be of weights and kv_cache"):
        llm.wake_up(tags)


def test_a_profile_is_written_where_xprof_looks_for_it(llm: LLM) -> None:
    with pytest.raises(EngineBusyError, match="no profile is being recorded"):
        llm.stop_profile()
    llm.start_profile()
    with pytest.raises(EngineBusyError, match="stop it first"):
        llm.start_profile()
    llm.generate(PROMPT, GREEDY, use_tqdm=False)
    llm.stop_profile()
    folder = Path(llm.config.profile_dir or "")
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))


def test_names_of_requests_are_those_that_clients_know() -> None:
    hex12 = "0123456789ab"
    assert is_named(f"mine-{hex12}", ["mine"])
    assert is_named(f"mine-{hex12}-3", ["other", "mine"])
    assert is_named("mine", ["mine"])
    assert is_named("anything", None)
    assert not is_named(f"mine-too-{hex12}", ["mine"])
    assert not is_named(f"mine-{hex12}", [])
