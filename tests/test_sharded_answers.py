"""A model spread over devices gives the tokens that it gives on one: every strategy, and every kind of step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sharded_engines import CASES

pytestmark = pytest.mark.timeout(1200)  # a dozen engines on eight devices, in one child
CHILD = """
import json, sys
from pathlib import Path
from sharded_engines import report
print(json.dumps(report(Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    paths = [str(Path(__file__).parent / folder) for folder in ("engine", "support")]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", CHILD, str(tmp_path_factory.mktemp("models"))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_are_those_of_one_device(answered, case):
    """Prompts in chunks, decodes, both in one step, prefixes that pages hold, adapters, drafts; greedy and seeded."""
    assert answered[case.name] == answered[case.model]
