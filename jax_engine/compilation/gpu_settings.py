"""What JAX and XLA are told on NVIDIA GPUs: the one place that chooses it. README.md says why, setting by setting.

What the user has set is never overridden. Memory is a matter of environment variables, which JAX reads when it first
looks for devices. What concerns programs goes with each of them as compile options: a flag of `XLA_FLAGS` that some
version does not know would end the process, while such an option is an error that can be caught.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

from jax_engine.config import EngineConfig, compiler_flags, process_environment, set_default_environment
from jax_engine.plan.chips import GPU_POOL_SHARE
from jax_engine.plan.gpu_targets import compiler_is_installed

logger = logging.getLogger(__name__)

CompilerOptions = tuple[tuple[str, bool | str], ...]

SHARED_BELOW = 0.9  # of `gpu_memory_utilization`: its default, under which another program is expected on the GPU
POOL_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX allows one of them

COMMANDS = "xla_gpu_enable_command_buffer"
# What XLA puts into command buffers (CUDA graphs) by itself, and loops and branches.
WITH_LOOPS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
HIDING = "xla_gpu_enable_latency_hiding_scheduler"
# Up to how many MB products of the same rows become one. Of queries, keys and values, whose weights are of 8 bits, XLA
# would write the weights anew in every step, in the order in which its products of 8 bits want them.
MERGED_MB = "xla_gpu_dot_merger_threshold_mb"


def prepare_gpus(config: EngineConfig) -> None:
    """Set up JAX's memory of GPUs, where the packages for them are installed; call it before JAX looks for devices."""
    if compiler_is_installed():
        set_default_environment(memory_variables(config.gpu_memory_utilization, process_environment()))


def memory_variables(utilization: float, given: Mapping[str, str]) -> dict[str, str]:
    """How much of a GPU's memory JAX may take, and whether it takes that at once, beside the variables `given`.

    The engine plans for `utilization` of the pool; the rest is room for arrays to come and go in. Who plans with less
    than the default shares the GPU with another program: then nothing is taken before it is used.
    """
    if any(given.get(name) for name in POOL_SHARE_VARIABLES):
        return {}
    whole = "true" if utilization >= SHARED_BELOW else "false"
    return {POOL_SHARE_VARIABLES[0]: str(GPU_POOL_SHARE), "XLA_PYTHON_CLIENT_PREALLOCATE": whole}


def compiler_options(devices: Sequence[jax.Device], *, deterministic: bool, quantized: bool = False) -> CompilerOptions:
    """What the step programs for these GPUs are compiled with; the devices need not be here."""
    given = {flag.removeprefix("--").partition("=")[0] for flag in compiler_flags()["XLA_FLAGS"].split()}
    here = [device for device in devices if device in set(jax.local_devices())]
    chosen: dict[str, bool | str] = {}
    if COMMANDS not in given and (loops_work(here[0]) if here else is_known(devices[0], COMMANDS, WITH_LOOPS)):
        chosen[COMMANDS] = WITH_LOOPS
    if HIDING not in given and len(devices) > 1 and is_known((here or devices)[0], HIDING, True):
        chosen[HIDING] = True
    if quantized and MERGED_MB not in given and is_known((here or devices)[0], MERGED_MB, "0"):
        chosen[MERGED_MB] = "0"
    if deterministic:
        # Else XLA takes whichever kernel was fastest while it compiled, which may be another at the next start.
        chosen["xla_gpu_deterministic_ops"] = True
    logger.info("XLA: %s", ", ".join(f"{name}={value}" for name, value in chosen.items()) or "its own defaults")
    return tuple(chosen.items())


@cache
def is_known(device: jax.Device, name: str, value: bool | str) -> bool:
    """Whether this version of XLA knows an option and its value."""
    try:
        jax.jit(lambda x: x + 1).lower(_whole_number(device)).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        logger.warning("%s=%s is not set, since this version of XLA does not know it: %s", name, value, error)
        return False
    return True


@cache
def loops_work(device: jax.Device) -> bool:
    """Try a loop whose length depends on data in a command buffer: run plainly, recorded, and replayed."""
    start = np.arange(64, dtype=np.int32)
    number = _whole_number(device)
    shape = jax.ShapeDtypeStruct(start.shape, jnp.int32, sharding=number.sharding)
    options: dict[str, str | bool] = {COMMANDS: WITH_LOOPS, "xla_gpu_graph_min_graph_size": "1"}
    try:
        program = jax.jit(_count).lower(shape, number).compile(compiler_options=options)
        for trips in (3, 0, 5, 4):
            expected = start
            for index in range(trips):
                expected = np.where(expected % 7 == 3, expected // 2, 2 * expected + index)
            found = program(jax.device_put(start, device), jax.device_put(np.int32(trips), device))
            if not np.array_equal(found, expected):
                raise ValueError(f"{trips} trips of a small loop gave a wrong result")
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        logger.warning("loops stay out of command buffers, so that the host is asked before each trip: %s", error)
        return False
    return True


def _count(start: jax.Array, trips: jax.Array) -> jax.Array:
    def trip(index: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.where(x % 7 == 3, x // 2, 2 * x + index)

    return lax.fori_loop(0, trips, trip, start)


def _whole_number(device: jax.Device) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32, sharding=SingleDeviceSharding(device))
