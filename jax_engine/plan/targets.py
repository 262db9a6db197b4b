"""Devices to compile for that are not here, and what a process needs before it compiles for them."""

import importlib.util
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from jax_engine.config import set_default_environment
from jax_engine.plan.chips import Target
from jax_engine.plan.gpu_targets import GPUS, Gpu

COMPILERS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # else a second process ends at the first one's lock
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # of libraries that only a GPU's programs would load
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask what this machine has
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def prepare(targets: Sequence[Target]) -> None:
    """Set up JAX in a process that compiles for devices it does not have: it looks for none of its own, and has as many
    CPU devices as there are in a target that they stand in for. Call it before JAX has looked.
    """
    set_default_environment(COMPILERS)
    jax.config.update("jax_platforms", "cpu")
    on_cpu = [target for target in targets if target.has_stand_in or target.chip.platform == "cpu"]
    count = max((target.num_devices for target in on_cpu), default=1)
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)


def devices_of(target: Target) -> Sequence[jax.Device]:
    """Devices as their compiler describes them; for a CPU, and for GPUs without a compiler, as many of this machine's
    CPU, for which a program is cut into the same parts.

    Raises:
        ValueError: the TPU compiler is not installed, or this process was started with too few CPU devices.
    """
    if target.chip.platform == "cpu" or target.has_stand_in:
        devices = jax.devices("cpu")
        if len(devices) < target.num_devices:
            raise ValueError(
                f"device={target.name!r} needs {target.num_devices} CPU devices in its place and this process has "
                f"{len(devices)}; plan for it in a process of its own"
            )
        return devices[: target.num_devices]
    if target.chip.platform == "gpu":
        return gpu_devices(GPUS[target.chip.name], target.num_devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"device={target.name!r} needs the TPU compiler; pip install 'jax-engine[tpu]'")
    return topology_devices(target.topology, single=target.num_chips == 1)


def topology_devices(topology: str, *, single: bool = False) -> list[jax.Device]:
    """The devices of a topology by the TPU compiler's name, such as `v6e:2x4`; `single` for one chip, which is less
    than a host has.
    """
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices)


def gpu_devices(gpu: Gpu, count: int = 1) -> list[jax.Device]:
    """GPUs of one host, as XLA's compiler for them describes them."""
    hosts_by_devices = f"1x1x{count}"
    return list(
        topologies.get_topology_desc("gpu", "cuda", target_config=gpu.target_config, topology=hosts_by_devices).devices
    )
