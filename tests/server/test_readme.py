"""The examples of the README, run against the real server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://localhost:8000"


def blocks(language: str) -> list[str]:
    """What stands between the fences of a language and speaks to a server."""
    return [block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if ADDRESS in block]


def commands() -> list[str]:
    """Each curl command, with its continuation lines."""
    return [found for block in blocks("sh") for found in re.findall(r"^curl(?:.*\\\n)*.*$", block, re.MULTILINE)]


def run(*arguments: str) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", commands())
def test_a_curl_example_runs(server, command):
    answer = run("bash", "-c", command.replace("curl", "curl -sS --fail-with-body", 1).replace(ADDRESS, server.url))
    if '"stream": true' in command:
        assert answer.endswith("data: [DONE]\n\n")
    else:
        assert "42" in answer or "Once" in command


@pytest.mark.parametrize("program", blocks("python"), ids=lambda program: program.splitlines()[0])
def test_a_python_example_runs(server, program):
    assert "42" in run(sys.executable, "-c", program.replace(ADDRESS, server.url))


def test_there_are_examples():
    assert len(commands()) >= 5
    assert len(blocks("python")) >= 2
