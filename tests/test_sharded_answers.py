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
print(json.dumps(report(Path(sys.argv[1]), sys.argv[2:])))
"""


@pytest.fixture(scope="module")
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The answers of the cases that are selected."""
    selected = [
        item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)
    ]
    names = [item.callspec.params["case"].name for item in selected]
    paths = [str(Path(__file__).parent / folder) for folder in ("engine", "support")]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", CHILD, str(tmp_path_factory.mktemp("models")), *names]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.is_slow) for case in CASES]
)
def test_tokens_are_those_of_one_device(answered, case):
    """Prompts in chunks, decodes, both in one step, prefixes that pages hold, adapters, drafts; greedy and seeded."""
    assert answered[case.name] == answered[case.model]
