"""One engine over several processes answers as one process does, and ends as a whole when one of them is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import END_SECONDS, HOST, SIZES, Group, free_port, running_group

from jax_engine.loading.model_files import resolve_model_path

PROMPTS = ["Once upon a time", "What is 17 + 25?", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, launch_server: Any) -> Iterator[Group]:
    with running_group(
        launch_server, tmp_path_factory.mktemp("pair"), 2, "--deterministic", "--enable-admin-routes"
    ) as group:
        yield group


def texts(server: Any, **asked: object) -> list[str]:
    """The answers to all prompts, in the engine together, greedy unless told otherwise."""
    given = {"temperature": 0.0, "max_tokens": 12} | asked
    answers = server.client.completions.create(model="demo", prompt=PROMPTS, **given)  # type: ignore[call-overload]
    return [choice.text for choice in answers.choices]


def test_two_processes_answer_as_one_does(pair: Group, server: Any) -> None:
    """Greedy and seeded, several requests in a step, a second time from the cache of prefixes."""
    for asked in ({}, {"temperature": 0.8, "seed": 7}, {}):
        assert texts(pair.leader, **asked) == texts(server, **asked)


def test_two_processes_sleep_and_wake_up(pair: Group) -> None:
    """Weights come back from host memory, and from the files."""
    before = texts(pair.leader)
    for level in ("1", "2"):
        httpx.post(f"{pair.leader.url}/sleep", params={"level": level}, timeout=60).raise_for_status()
        httpx.post(f"{pair.leader.url}/wake_up", timeout=60).raise_for_status()
        assert texts(pair.leader) == before


def assert_logprobs_and_forms_are_equal(one: Any, other: Any) -> None:
    """Of both servers, in the FULL sampling mode: log-probabilities, and answers held to a pattern."""
    asked: dict[str, Any] = {"model": "demo", "prompt": PROMPTS, "temperature": 0.0, "max_tokens": 8}
    found = [server.client.completions.create(**asked, logprobs=2) for server in (one, other)]
    for ours, theirs in zip(*(answers.choices for answers in found), strict=True):
        assert ours.logprobs.tokens == theirs.logprobs.tokens
        assert ours.logprobs.token_logprobs == pytest.approx(theirs.logprobs.token_logprobs, abs=1e-3)
    form = {"structured_outputs": {"regex": "[0-9]{2}( [a-f]{3}){2}"}}
    answers = [server.client.completions.create(**asked, extra_body=form) for server in (one, other)]
    written = [[choice.text for choice in answer.choices] for answer in answers]
    assert written[0] == written[1]
    assert all(re.match("[0-9]{2}( |$)", text) for text in written[0]), written


def test_two_processes_give_logprobs_and_follow_patterns(pair: Group, server: Any) -> None:
    assert_logprobs_and_forms_are_equal(pair.leader, server)


def bytes_read(log: str) -> int:
    found = re.search(r", (\d+) bytes read\)", log)
    assert found, log
    return int(found[1])


def test_each_process_reads_its_part_of_the_weights(pair: Group) -> None:
    """Half of what is split, which all but the norms are."""
    size = sum(file.stat().st_size for file in resolve_model_path("demo").glob("*.safetensors"))
    for log in (pair.leader.log(), pair.followers[0].log()):
        assert 0.5 * size <= bytes_read(log) < 0.52 * size


def test_a_killed_follower_ends_the_server_with_its_name(pair: Group) -> None:
    """The last test of this group: nothing of it goes on."""
    os.kill(pair.followers[0].process.pid, signal.SIGKILL)
    killed = time.monotonic()
    pair.leader.wait_for(lambda: httpx.get(f"{pair.leader.url}/health").status_code == 503, what="503", seconds=10)
    assert pair.leader.process.wait(END_SECONDS) == 1
    assert time.monotonic() - killed < END_SECONDS
    assert re.search(r"error: the engine has died: process 1 \(node_rank=1, on \S+\) is lost", pair.leader.log())


@pytest.fixture
def four(tmp_path: Path, launch_server: Any) -> Iterator[Group]:
    adapters = ("--enable-lora", "--max-loras", "1", "--lora-modules", "shout=demo:shout")
    offloading = ("--kv-offloading-size", "0.01", "--kv-offloading-load", "always", "--kv-cache-memory-bytes", "400K")
    few_programs = ("--max-num-seqs", "3", "--max-num-batched-tokens", "8", "--max-logprobs", "2")
    with running_group(launch_server, tmp_path, 4, *few_programs, *adapters, *offloading) as group:
        yield group


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four processes that compile, on as few cores as there are
def test_four_processes_do_all_that_one_does_and_end_with_process_0(four: Group, server: Any) -> None:
    """Programs of every size and mode, pages in host memory. Two processes share each key and value head."""
    leader = four.leader
    leader.wait_for(lambda: "step programs compiled" in leader.log(), what="compiled", seconds=900)
    for asked in ({}, {"temperature": 0.8, "seed": 7}, {"presence_penalty": 1.0, "logprobs": 2}, {}):
        assert texts(leader, **asked) == texts(server, **asked)
    assert leader.metric("jax_engine:compiles_in_request_path_total") == 0
    os.kill(leader.core_pid(), signal.SIGKILL)
    assert four.wait_for_the_end() == [1, 1, 1, 1]
    for follower in four.followers:
        assert re.search(r"error: process 0 \(node_rank=0, at \S+\) is lost", follower.log()), follower.log()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_start_from_what_two_have_compiled(tmp_path: Path, launch_server: Any, server: Any) -> None:
    """Each writes a bundle, and either will do for both."""
    port, bundles = str(free_port()), [tmp_path / "bundle 0", tmp_path / "bundle 1"]
    settings = (*SIZES, "--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", HOST, "--deterministic")
    command = [sys.executable, "-m", "jax_engine.server.cli", "compile", *settings, "--master-port", port]
    compiling = [
        subprocess.Popen([*command, "--node-rank", str(rank), "-o", str(bundle)]) for rank, bundle in enumerate(bundles)
    ]
    assert [process.wait(400) for process in compiling] == [0, 0]

    def start_from(bundle: Path) -> None:
        with running_group(launch_server, tmp_path, 2, "--deterministic", "--compiled", str(bundle)) as group:
            assert texts(group.leader) == texts(server)
            assert group.leader.metric("jax_engine:compile_seconds_total") == 0
            assert group.leader.stop() == 0
            assert group.wait_for_the_end() == [0, 0]

    for bundle in bundles:
        start_from(bundle)


@pytest.mark.slow
def test_a_group_ends_in_good_order(tmp_path: Path, launch_server: Any) -> None:
    with running_group(launch_server, tmp_path, 2, "--deterministic") as group:
        assert texts(group.leader)
        assert group.leader.stop() == 0
        assert group.wait_for_the_end() == [0, 0]
        for log in (group.leader.log(), group.followers[0].log()):
            assert "Traceback" not in log


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jax_engine.server.cli", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_who_answers_http_is_process_0_alone() -> None:
    result = serve("--nnodes", "2", "--node-rank", "1", "--master-addr", HOST)
    assert result.returncode == 2
    assert "--node-rank 1 follows process 0 and answers no HTTP; add --headless" in result.stderr
    result = serve("--headless")
    assert result.returncode == 2
    assert "--headless is for the processes that follow" in result.stderr
