"""The GPU benchmark without a GPU: its jobs end well whatever happens in them, its arithmetic, and a dry run."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu import beside_ours, passed_together, row
from gpu_ahead import Ahead
from gpu_jobs import Job, Record, Runner, tools
from gpu_models import Costs, model_config, workloads
from gpu_timing import Ceilings

REPOSITORY = Path(__file__).parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
FOLDERS = [str(BENCHMARKS), str(Path(__file__).parent / "support")]
CHILD = (
    sys.executable,
    "-c",
    f"import sys; sys.path[:0] = {FOLDERS}; import gpu_jobs; gpu_jobs.run_child(sys.argv[1:])",
)


def sample_job(name: str, **given: Any) -> Job:
    return Job(name, "checks", f"gpu_job_samples:{name}", {}, **({"seconds": 60.0} | given))


def test_a_case_that_ends_its_process_fails_alone(tmp_path: Path) -> None:
    runner = Runner(tmp_path, CHILD, budget_seconds=60)
    job = sample_job("every_end", case_seconds=3)
    found = {record.case: record for record in runner.run(job, least_seconds=0)}
    statuses = {name: record.status for name, record in found.items()}
    assert statuses == {
        "good": "measured",
        "crashes": "failed",
        "raises": "failed",
        "skips": "skipped",
        "hangs": "failed",
        "last": "measured",
    }
    assert found["crashes"].note.startswith("the process ended with signal 9")
    assert found["raises"].note == "ValueError: it cannot be"
    assert found["skips"].note == "it is not for here"
    assert found["hangs"].note == "it took longer than 3 s"
    assert b"for many reasons" in runner.logs()


def test_what_a_job_had_when_its_time_was_over_is_kept(tmp_path: Path) -> None:
    runner = Runner(tmp_path, CHILD, budget_seconds=60)
    seen: list[list[str]] = []
    runner.on_progress = lambda: seen.append([record.case for record in runner.records])
    good, hangs = runner.run(sample_job("good_then_hangs", seconds=6.0), least_seconds=0)
    assert (good.case, good.value) == ("good", 1)
    assert (hangs.case, hangs.status, hangs.note) == ("hangs", "skipped", "no time was left for it")
    assert seen[-1] == ["good"], "while the other one hung"


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_program_that_does_not_compile_costs_itself_alone(one_by_one: bool) -> None:
    def fail() -> int:
        raise ValueError("it cannot be")

    with Ahead({"good": lambda: 1, "bad": fail, "last": lambda: 3}, one_by_one=one_by_one) as ahead:
        assert ahead.wait() == (0 if one_by_one else 3)
        assert (ahead.take("good"), ahead.take("last")) == (1, 3)
        with pytest.raises(ValueError, match="it cannot be"):
            ahead.take("bad")


def test_the_assembler_is_found_on_the_path_where_jax_does_not_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cuda" / "bin" / "ptxas"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    assert tools([tmp_path / "nowhere"]) == {"CUDA_ROOT": str(tmp_path / "cuda")}
    assert tools([tmp_path / "cuda"]) == {}
    monkeypatch.setenv("CUDA_ROOT", "/given")
    assert tools([tmp_path / "nowhere"]) == {}


def test_a_job_that_ends_before_it_begins_has_failed_unless_it_is_a_peers(tmp_path: Path) -> None:
    runner = Runner(tmp_path, CHILD, budget_seconds=60)
    ours, theirs = (sample_job("ends_early", resumes=False, may_fail=may_fail) for may_fail in (False, True))
    (failed,), (skipped,) = (runner.run(job, least_seconds=0) for job in (ours, theirs))
    assert (failed.status, skipped.status) == ("failed", "skipped")
    assert failed.note == "the process ended with status 1: no such device"


def test_what_does_not_fit_in_the_budget_is_named_and_not_begun(tmp_path: Path) -> None:
    runner = Runner(tmp_path, CHILD, budget_seconds=20)
    (record,) = runner.run(sample_job("every_end"), least_seconds=30)
    assert (record.case, record.status) == ("every_end", "skipped")
    assert record.note.endswith("s of the budget were left, of 30 at least")


def test_checks_that_passed_share_a_row_and_others_have_their_own() -> None:
    records = [
        Record("checks", "xla, decode", "passed", 0.001),
        Record("checks", "xla, mixed", "passed", 0.002),
        Record("checks", "xla, prefill", "failed", 0.5, note="wrong results"),
    ]
    failed, passed = passed_together(records)
    assert (failed.case, row(failed)[-1]) == ("xla, prefill", "FAIL: wrong results")
    assert (passed.case, passed.value, passed.note) == ("xla: 2 checks", 0.002, "the worst is mixed")


def test_peers_stand_beside_the_best_engine_with_the_same_requests() -> None:
    engines = [
        Record("engine", f"m, {name}, decode, 4 at once", value=v, unit="tokens/s")
        for name, v in (("a", 6.0), ("b", 9.0))
    ]
    start = Record("peers", "m, vllm, start", value=3.0, unit="s")
    decode, other = (
        Record("peers", f"m, vllm, {load}", value=3.0, unit="tokens/s") for load in ("decode, 4 at once", "mixed")
    )
    found = beside_ours([start, decode, other], [*engines, start, decode])
    assert [record.note for record in found] == ["", "ours: 3.00 times that", ""]


@pytest.mark.parametrize(
    ("model", "parameters", "looked_up", "norms"),
    [
        ("llama-3-8b", 8_030_261_248, 128256 * 4096, 65 * 4096),
        ("llama-3.2-1b", 1_235_814_400, 0, 33 * 2048),  # the head is the embedding
        ("qwen3-0.6b", 596_049_920, 0, 57 * 1024 + 28 * 2 * 128),
    ],
)
def test_a_step_reads_all_weights_but_what_is_looked_up(
    model: str, parameters: int, looked_up: int, norms: int
) -> None:
    costs = Costs.of(model_config(model, tiny=False), itemsize=2)
    assert costs.weight_bytes == 2 * (parameters - looked_up - norms)
    assert costs.token_flops == costs.weight_bytes


def test_a_workloads_costs_are_those_of_its_steps() -> None:
    costs = Costs(weight_bytes=1000.0, token_flops=10.0, kv_token_bytes=4.0, pair_flops=1.0)
    (alone, *_) = workloads(model_config("qwen3-0.6b", tiny=True), seed=0, tiny=True)
    (item,) = alone.items
    prompt, output = len(item.prompt_token_ids), item.output_tokens
    steps = [costs.decode(1, prompt + number) for number in range(output)]
    num_bytes, flops = costs.workload(alone.items, num_steps=output)
    assert num_bytes == sum(one for one, _ in steps) + 2 * prompt * costs.kv_token_bytes
    assert flops == sum(one for _, one in steps) + prompt * costs.token_flops + prompt**2 / 2 * costs.pair_flops


def test_shares_are_of_what_was_measured_and_of_nothing_else() -> None:
    assert Ceilings(100.0, 1000.0).shares(2.0, num_bytes=50.0, flops=500.0) == {"bandwidth": 0.25, "flops": 0.25}
    assert Ceilings(100.0, None).shares(2.0, num_bytes=50.0, flops=500.0) == {"bandwidth": 0.25}


def test_a_checkout_is_used_as_it_lies_without_any_package() -> None:
    """The interpreter sees no installed package: nothing of ours, no msgspec, no sockets between processes."""
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import checkout
assert not checkout.is_installed()
assert checkout.absent_packages() == ["msgspec", "zmq", "zmq.asyncio", "xxhash"]
import msgspec
from jax_engine.core.messages import NO_CONTROLS, CoreOutput, TokenControls
from jax_engine.outputs import RequestOutput
from jax_engine.server.bench.figures import format_cell
from jax_engine.core.stats import EngineStats
one, other = TokenControls(), TokenControls(num_logprobs=3)
one.logit_bias[5] = 1.0
assert other.logit_bias == {{}} and NO_CONTROLS == TokenControls()
assert msgspec.structs.replace(other, num_logprobs=4).num_logprobs == 4
assert msgspec.structs.asdict(CoreOutput("a", [1]))["new_token_ids"] == [1]
assert "steps_total" in EngineStats.__struct_fields__
try:
    msgspec.msgpack.Encoder()
except RuntimeError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "this needs one of msgspec, zmq, zmq.asyncio, xxhash, which is not installed here\n"


def dry_run(folder: Path, *arguments: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """What the command prints, and its records by their cases."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--output", str(folder), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr + (folder / "gpu.log").read_text()
    records = json.loads((folder / "gpu.json").read_text())["records"]
    return result.stdout, {record["case"]: record for record in records}


def statuses(records: dict[str, dict[str, Any]], section: str) -> set[str]:
    return {record["status"] for record in records.values() if record["section"] == section}


def assert_engine_was_measured(records: dict[str, dict[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        record = records[name]
        assert record["unit"] == "tokens/s"
        assert record["value"] > 0
        assert record["flops"] > 0
        assert record["figures"]["host_us_a_step"] > 0
        assert record["figures"]["compiles_in_request_path"] == 0


def test_dry_run_of_a_kernel_and_an_engine(tmp_path: Path) -> None:
    selected = ("--sections", "checks", "kernels", "engine", "--models", "qwen3-0.6b", "--jobs", "attention", "engine")
    printed, records = dry_run(tmp_path, *selected, "--backends", "xla", "--seed", "5")
    assert records["device"]["note"].startswith("a dry run in toy sizes")
    assert records["copy"]["value"] > 0
    assert statuses(records, "checks") == {"passed"}
    assert statuses(records, "kernels") == statuses(records, "engine") == {"measured"}
    assert_engine_was_measured(
        records, ["qwen3-0.6b, xla, decode, 4 at once", "qwen3-0.6b, xla, mixed load, 8 requests"]
    )
    assert "seed 5" in printed


@pytest.mark.slow
def test_dry_run_of_everything(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    printed, records = dry_run(tmp_path, "--models", "qwen3-0.6b", "llama-3-8b", "--budget-seconds", "900")
    assert statuses(records, "checks") == {"passed"}
    assert statuses(records, "kernels") == statuses(records, "engine") == {"measured"}
    decodes = [name for name in records if "xla, decode, 4 at once" in name]
    assert len(decodes) == 2
    assert_engine_was_measured(records, decodes)
    cold, warm = (records[f"qwen3-0.6b, xla, {kind} start"]["value"] for kind in ("cold", "warm"))
    assert 0 < warm < cold
    assert records["llama-3-8b, transformers generate, decode, 4 at once"]["value"] > 0
    assert records["llama-3-8b, vllm, start"]["note"] == "a dry run leaves vLLM out"
    assert "sampling: " in printed
