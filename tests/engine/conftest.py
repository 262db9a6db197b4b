"""Engine cores over a tiny random model; programs are shared through one compilation cache a test session."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_engine import TINY

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore

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


@contextmanager
def engine_cores(settings: dict[str, object]) -> Iterator[CoreFactory]:
    """Builds engine cores from the tiny settings and changes to them, and ends them. Their smaller programs compile in
    the background, as far as there is time, unless a change says otherwise.
    """
    cores: list[InProcessCore] = []

    def make(**changes: object) -> InProcessCore:
        cores.append(InProcessCore(EngineConfig(**(settings | changes))))
        return cores[-1]

    yield make
    while cores:
        cores.pop().shutdown()
    gc.collect()  # executables take more memory maps than a process may have for those of all tests


@pytest.fixture
def make_core(tiny_settings: dict[str, object]) -> Iterator[CoreFactory]:
    """Build an engine core for one test."""
    with engine_cores(tiny_settings) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_core(tiny_settings: dict[str, object]) -> Iterator[CoreFactory]:
    """Build an engine core for a module's tests."""
    with engine_cores(tiny_settings) as make:
        yield make


@pytest.fixture(scope="session")
def core(tiny_settings: dict[str, object]) -> Iterator[InProcessCore]:
    """One over the tiny settings as they are, with all its programs."""
    with engine_cores(tiny_settings) as make:
        yield make(compile_before_ready=True)
