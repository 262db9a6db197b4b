"""What each of several engine cores on a host is started with: its settings, and the devices that it sees."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jax_engine.config import EngineConfig

# The chips of one process as libtpu wants them, on hosts where a chip is one JAX device (v4, v5e, v5p, v6e).
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}
FIRST_TPU_PORT = 8476  # libtpu's own default


def replica_config(config: EngineConfig, number: int) -> EngineConfig:
    """The settings of one replica's core."""
    if config.data_parallel_size == 1:
        return config
    # Profiles that are written at the same time would have the same name.
    folder = config.profile_dir and str(Path(config.profile_dir) / f"engine-{number}")
    return replace(config, data_parallel_size=1, profile_dir=folder)


def device_environment(
    number: int, count: int, num_devices: int, inherited: Mapping[str, str], *, devices: Path = Path("/dev")
) -> dict[str, str]:
    """What differs from `inherited` for replica `number` of `count`, which has `num_devices` devices.

    All kinds of devices are divided, since nobody knows here which of them JAX will find: NVIDIA GPUs, TPU chips, and
    the threads of XLA's CPU devices.

    Raises:
        ValueError: there are fewer devices than the replicas need.
    """
    own = slice(number * num_devices, (number + 1) * num_devices)
    num_cores = int(inherited.get("NPROC") or os.cpu_count() or 1)
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(visible_gpus(count * num_devices, inherited, devices)[own]),
        **tpu_environment(number, list(map(str, range(count * num_devices)))[own]),
        # Of each pool of threads of XLA:CPU; by default as many as there are cores.
        "NPROC": str(max(1, num_cores // count)),
    }


def visible_gpus(num_needed: int, inherited: Mapping[str, str], devices: Path) -> list[str]:
    """The GPUs that may be used, by CUDA's names; none where they are hidden. ValueError when there are fewer than are
    needed.
    """
    given = inherited.get("CUDA_VISIBLE_DEVICES")
    num_there = sum(entry.name.removeprefix("nvidia").isdecimal() for entry in devices.glob("nvidia*"))
    names = [str(index) for index in range(num_there or num_needed)]  # of an unknown number, as many as are needed
    found = f"this host has {num_there}"
    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        found = f"CUDA_VISIBLE_DEVICES={given} names {len(names)}"
    if names and len(names) < num_needed and num_there and inherited.get("JAX_PLATFORMS") != "cpu":
        raise ValueError(
            f"the replicas of data_parallel_size need {num_needed} GPUs in all, and {found}; lower data_parallel_size, "
            "or the number of devices of each"
        )
    return names


def tpu_environment(number: int, chips: list[str]) -> dict[str, str]:
    """For libtpu: these chips are a slice of their own. Nothing for a number of chips that no slice has."""
    if len(chips) not in TPU_BOUNDS:
        return {}
    port = str(FIRST_TPU_PORT + number)
    return {
        "TPU_VISIBLE_CHIPS": ",".join(chips),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(chips)],
        "TPU_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_ADDRESSES": f"localhost:{port}",
        "TPU_PROCESS_PORT": port,
        "CLOUD_TPU_TASK_ID": "0",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
