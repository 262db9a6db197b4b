"""What is told to JAX and XLA on GPUs: never against the user, known to XLA, and part of every step program."""

import logging
from pathlib import Path

import jax
import pytest

from jax_engine.compilation.gpu_settings import (
    COMMANDS,
    HIDING,
    MERGED_MB,
    WITH_LOOPS,
    compiler_options,
    is_known,
    loops_work,
)
from jax_engine.compilation.gpu_settings import memory_variables as variables


def test_the_engine_takes_the_memory_at_once_unless_it_shares_the_gpu() -> None:
    assert variables(0.9, {}) == {"XLA_CLIENT_MEM_FRACTION": "0.95", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}
    assert variables(0.4, {})["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


@pytest.mark.parametrize("name", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_a_share_of_the_users_own_stays_alone(name: str) -> None:
    """JAX refuses both names together."""
    assert variables(0.9, {name: "0.5"}) == {}


def test_step_programs_have_loops_in_command_buffers_and_hide_exchanges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options are fields of one message in XLA, whatever it compiles for: a CPU's compiler refuses unknown ones too."""
    monkeypatch.delenv("XLA_FLAGS")
    (device,) = jax.devices()
    assert dict(compiler_options([device], deterministic=False)) == {COMMANDS: WITH_LOOPS}
    quantized = compiler_options([device], deterministic=False, quantized=True)
    assert dict(quantized) == {COMMANDS: WITH_LOOPS, MERGED_MB: "0"}
    several = compiler_options([device, device], deterministic=True)
    assert dict(several) == {COMMANDS: WITH_LOOPS, HIDING: True, "xla_gpu_deterministic_ops": True}


def test_flags_of_the_users_own_are_not_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--{COMMANDS}= --{HIDING}=false")
    assert compiler_options(jax.devices() * 2, deterministic=False) == ()


def test_options_reach_xla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_FLAGS")
    options = dict(compiler_options(jax.devices() * 2, deterministic=False)) | {"xla_dump_to": str(tmp_path)}
    jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "int32")).compile(compiler_options=options)
    (used,) = tmp_path.glob("*.debug_options")
    assert {f"{COMMANDS}: WHILE", f"{COMMANDS}: CONDITIONAL", f"{HIDING}: true"} <= set(used.read_text().splitlines())


def test_what_a_version_does_not_know_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    (device,) = jax.devices()
    assert not is_known(device, "xla_gpu_of_some_other_version", True)
    assert not is_known(device, COMMANDS, "SOME_OTHER_COMMAND")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "xla_gpu_of_some_other_version=True is not set" in caplog.text


def test_a_loop_that_counts_wrong_stays_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (device,) = jax.devices()
    assert loops_work.__wrapped__(device)
    monkeypatch.setattr("jax_engine.compilation.gpu_settings._count", lambda start, trips: start)
    assert not loops_work.__wrapped__(device)
    assert "loops stay out of command buffers" in caplog.text
