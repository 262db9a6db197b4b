"""Plans for GPUs that are not here: what XLA wants to know of them, and whole plans where XLA:GPU is installed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_engine import TINY

from jax_engine.plan.chips import CHIPS, GPU_POOL_SHARE
from jax_engine.plan.gpu_targets import GPUS, compiler_is_installed
from jax_engine.plan.hlo_costs import program_costs

WIDE = TINY | {"num_attention_heads": 8, "head_dim": 64, "hidden_size": 128, "vocab_size": 104, "dtype": "bfloat16"}
LIMITS = ("--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--max-model-len", "64")


def test_a_gpus_description_has_what_its_chip_has():
    assert GPUS.keys() == {name for name, chip in CHIPS.items() if chip.platform == "gpu"}
    for name, gpu in GPUS.items():
        fields = dict(re.findall(r"(\w+): ([\w.\-]+)", gpu.target_config))
        assert int(fields["device_memory_size"]) * GPU_POOL_SHARE == CHIPS[name].memory_bytes
        assert int(fields["memory_bandwidth"]) == CHIPS[name].bytes_per_second
        assert f"cuda_compute_capability {{ major: {gpu.compute_capability[0]} " in gpu.target_config
        # A block may have all of a core's shared memory but the 1 KiB that the system keeps.
        assert int(fields["shared_memory_per_core"]) - int(fields["shared_memory_per_block_optin"]) == 1024
    assert "ACCELERATED_FEATURES" in GPUS["h200"].target_config, "else XLA compiles for sm_90, without its tensor cores"
    assert "ACCELERATED_FEATURES" not in GPUS["a100"].target_config


LIBRARY_CALL = """\
HloModule jit_f

ENTRY %main (x: bf16[64,128], w: bf16[128,32]) -> f32[64,32] {
  %x = bf16[64,128]{1,0} parameter(0)
  %w = bf16[128,32]{1,0} parameter(1)
  %call = (f32[64,32]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  ROOT %out = f32[64,32]{1,0} get-tuple-element(%call), index=0
}
"""


def test_a_product_by_a_gpus_library_counts_as_one_and_its_workspace_moves_nothing():
    costs = program_costs(LIBRARY_CALL)
    assert costs.flops == {"bf16": 2 * 64 * 128 * 32}
    assert costs.num_bytes == 2 * 64 * 128 + 2 * 128 * 32 + 4 * 64 * 32


@pytest.mark.skipif(not compiler_is_installed(), reason="needs XLA:GPU: pip install 'jax-engine[cuda]'")
@pytest.mark.parametrize(("device", "parts"), [("h200-1", 1), ("b200-2", 2)])
def test_a_plan_for_gpus_is_what_their_compiler_says(tmp_path: Path, device: str, parts: int):
    (tmp_path / "config.json").write_text(json.dumps(WIDE))
    command = [sys.executable, "-m", "jax_engine.server.cli", "plan", str(tmp_path), "--device", device, "--json"]
    done = subprocess.run(
        [*command, *LIMITS, "--compilation-cache-dir", ""], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["basis"], plan["dtype"], plan["memory"]["page_tokens"]) == ("XLA:GPU", "bfloat16", 64)
    for program in plan["compiled"]:
        assert program["predicted_arguments"] == pytest.approx(program["arguments"], rel=0.01)
    layer = 128 * 64 * (8 + 2 + 2) + 8 * 64 * 128 + 3 * 128 * 48
    decode = plan["steps"]["decode"]
    attention = 2 * 4 * decode["past_tokens"] * 8 * 64 * 4
    assert decode["flops"] == pytest.approx((2 * 4 * (2 * layer + 128 * 104) + attention) / parts, rel=0.05)
    assert decode["moved_bytes"] > plan["memory"]["weights"] - 104 * 128 * 2
    assert decode["collectives"].get("all-reduce", 0) == (0 if parts == 1 else pytest.approx(2 * 2 + 2, abs=2))
