"""The engine under pressure: wrong answers, lost requests and pages left behind are found; there are none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from soak import Answer, Memory, Spec, Visit, complaint, leftovers, miscounts

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"
SPEC = Spec("prompt", max_tokens=4, temperature=0, seed=0, stop=(), ignore_eos=False, n=1)


@pytest.mark.parametrize(
    ("answer", "leaves_after", "is_right"),
    [
        (Answer("a cat", "stop"), None, True),
        (Answer("a dog", "stop"), None, False),
        (Answer("a cat", "length"), None, False),
        (Answer("a ca", None), None, False),  # never ended
        (Answer("a ca", None), 2, True),
        (Answer("a co", None), 2, False),
        (Answer("a cat", "stop"), 9, True),  # it ended before the client would have left
        (Answer("a ca", "abort"), 9, False),
    ],
)
def test_only_a_known_answer_or_its_beginning_for_a_client_that_left_is_right(answer, leaves_after, is_right):
    found = complaint(SPEC, Visit(0, True, leaves_after), [answer], [Answer("a cat", "stop")])
    assert (found is None) == is_right


def test_counts_at_the_end_are_held_to_what_was_asked():
    idle = dict.fromkeys(("vllm:num_requests_running", "vllm:num_requests_waiting", "jax_engine:kv_pages_in_use"), 0.0)
    idle["jax_engine:compiles_in_request_path_total"] = 0.0
    assert leftovers(idle) == []
    assert leftovers({**idle, "jax_engine:kv_pages_in_use": 3.0}) == ["jax_engine:kv_pages_in_use is 3 at the end"]
    visits = [Visit(0, True, None), Visit(0, True, 5), Visit(0, True, 0)]
    counts = [miscounts({"vllm:request_success_total": ended}, [SPEC], visits) == [] for ended in (1.0, 2.0, 3.0, 4.0)]
    assert counts == [False, True, True, False]  # one client may have hung up before it was heard
    assert Memory([{"core 1": 500.0}, {"core 1": 520.0}]).complaints() == []
    assert Memory([{"core 1": 500.0}, {"core 1": 560.0}]).complaints() == ["core 1 grew from 500 to 560 MiB"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # two engines compile, on a busy machine for minutes
def test_requests_under_pressure_from_clients_that_leave_end_once_and_right(tmp_path):
    """Some hundreds of requests; ten thousand are `python benchmarks/soak.py`."""
    report = tmp_path / "report.json"
    command = [sys.executable, str(SOAK), "--num-requests", "400", "--num-different", "60", "--deterministic"]
    command += ["--json", str(report), "--", "--max-num-seqs", "16", "--max-num-batched-tokens", "64"]
    command += ["--kv-cache-memory-bytes", "2M"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(report.read_text())
    assert figures["preemptions"] > 0, "there was pressure"
    assert figures["clients that left"] > 30
    assert figures["prefix cache hits, % of tokens"] > 0
