"""The whole core on a tiny random model: its tokens are the model's own, whatever shares the step or happens on the
way.
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from tiny_engine import TINY, VOCAB_SIZE, collect, core_request, run_requests

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import CoreProcess, EngineDeadError, InProcessCore
from jax_engine.core.messages import Abort, Add, TokenControls
from jax_engine.core.replicas import start_cores


def prompts(count: int, *, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, rng.integers(1, longest)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def alone(core):
    """Greedy continuations of eight prompts, each run with nothing beside it."""
    return {
        f"r{i}": run_requests(core, [core_request(f"r{i}", prompt, 20)])[f"r{i}"] for i, prompt in enumerate(prompts(8))
    }


def batch(num_tokens: int = 20, **fields):
    return [core_request(f"r{i}", prompt, num_tokens, **fields) for i, prompt in enumerate(prompts(8))]


def test_greedy_tokens_are_those_of_transformers(tmp_path, make_core):
    """The paged, bucketed, run-ahead engine against plain `generate` on the same weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    model.save_pretrained(tmp_path)
    ours = run_requests(make_core(model=str(tmp_path), load_format="auto"), batch())
    for i, prompt in enumerate(prompts(8)):
        settings = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        theirs = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)
        assert ours[f"r{i}"] == theirs[0, len(prompt) :].tolist()


def test_tokens_do_not_depend_on_the_batch(core, alone):
    assert run_requests(core, batch()) == alone


def test_tokens_do_not_depend_on_chunking(make_core, alone):
    """Steps of four tokens: every prompt is cut into chunks."""
    assert run_requests(make_core(max_num_batched_tokens=4), batch()) == alone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheduling_policy": "priority", "long_prefill_token_threshold": 8},
        {
            "scheduling_policy": "sjf",
            "enable_prefix_caching": False,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 96,
        },
    ],
    ids=["fcfs", "priority", "sjf"],
)
def test_tokens_do_not_depend_on_preemption(make_core, alone, changes):
    """Pages for one full sequence and a half: the others are preempted and computed again."""
    core = make_core(kv_cache_memory_bytes=page_bytes() * 16, max_model_len=96, **changes)
    tokens = {f"r{i}": [] for i in range(8)}
    waiting = batch(arrival_time=0.0)
    steps = 0
    while waiting or core.has_work():
        if waiting and steps % 4 == 0:  # each pair more urgent than those before it, if there are priorities
            urgency = {"priority": -steps} if "priority" in changes.values() else {}
            core.send(Add([structs.replace(waiting.pop(), **urgency) for _ in range(2)]))
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
        steps += 1
    assert tokens == alone
    assert core.stats().preemptions_total > 0
    assert core.stats().num_pages_in_use == 0


def test_beyond_the_bound_requests_are_refused_together_and_counted(make_core, alone):
    bounded = make_core(max_num_queued_reqs=3)
    requests = batch()
    assert bounded._core.handle(Add(requests[:2])) is None
    refused = bounded._core.handle(Add(requests[2:4])).outputs
    assert [(output.request_id, output.finish_reason) for output in refused] == [("r2", "refused"), ("r3", "refused")]
    assert "2 sequences are in flight and max_num_queued_reqs=3 is the most" in refused[0].error
    bounded.send(Abort(["r0", "r1"]))
    assert run_requests(bounded, requests[2:5]) == {name: alone[name] for name in ("r2", "r3", "r4")}
    assert bounded.stats().refused_requests_total == 2


def page_bytes() -> int:
    return TINY["num_hidden_layers"] * 2 * TINY["num_key_value_heads"] * 8 * TINY["head_dim"] * 4


@pytest.mark.parametrize("budget", [32, 5])
def test_seeded_samples_do_not_depend_on_the_batch(core, make_core, budget):
    requests = [
        core_request(f"r{i}", prompt, 15, temperature=1.0, top_p=0.9, prng_key=(i, 3))
        for i, prompt in enumerate(prompts(6))
    ]
    single = {request.request_id: run_requests(core, [request])[request.request_id] for request in requests}
    greedy = [core_request(f"g{i}", prompt, 9) for i, prompt in enumerate(prompts(3, seed=5))]
    other = core if budget == 32 else make_core(max_num_batched_tokens=budget)
    together = run_requests(other, [*greedy, *requests])
    assert {name: together[name] for name in single} == single


def test_requests_may_join_between_any_two_steps(core, alone):
    tokens = {f"r{i}": [] for i in range(8)}
    waiting = batch()
    steps = 0
    while waiting or core.has_work():
        if waiting and steps % 3 == 0:
            core.send(Add([waiting.pop()]))
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
        steps += 1
    assert tokens == alone


def test_stop_tokens_end_a_request_and_min_tokens_holds_them_back(core, alone):
    greedy = alone["r0"]
    stop = greedy[5]
    first = greedy.index(stop)
    (outputs,) = collect(core, [core_request("r0", prompts(8)[0], 20, stop_token_ids=(stop,))]).values()
    assert [token for output in outputs for token in output.new_token_ids] == greedy[: first + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)
    held = run_requests(core, [core_request("r0", prompts(8)[0], 20, stop_token_ids=(stop,), min_tokens=12)])["r0"]
    assert stop not in held[:11]
    assert len(held) >= 12


def test_an_abort_frees_its_pages_at_the_next_step(core):
    core.send(Add(batch(200 - 60)))
    for _ in range(3):
        core.step()
    assert core.stats().num_pages_in_use > 0
    core.send(Abort([f"r{i}" for i in range(8)]))
    while core.has_work():
        assert core.step().outputs == []
    assert core.stats().num_pages_in_use == 0


def test_no_request_waits_for_a_compile(tiny_settings, tmp_path, alone):
    """With an empty cache only the largest program exists at first. Greedy and sampled requests run until the others
    have come, and get the same tokens from every program.
    """
    changes = {"compilation_cache_dir": str(tmp_path), "max_num_batched_tokens": 8}  # seven programs
    core = InProcessCore(EngineConfig(**(tiny_settings | changes)))
    sampled = [
        core_request(f"s{i}", prompt, 12, temperature=0.8, top_p=0.9, prng_key=(i, 1))
        for i, prompt in enumerate(prompts(4, seed=7))
    ]
    expected, compiled = None, []
    while not compiled or core.stats().compile_eta_seconds:
        compiled.append(core.stats().programs_compiled)
        tokens = run_requests(core, [*sampled[:2], *batch(), *sampled[2:]])
        expected = expected or tokens
        assert tokens == expected
    assert compiled[0] < core.stats().programs_planned, "nothing was compiled while requests ran"
    assert {name: tokens[name] for name in alone} == alone
    assert run_requests(core, [*sampled, *batch()]) == expected
    stats = core.stats()
    assert stats.programs_compiled == stats.programs_planned > 4
    assert stats.compiles_in_request_path_total == 0
    core.shutdown()


def test_a_request_whose_program_is_still_compiled_waits_alone(make_core):
    core = make_core(max_num_batched_tokens=16, compilation_cache_dir="")
    controls = TokenControls(num_logprobs=1)
    requests = [core_request("full", [1, 2, 3], 6, controls=controls), core_request("plain", [1, 2, 3], 6)]
    early = core_request("aborted", [1, 2, 3], 6, controls=controls)
    core.send(Add([early]))
    core.send(Abort(["aborted"]))
    assert not core.has_work()
    core.send(Add(requests))
    tokens = {"full": [], "plain": []}
    ended = []
    while core.has_work():
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
            ended += [output.request_id] if output.finish_reason else []
    assert ended == ["plain", "full"]
    assert tokens["full"] == tokens["plain"]
    assert core.stats().compiles_in_request_path_total == 0


async def test_another_process_compiles_nothing_anew(tiny_settings, core):
    """All that a start needs is in the folder that an equal engine has filled."""
    folder = Path(tiny_settings["compilation_cache_dir"])
    before = {file.name for file in folder.rglob("*-cache")}
    assert len(before) >= core.stats().programs_planned
    (started,) = await start_cores(EngineConfig(**tiny_settings))
    while True:
        step = await started.receive()
        if step.stats.programs_compiled == step.stats.programs_planned:
            break
    await started.shutdown()
    assert {file.name for file in folder.rglob("*-cache")} == before


def test_steps_take_the_smallest_program_that_holds_them(core):
    before = core.stats()
    run_requests(core, [core_request("a", [1, 2, 3], 11)])
    after = core.stats()
    # A prompt of three in the program for four tokens, then ten tokens in that for one.
    assert after.token_rows_total - before.token_rows_total == 4 + 10
    assert after.padding_tokens_total - before.padding_tokens_total == 1


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_a_step_makes_no_copy_of_the_cache(make_core, scan_layers):
    """XLA updates the donated pages in place: the largest program's temporaries are far below the cache's size."""
    sizes = {"kv_cache_memory_bytes": page_bytes() * 4096, "max_model_len": 256, "max_num_seqs": 32}
    core = make_core(scan_layers=scan_layers, **sizes)
    cache_bytes = core.info.num_pages * page_bytes()
    compiled = core._core.runner.compiled
    _, executable = compiled.find(32, 4, compiled.largest.mode)
    analysis = executable.memory_analysis()
    assert analysis.alias_size_in_bytes >= cache_bytes
    assert analysis.temp_size_in_bytes < cache_bytes / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 100_000}, r"max_model_len=100000 is more than the 256 tokens"),
        (
            {"kv_cache_memory_bytes": 4096},
            r"max_model_len=256 needs 0.1 MiB .* room for \d+ tokens; lower max_model_len to \d+",
        ),
        ({"attention_backend": "pallas"}, r"attention_backend='pallas' is unknown; allowed are auto, pallas_tpu, "),
        (
            {"attention_backend": "pallas_tpu"},
            r"attention_backend='pallas_tpu' needs a TPU and this machine's platform is 'cpu'; use auto or xla",
        ),
    ],
)
def test_what_cannot_fit_or_run_is_refused_with_the_numbers(tiny_settings, changes, message):
    with pytest.raises(ValueError, match=message):
        InProcessCore(EngineConfig(**(tiny_settings | changes)))


def test_the_reference_attention_gives_the_same_tokens(make_core, alone):
    assert run_requests(make_core(attention_backend="reference"), batch()) == alone


def test_scanned_layers_give_the_same_tokens(make_core, alone):
    assert run_requests(make_core(scan_layers=True), batch()) == alone


def test_the_interpreted_tpu_kernel_gives_the_same_tokens(core, make_core):
    """With its own shape of pages, over scanned layers and traced, as on a TPU."""
    requests = [core_request("a", list(range(1, 20)), 6), core_request("b", [5, 6], 6)]
    small = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 64, "compile_before_ready": False}
    kernel = make_core(attention_backend="pallas_tpu_interpret", scan_layers=True, block_size=16, **small)
    assert run_requests(kernel, requests) == run_requests(core, requests)


async def test_a_core_process_serves_reports_and_ends(tiny_settings, alone):
    (core,) = await start_cores(EngineConfig(**tiny_settings))
    core.send(Add(batch()))
    tokens = {f"r{i}": [] for i in range(8)}
    stats = None
    while stats is None or stats.num_pages_in_use or sum(map(len, tokens.values())) < 160:
        step = await core.receive()
        stats = step.stats or stats
        for output in step.outputs:
            tokens[output.request_id] += output.new_token_ids
    assert tokens == alone
    await core.shutdown()
    assert core.process.returncode == 0


async def test_a_killed_core_process_is_noticed(tiny_settings):
    (core,) = await start_cores(EngineConfig(**tiny_settings))
    core.send(Add([core_request("a", [1], 200)]))
    await core.receive()
    os.kill(core.process.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="ended by signal SIGKILL"):
        await receive_all(core)
    core.send(Abort(["a"]))  # to a dead core: nothing happens
    await core.shutdown()


async def receive_all(core: CoreProcess) -> None:
    while True:
        await core.receive()


async def test_a_core_process_that_cannot_start_says_why(tiny_settings, tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        await start_cores(EngineConfig(model=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"architectures": ["MambaForCausalLM"]}))
    with pytest.raises(ValueError, match=r"'MambaForCausalLM' is not supported; supported are Llama"):
        await start_cores(EngineConfig(model=str(tmp_path)))


def test_host_time_and_counters_add_up(core):
    assert core.reset_prefix_cache()
    before = core.stats()
    run_requests(core, batch())
    after = core.stats()
    assert after.generation_tokens_total - before.generation_tokens_total == 160
    assert after.prompt_tokens_total - before.prompt_tokens_total == sum(map(len, prompts(8)))
    rows = after.token_rows_total - before.token_rows_total
    padding = after.padding_tokens_total - before.padding_tokens_total
    assert rows - padding == sum(map(len, prompts(8))) + 160 - 8  # the last token of each needs no step
    assert after.finished_requests_total["length"] - before.finished_requests_total.get("length", 0) == 8
    assert after.host_time.steps > before.host_time.steps
