"""`jax-engine compile`: every program of an engine, compiled without its weights and written as a bundle."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jax_engine.compilation.blueprint import Blueprint
from jax_engine.compilation.bundles import Manifest, write_bundle
from jax_engine.compilation.compiled_steps import CompiledSteps
from jax_engine.compilation.start_log import log_cache, log_step_programs
from jax_engine.config import EngineConfig
from jax_engine.loading.new_folders import check_new_folder
from jax_engine.plan.chips import parse_target
from jax_engine.plan.targets import devices_of, prepare

logger = logging.getLogger(__name__)


PLATFORMS = ("cpu", "gpu", "tpu")


def find_devices(name: str | None) -> tuple[Sequence[jax.Device], int | None]:
    """The devices to compile for, and the memory of each: a platform's, which must be here, those of a TPU slice, which
    need not, such as `v6e-8`, or without a name what JAX runs on here. Call it before JAX has looked for devices.

    Raises:
        ValueError: JAX runs on another platform here; or there is no such slice, or nothing that compiles for it.
    """
    if name is not None and name not in PLATFORMS:
        target = parse_target(name)
        if target.chip.platform != "tpu":
            raise ValueError(
                f"device={name!r} must be here to be compiled for; run this on it, with --device gpu or cpu"
            )
        prepare([target])
        return devices_of(target), target.chip.device_bytes
    devices = jax.devices()
    if name not in (None, devices[0].platform):
        raise ValueError(
            f"device={name!r} is not what JAX runs on here, which is {devices[0].platform!r}; leave it out, or set "
            "JAX_PLATFORMS"
        )
    return devices, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def compile_ahead(
    config: EngineConfig, folder: Path, devices: Sequence[jax.Device], memory_bytes: int | None
) -> Manifest:
    """Compile all that an engine of these settings runs, several programs at once, and write it to a new folder.

    `devices` need not be here; each has `memory_bytes`, or None where that is a setting.

    Raises:
        ValueError: the folder is there, or the settings cannot be served.
        jax.errors.JaxRuntimeError: a program did not compile; nothing is written.
    """
    if config.compiled is not None:
        raise ValueError(f"compiled={config.compiled!r} has no place here: everything is compiled anew; leave it out")
    check_new_folder(folder, "output")
    with _without_cache():
        blueprint = Blueprint.of(config, devices)
        memory = blueprint.plan_memory(memory_bytes)
        log_cache(memory, blueprint.placed.geometry)
        log_step_programs(blueprint.programs, blueprint.step_sizes, blueprint.placed.row_block)
        steps = CompiledSteps(
            blueprint.programs, lambda program: blueprint.lower(program, memory), threads=config.compile_threads
        )
        steps.compile_rest(background=False)
        if steps.num_ready < len(steps.programs):
            raise ValueError(
                f"only {steps.num_ready} of {len(steps.programs)} programs could be compiled in one process, for the "
                "reason above; nothing is written"
            )
        executables = {str(program): compiled for program, compiled in steps.executables.items()}
        for name, lowered in blueprint.lower_helpers(memory).items():
            start = time.monotonic()
            executables[name] = lowered.compile(), time.monotonic() - start
    return write_bundle(folder, blueprint, memory, executables)


@contextmanager
def _without_cache() -> Iterator[None]:
    """Compile everything anew: what came out of the persistent cache is not sure to go into a file again."""
    before = bool(jax.config.values["jax_enable_compilation_cache"])
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it was in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
