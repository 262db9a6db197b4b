"""Executables compiled ahead of time: an engine starts from them as it would without, or is told why it cannot."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import msgspec
import pytest
from tiny_engine import TINY, core_request, run_requests

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.bundle_identity import FREE_SETTINGS
from jax_engine.compilation.bundles import FORMAT, MANIFEST, Bundle, BundleError, Manifest, read_manifest, write_bundle
from jax_engine.compilation.compile_ahead import compile_ahead, find_devices
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import TokenControls
from jax_engine.loading.new_folders import UNFINISHED, new_folder

# Steps of one token: three programs, one a sampling mode.
SMALLEST = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 32, "block_size": 8, "scan_layers": True}
Change = Callable[[Manifest], Manifest]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


@pytest.fixture(scope="module")
def config(model: Path) -> EngineConfig:
    return EngineConfig(model=str(model), load_format="dummy", compilation_cache_dir="", **SMALLEST)


@pytest.fixture(scope="module")
def compiled(config: EngineConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "bundle"
    compile_ahead(config, folder, *find_devices("cpu"))
    return folder


@pytest.fixture
def copied(compiled: Path, tmp_path: Path) -> Path:
    """The bundle once more, to be damaged."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for file in compiled.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def open_bundle(folder: Path, config: EngineConfig) -> Bundle:
    return Bundle.open(str(folder), Blueprint.of(config, jax.devices()))


def rewrite(folder: Path, change: Change) -> None:
    """Change what the manifest says, and let it vouch for that."""
    manifest = change(read_manifest(folder))
    manifest = msgspec.structs.replace(manifest, sha256=manifest.digest())
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def claim(folder: Path, **identity: Any) -> None:
    """Let the manifest say that it is for something else; `__` stands for a dot."""
    given = {name.replace("__", "."): value for name, value in identity.items()}
    rewrite(folder, lambda manifest: msgspec.structs.replace(manifest, identity=manifest.identity | given))


@pytest.fixture
def built() -> Iterator[list[str]]:
    """The functions that JAX compiles meanwhile."""
    names: list[str] = []

    def note(event: str, seconds: float, **details: Any) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_an_engine_starts_from_it_without_compiling_and_gives_the_same_tokens(
    config: EngineConfig, compiled: Path, built: list[str]
) -> None:
    requests = [
        core_request("greedy", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 8),
        core_request("drawn", [7, 5, 3], 8, temperature=1.0, prng_key=(3, 4)),
        core_request("full", [7, 5, 3], 8, controls=TokenControls(presence_penalty=1.5)),
    ]
    plain = InProcessCore(config)
    expected, sizes = run_requests(plain, requests), plain.info
    plain.shutdown()
    assert "jit(step)" in built
    built.clear()
    core = InProcessCore(replace(config, compiled=str(compiled)))
    runner = core._core.runner
    pages = runner.devices.state.cache.data.unsafe_buffer_pointer()
    assert run_requests(core, requests) == expected
    assert runner.devices.state.cache.data.unsafe_buffer_pointer() == pages, (
        "the cache is updated in place, as it was compiled"
    )
    assert core.info == sizes
    assert not {"jit(step)", "jit(read_page)", "jit(write_page)", "jit(write_block_tables)"} & set(built)
    assert (core.stats().compile_seconds_total, core.stats().compiles_in_request_path_total) == (0, 0)
    core.shutdown()


def test_the_sizes_are_those_that_it_was_compiled_for(config: EngineConfig, copied: Path) -> None:
    """They are baked in: what the device has left of its memory today does not matter, unless a step does not fit."""
    rewrite(copied, lambda manifest: msgspec.structs.replace(manifest, plan=replace_pages(manifest, 3)))
    bundle = open_bundle(copied, config)
    assert bundle.plan_memory(None).num_pages == bundle.plan_memory(2**40).num_pages == 3
    with pytest.raises(BundleError, match=r"holds steps that need 0\.00 GiB of each device, and there are 0\.00 GiB"):
        bundle.plan_memory(1000)


def replace_pages(manifest: Manifest, num_pages: int) -> Any:
    return msgspec.structs.replace(manifest.plan, num_pages=num_pages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 2, "max_num_batched_tokens": 2}, r"setting\.max_num_seqs is 2 here and 1 there; "),
        ({"max_num_batched_tokens": 4}, r"setting\.max_num_batched_tokens is 4 here and 1 there\. Start with what it"),
        ({"max_model_len": 16}, r"model\.max_model_len is 16 here and 32 there"),
        ({"block_size": 16}, r"setting\.block_size is 16 here and 8 there"),
        ({"dtype": "bfloat16"}, r"setting\.dtype is 'bfloat16' here and 'float32' there"),
        ({"scan_layers": False}, r"setting\.scan_layers is False here and True there"),
        ({"enable_lora": True}, r"setting\.enable_lora is True here"),
        ({"max_logprobs": 5}, r"setting\.max_logprobs is 5 here and 20 there"),
        (
            {"logits_processors": ("token_processors:in_turn",)},
            r"setting\.logits_processors is .*s:in_turn",
        ),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], message: str, config: EngineConfig, compiled: Path
) -> None:
    with pytest.raises(BundleError, match=message):
        open_bundle(compiled, replace(config, **changes))


def test_a_bundle_of_several_processes_is_refused_by_one(config: EngineConfig, copied: Path) -> None:
    claim(copied, num_processes=2)
    with pytest.raises(BundleError, match=r"num_processes is 1 here and 2 there"):
        open_bundle(copied, config)


def test_settings_that_no_program_depends_on_are_free(config: EngineConfig, compiled: Path) -> None:
    free = {"seed": 3, "scheduling_policy": "priority", "enable_prefix_caching": False, "compile_threads": 1}
    assert free.keys() <= FREE_SETTINGS
    open_bundle(compiled, replace(config, **free))
    assert set(EngineConfig.__dataclass_fields__) >= FREE_SETTINGS, "no setting of that name"


def test_another_model_is_refused(config: EngineConfig, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 3, "rope_theta": 500.0}))
    with pytest.raises(BundleError, match=r"model\.num_hidden_layers is 3 here and 2 there; model\.rope\.theta is 500"):
        open_bundle(compiled, replace(config, model=str(tmp_path)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version__jaxlib", "0.1", r"version\.jaxlib is '.*' here and '0\.1' there"),
        ("version__jax", "0.1", r"version\.jax is '.*' here and '0\.1' there"),
        ("engine_source", "0", r"engine_source is '.*' here and '0' there"),
        ("platform", "tpu", r"platform is 'cpu' here and 'tpu' there"),
        ("device_kind", "TPU v6 lite", r"device_kind is 'cpu' here and 'TPU v6 lite' there"),
        ("machine", "aarch64-0", r"machine is '.*' here and 'aarch64-0' there"),
        ("mesh", '{"tensor": 8}', r"mesh is 'one device' here and '\{\"tensor\": 8\}' there"),
        ("num_devices", 8, r"num_devices is 1 here and 8 there"),
        ("topology", "[[0, 0, 0, 0]]", r"topology is None here and '\[\[0, 0, 0, 0\]\]' there"),
        ("arguments", "0", r"arguments is '.*' here and '0' there"),
    ],
)
def test_another_version_machine_or_mesh_is_refused(
    field: str, value: Any, message: str, config: EngineConfig, copied: Path
) -> None:
    claim(copied, **{field: value})
    with pytest.raises(BundleError, match=message) as refused:
        open_bundle(copied, config)
    assert str(refused.value).startswith(f"compiled={str(copied)!r} is for another engine, model or machine: ")


def test_other_flags_of_the_compiler_are_refused_and_idle_ones_are_not(
    config: EngineConfig, compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = os.environ["XLA_FLAGS"].split()
    monkeypatch.setenv("XLA_FLAGS", " ".join([*reversed(given), "--xla_dump_to=/tmp/nowhere"]))
    open_bundle(compiled, config)
    monkeypatch.setenv("XLA_FLAGS", " ".join([*given, "--xla_cpu_enable_fast_math=true"]))
    with pytest.raises(BundleError, match=r"XLA_FLAGS is '.*fast_math=true.*' here and '"):
        open_bundle(compiled, config)


class Trap:
    """Unpickled, it leaves a trace."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def put_trap(folder: Path) -> None:
    first = folder / "000.executable"
    trap = pickle.dumps(Trap(folder.parent / "sprung"))
    first.write_bytes(trap + b"\0" * (first.stat().st_size - len(trap)))


def edit_manifest(folder: Path) -> None:
    file = folder / MANIFEST
    file.write_text(file.read_text().replace('"num_pages": 4', '"num_pages": 5'))


# What is wrong with the folder -> what the error must say.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tampered": (put_trap, r"holds 000\.executable with another SHA-256 than its manifest; copy or compile it again"),
    "truncated": (
        lambda f: (f / "001.executable").write_bytes((f / "001.executable").read_bytes()[:-1]),
        r"has \d+ bytes of 001\.executable, not \d+; copy or compile",
    ),
    "missing": (lambda f: (f / "002.executable").unlink(), r"lacks 002\.executable; copy or compile"),
    "extra": (lambda f: (f / "999.executable").write_bytes(b""), r"holds '999\.executable', which its manifest does"),
    "extra folder": (lambda f: (f / "more").mkdir(), r"holds 'more', which its manifest does not name; remove it"),
    "manifest edited": (edit_manifest, r"has a manifest\.json that was changed after it was written"),
    "manifest not JSON": (lambda f: (f / MANIFEST).write_text("{"), r"has a damaged manifest\.json \("),
    "manifest of another shape": (lambda f: (f / MANIFEST).write_text("{}"), r"has a damaged manifest\.json \(Object"),
    "no manifest": (
        lambda f: (f / MANIFEST).unlink(),
        r"has no manifest\.json \(No such file.*interrupted run has",
    ),
    "another format": (
        lambda f: rewrite(f, lambda manifest: msgspec.structs.replace(manifest, format=FORMAT + 1)),
        rf"is of format {FORMAT + 1}, and this engine reads format {FORMAT}; compile it again",
    ),
    "another program": (
        lambda f: rewrite(
            f,
            lambda manifest: msgspec.structs.replace(
                manifest, executables={f"{name}?": entry for name, entry in manifest.executables.items()}
            ),
        ),
        r"lacks the programs .* and has .* that nothing runs; compile it again",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_damaged_bundle_is_refused_before_anything_in_it_is_opened(
    fault: str, config: EngineConfig, copied: Path
) -> None:
    breakage, message = BROKEN[fault]
    breakage(copied)
    with pytest.raises(BundleError, match=message) as refused:
        open_bundle(copied, config)
    assert str(copied) in str(refused.value)
    assert not (copied.parent / "sprung").exists()


def test_a_file_that_changes_after_the_check_is_not_unpickled(config: EngineConfig, copied: Path) -> None:
    bundle = open_bundle(copied, config)
    name = next(name for name, entry in bundle.manifest.executables.items() if entry.file == "000.executable")
    put_trap(copied)
    with pytest.raises(BundleError, match=r"holds 000\.executable with another SHA-256"):
        bundle.load(name)
    assert not (copied.parent / "sprung").exists()


def test_the_trap_is_one(tmp_path: Path) -> None:
    """Were it not, the tests above would pass on anything."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_a_bundle_that_cannot_be_written_leaves_nothing(config: EngineConfig, tmp_path: Path) -> None:
    blueprint = Blueprint.of(config, jax.devices())
    good = jax.jit(lambda x: x).lower(1.0).compile()
    with pytest.raises(AttributeError):
        write_bundle(tmp_path / "bundle", blueprint, blueprint.plan_memory(None), {"a": (good, 1.0), "b": (None, 1.0)})
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_is_named(
    config: EngineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writing = new_folder(tmp_path / "bundle")
    left = writing.__enter__()  # and the process is killed
    assert left.parent == tmp_path
    assert UNFINISHED in left.name
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        open_bundle(left, config)
    (tmp_path / "bundle" / "something").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"output='.*bundle' is there already, and not empty; give another"):
        compile_ahead(config, tmp_path / "bundle", jax.devices(), memory_bytes=None)
    (tmp_path / "bundle" / "something").rmdir()
    with pytest.raises(ValueError, match=r"compiled='x' has no place here"):
        compile_ahead(replace(config, compiled="x"), tmp_path / "bundle", jax.devices(), memory_bytes=None)
    with pytest.raises(ValueError, match=r"max_model_len"):
        compile_ahead(replace(config, max_model_len=2**20), tmp_path / "bundle", jax.devices(), memory_bytes=None)
    assert f"{left} is what an interrupted run has left; remove it" in caplog.text


def test_what_is_not_here_is_not_taken_for_what_is() -> None:
    with pytest.raises(ValueError, match=r"device='tpu' is not what JAX runs on here, which is 'cpu'; leave it out"):
        find_devices("tpu")
    with pytest.raises(ValueError, match=r"device='h200-1' must be here to be compiled for; run this on it"):
        find_devices("h200-1")
    with pytest.raises(ValueError, match=r"device='v6e-3' is no size of a v6e slice; sizes are v6e-1, v6e-4"):
        find_devices("v6e-3")
    with pytest.raises(ValueError, match=r"compiled='' must be a folder that `jax-engine compile` has made"):
        EngineConfig(compiled="")
