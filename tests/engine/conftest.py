"""Engine cores over a tiny random model; programs are shared through one compilation cache a test session."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_engine import TINY

from jax_engine.config import EngineConfig
from jax_engine.core_client import InProcessCore

CoreFactory = Callable[..., InProcessCore]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_model")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings of a small engine over random weights: 4 slots, steps of at most 32 tokens."""
    return {
        "model": str(tiny_model),
        "load_format": "dummy",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "block_size": 8,
        "compilation_cache_dir": str(tmp_path_factory.mktemp("compilation_cache")),
    }


@pytest.fixture(scope="module")
def make_core(tiny_settings: dict[str, object]) -> Iterator[CoreFactory]:
    """Build an engine core from the tiny settings and changes to them; it ends with the module, as executables take
    more memory maps than one process may have for those of all modules.
    """
    cores: list[InProcessCore] = []

    def make(**changes: object) -> InProcessCore:
        cores.append(InProcessCore(EngineConfig(**(tiny_settings | {"compile_before_ready": True} | changes))))
        return cores[-1]

    yield make
    for core in cores:
        core.shutdown()


@pytest.fixture(scope="session")
def core(tiny_settings: dict[str, object]) -> Iterator[InProcessCore]:
    """One over the tiny settings as they are."""
    core = InProcessCore(EngineConfig(**(tiny_settings | {"compile_before_ready": True})))
    yield core
    core.shutdown()
