"""Plans for TPUs, by the real compiler: memory by arithmetic is the compiler's, operations are those of hand counts."""

import json
import os
import subprocess
import sys

import pytest

# Heads, layers and widths as real models have them, of which two layers compile as fast as eighty: they are scanned.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}


@pytest.mark.slow
def test_a_plan_for_a_slice_is_what_its_compiler_says(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax-engine[tpu]'")
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    limits = ("--max-num-seqs", "64", "--max-model-len", "2048", "--compilation-cache-dir", "")
    command = [sys.executable, "-m", "jax_engine.server.cli", "plan", str(tmp_path), "--device", "v6e-4", "--json"]
    done = subprocess.run([*command, *limits], capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    for program in plan["compiled"]:
        assert program["predicted_arguments"] == pytest.approx(program["arguments"], rel=0.01)
        predicted = program["predicted_arguments"] + plan["memory"]["temporaries"]
        assert predicted == pytest.approx(program["arguments"] + program["temporaries"], rel=0.05)
    layer = 4096 * 128 * (32 + 8 + 8) + 32 * 128 * 4096 + 3 * 4096 * 14336
    weights = 8 * layer + 4096 * 32000
    decode = plan["steps"]["decode"]
    attention = 8 * 64 * (1024 + 128) * 32 * 128 * 4
    assert decode["flops"] == pytest.approx((2 * 64 * weights + attention) / 4, rel=0.01)
    cache = 8 * 64 * (1024 + 128) * 2 * 8 * 128 * 2
    assert decode["moved_bytes"] == pytest.approx((2 * weights + cache) / 4, rel=0.05)
    assert decode["collectives"]["all-reduce"] >= 2 * 8 + 1
    assert decode["seconds"]["binds"] in ("bandwidth", "interconnect")
