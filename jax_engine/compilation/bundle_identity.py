"""What an executable is for: everything that must be equal where it is compiled and where it is run."""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jax

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.compilation_cache import machine_name
from jax_engine.config import EngineConfig, compiler_flags
from jax_engine.sampling.logits_processors import LogitsProcessor

Value = str | int | float | bool | None
Identity = Mapping[str, Value]

# Settings that no program depends on; every other one must be equal.
FREE_SETTINGS = frozenset(
    "model tokenizer revision load_format seed generation_config override_generation_config trust_remote_code "
    "enable_chunked_prefill long_prefill_token_threshold scheduling_policy max_num_queued_reqs pooler_config "
    "sharding_strategy sharding_rules enable_expert_parallel mesh_shape "  # what comes of them is compared
    "enable_prefix_caching prefix_caching_hash_algo kv_offloading_load max_cpu_loras lora_modules "
    "calculate_kv_scales compilation_cache_dir compile_before_ready compile_threads profile_dir compiled "
    "nnodes node_rank master_addr master_port distributed_timeout_seconds".split()
)
JAX_SETTINGS = (
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable"),
    *("jax_numpy_dtype_promotion", "jax_use_shardy_partitioner"),
)
PLUGINS: Mapping[str, Sequence[str]] = {
    "cpu": ("numba",),
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda13-pjrt", "jax-cuda13-plugin", "jax-cuda12-pjrt", "jax-cuda12-plugin"),
}
# Packages whose source makes the step programs, and what feeds them.
SOURCES = (
    *(f"jax_engine.{name}" for name in ("adapters", "compilation", "execution", "kv_cache", "loading", "sampling")),
    *(f"jax_engine.{name}" for name in ("scheduling", "sharding", "speculation")),
    *(f"jax_engine.{name}" for name in ("models", "pallas_kernels", "cuda_fallback")),
)


def identity_of(blueprint: Blueprint) -> Identity:
    """By names such as `model.hidden_size` and `setting.max_num_seqs`, all values that JSON has."""
    platform = blueprint.device.platform
    found: dict[str, Any] = {
        **{f"version.{package}": _version(package) for package in ("jax-engine", "jax", "jaxlib")},
        **{f"version.{package}": _version(package) for package in PLUGINS.get(platform, ())},
        "engine_source": source_digest(),
        **_devices(blueprint),
        **{f"model.{name}": value for name, value in _flat(dataclasses.asdict(blueprint.model)).items()},
        **{f"setting.{name}": value for name, value in _settings(blueprint).items()},
        "arguments": _arguments_digest(blueprint),
        **{f"jax.{name}": _plain(jax.config.values.get(name)) for name in JAX_SETTINGS},
        **compiler_flags(),
    }
    if blueprint.draft is not None:
        model = dataclasses.asdict(blueprint.draft.model)
        found |= {f"draft_model.{name}": value for name, value in _flat(model).items()}
    return {name: _plain(value) for name, value in found.items()}


def differences(here: Identity, there: Identity) -> list[str]:
    """Each field that differs, with both values, in words."""
    return [
        f"{name} is {here.get(name)!r} here and {there.get(name)!r} there"
        for name in dict.fromkeys((*here, *there))
        if here.get(name) != there.get(name)
    ]


def source_digest() -> str:
    """A digest of the engine's own source, as far as programs depend on it."""
    digest = hashlib.sha256()
    for package in SOURCES:
        spec = util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        folder = Path(spec.submodule_search_locations[0])
        for file in sorted([*folder.rglob("*.py"), *folder.glob("tpu/*.json")]):
            digest.update(f"{package}/{file.relative_to(folder)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices(blueprint: Blueprint) -> dict[str, Any]:
    """What the programs run on. One device is the same with a mesh and without."""
    device, mesh = blueprint.device, blueprint.placed.placement.mesh
    devices = [device] if mesh is None else list(mesh.devices.flat)
    found: dict[str, Any] = {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": len(devices),
        "num_processes": len({one.process_index for one in devices}),
        "mesh": "one device",
    }
    if mesh is not None and len(devices) > 1:
        placement = blueprint.placed.placement
        found |= {"mesh": dict(mesh.shape), "sharding.name": placement.strategy}
        found |= {"sharding.weights": placement.weights.table, "sharding.steps": placement.activations.table}
    if device.platform == "cpu":
        return found | {"machine": machine_name()}
    if device.platform == "tpu":
        return found | {"topology": [[*one.coords, one.core_on_chip] for one in devices]}
    return found


def _settings(blueprint: Blueprint) -> dict[str, Any]:
    """The settings that programs depend on, as they are in effect."""
    config, placed = blueprint.config, blueprint.placed
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in FREE_SETTINGS]
    return {name: getattr(config, name) for name in names} | {
        "max_model_len": blueprint.model.max_model_len,
        "max_num_batched_tokens": config.token_budget,
        "dtype": str(placed.dtype),
        "kv_cache_dtype": str(placed.geometry.dtype),
        "block_size": placed.geometry.page_size,
        "scan_layers": any(parameter.part_names for parameter in placed.structure.parameters),
        "speculative_config": config.speculative_config and _without_name(config.speculative_config),
        # Of pages in host memory, only whether there are any: room for those on their way is set aside.
        "kv_offloading_size": config.host_cache_bytes > 0,
        "swap_space": config.host_cache_bytes > 0,
        "logits_processors": [*config.logits_processors, *map(_digest_of_processor, placed.processors)],
    }


def _without_name(speculative_config: dict[str, Any]) -> dict[str, Any]:
    """A draft model is known by what it is, not by where it lies."""
    return {name: value for name, value in speculative_config.items() if name != "model"}


def _digest_of_processor(processor: LogitsProcessor) -> str:
    file = importlib.import_module(processor.path.partition(":")[0]).__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _arguments_digest(blueprint: Blueprint) -> str:
    """A digest of every parameter's shape, and of how it is divided between devices."""
    mesh = blueprint.placed.placement.mesh
    is_divided = mesh is not None and mesh.size > 1
    shapes = blueprint.placed.leaf_shapes()
    listed = [
        (parameter.name, shape.shape, str(shape.dtype), str(shape.sharding.spec) if is_divided else "")
        for parameter, shape in zip(blueprint.placed.structure.parameters, shapes, strict=True)
    ]
    return hashlib.sha256(repr(listed).encode()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots between names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _plain(value: Any) -> Value:
    """A value as a manifest has it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.dumps(value, sort_keys=True, default=str)
