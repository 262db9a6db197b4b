"""The persistent compilation cache: found again, never half written, and apart for machines that differ."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_engine.compilation.compilation_cache import machine_name

SCRIPT = """
import logging, sys, warnings
logging.basicConfig()
from jax_engine.compilation.compilation_cache import use_compilation_cache
import jax
warnings.simplefilter("error")
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
use_compilation_cache(sys.argv[1])
jax.jit(lambda x: x * 3 + 1).lower(jax.ShapeDtypeStruct((5,), "float32")).compile()
print(sum(hits))
"""


def hits(folder: Path, **variables: str) -> int:
    """Compile a small program in a process of its own; how many executables it found in the cache."""
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | variables)
    assert result.returncode == 0, result.stderr
    if result.stderr:
        logging.getLogger().warning(result.stderr)
    return int(result.stdout)


def test_the_next_process_finds_the_executable_and_an_unfinished_one_is_replaced(tmp_path: Path) -> None:
    assert hits(tmp_path) == 0
    assert hits(tmp_path) == 1
    entries = sorted(tmp_path.glob(f"{machine_name()}/*-cache"))
    assert entries
    for entry in entries:  # a process killed while it wrote leaves half a file, and no time of access
        whole = entry.read_bytes()
        entry.write_bytes(whole[: len(whole) // 2])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert hits(tmp_path) == 0
    assert sorted(tmp_path.glob(f"{machine_name()}/*-cache")) == entries
    assert hits(tmp_path) == 1


def test_a_folder_that_cannot_be_used_costs_the_cache_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("")
    assert hits(not_a_folder) == 0
    assert f"compilation_cache_dir={str(not_a_folder)!r} is not used" in caplog.text


def test_what_autotuning_finds_is_kept_beside_the_executables(tmp_path: Path) -> None:
    """JAX's own doing, on GPUs: its folder for that follows the cache's."""
    hits(tmp_path / "cache", XLA_FLAGS=f"--xla_dump_to={tmp_path}")
    (used,) = tmp_path.glob("*.debug_options")
    folder = tmp_path / "cache" / machine_name() / "xla_gpu_per_fusion_autotune_cache_dir"
    assert f'xla_gpu_per_fusion_autotune_cache_dir: "{folder}"' in used.read_text()
