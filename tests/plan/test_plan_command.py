"""`jax-engine plan` from the command line, in a process of its own: it sets up JAX for devices that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_engine import TINY

from jax_engine.loading.model_files import ModelLoadError, read_model_config
from jax_engine.models.config import ModelConfig
from jax_engine.plan.models import built_in_models, model_folder
from jax_engine.server.cli.root import main

LIMITS = (
    "--max-num-seqs",
    "4",
    "--max-num-batched-tokens",
    "16",
    "--max-model-len",
    "64",
    "--compilation-cache-dir",
    "",
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jax_engine.server.cli", "plan", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_attention_heads": 8, "vocab_size": 104}))
    return str(tmp_path)


def test_strategies_are_compared_over_several_devices(model: str, tmp_path: Path):
    """On four GPUs: two sums over devices a layer and one of the embedding; devices that own sequences have room for
    as many each; a strategy of one's own that is impossible is a row with its reason.
    """
    rules = tmp_path / "mine.toml"
    rules.write_text('mesh = ["tensor"]\n[weights]\nhead_dim = ["tensor"]\nkv_heads = ["data"]\n[activations]\n')
    plot = tmp_path / "plot.html"
    arguments = ["--strategy", "tensor,data_attention", "--compare", "--sharding-rules", str(rules)]
    arguments += ["--plot", str(plot), "--json"]
    done = run(model, "--devices", "h200-4", *arguments, *LIMITS)
    assert done.returncode == 0, done.stderr
    tensor, owning, mine = json.loads(done.stdout)
    decode = tensor["steps"]["decode"]
    assert tensor["fits"] and tensor["mesh"] == "tensor=4"
    assert decode["collectives"]["all-reduce"] >= 2 * 2 + 1
    assert decode["seconds"]["communication"] > 0
    assert owning["mesh"] == "data=4" and owning["memory"]["page_tokens"] == 64
    assert owning["sequences_by_context"] == {"64": 4 * owning["memory"]["num_pages"]}, "each device has its own"
    assert mine["strategy"] == str(rules) and mine["reason"]
    assert "<svg" in plot.read_text() and "tensor=4" in plot.read_text()


def test_llama_on_one_small_chip_is_refused_with_the_reason():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax-engine[tpu]'")
    done = run("llama-3-8b", "--device", "v5e-1", "--max-model-len", "8192", "--max-num-seqs", "64")
    assert done.returncode == 1, done.stderr
    assert "does not fit: needs 16.04 GiB of each device and there are 14.17 GiB" in done.stdout
    assert "14.96 GiB of weights" in done.stdout
    assert "64 sequences of 8192 tokens need 64.00 GiB of KV cache" in done.stdout
    assert "use more devices: about v5e-8" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give the devices to plan for: --device v6e-8"),
        (("--device", "v6e-8", "--devices", "v5e-4"), "give the devices to plan for"),
        (("--device", "v6e-3"), "--device 'v6e-3' is no size of a v6e slice"),
        (("--device", "h200-1", "--plot", "plot.gif"), "must end in .html, .svg or .png"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "llama-3-8b", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_built_in_configurations_are_read():
    assert {"llama-3-8b", "llama-3-70b", "qwen3-235b-a22b"} <= set(built_in_models())
    with model_folder("Llama-3-70B") as folder:
        config = ModelConfig.from_hf(read_model_config(folder))
    assert (config.num_hidden_layers, config.hidden_size) == (80, 8192)
    with pytest.raises(ModelLoadError, match="built-in configurations, which are llama-3-70b"), model_folder("llama-9"):
        pass
