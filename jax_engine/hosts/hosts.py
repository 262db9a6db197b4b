"""Several processes as one engine, each with the devices of its host: how they come together.

First the group meets, over its own sockets, and finds out whether all fit together; then `jax.distributed` makes one
set of all their devices. Only process 0 schedules; see `group_leader` and `follower`.
"""

import hashlib
import json
import logging
import socket
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_engine.compilation.gpu_settings import prepare_gpus
from jax_engine.config import EngineConfig
from jax_engine.hosts.group import Facts
from jax_engine.hosts.group_leader import Leader, OnLost
from jax_engine.hosts.group_member import Member
from jax_engine.loading.checkpoint_manifest import is_converted, read_checkpoint_manifest
from jax_engine.loading.model_files import read_model_config, resolve_model_path

logger = logging.getLogger(__name__)

# JAX's own search for lost processes, which ends them without saying which one it was; the group's is faster.
JAX_HEARTBEAT_SECONDS = 20
JAX_CONNECT_SECONDS = 60
JAX_SHUTDOWN_SECONDS = 5
# Settings that may differ between processes: who they are, folders of theirs, and what the facts say better.
OWN_SETTINGS = frozenset({"node_rank", "master_addr", "model", "compilation_cache_dir", "compile_threads", "compiled"})
ADDRESS_BYTES = 256


def lead(config: EngineConfig, on_lost: OnLost) -> Leader:
    """Gather the other processes and connect all devices; `on_lost` is called in a thread, see `Leader.watch`.

    Raises:
        ValueError: processes have not come in time, or do not fit together.
    """
    if config.master_addr is None:
        address = _connect_pod(config)
    leader = Leader(config.master_addr or address, config.master_port, config.nnodes)
    leader.gather(_facts(config), config.distributed_timeout_seconds)
    leader.watch(on_lost)
    if config.master_addr is not None:
        _connect(config, config.master_addr)
    return leader


def join(config: EngineConfig, kinds: Any, on_lost: Callable[[str], object]) -> Member:
    """Come to the group of process 0 and connect all devices; `kinds` are the messages that it sends.

    Raises:
        ValueError: the group was refused.
        GroupError: process 0 does not answer, or is lost.
    """
    if config.master_addr is None:
        address = _connect_pod(config)
    member = Member(config.master_addr or address, config.master_port, config.node_rank, kinds)
    member.join(_facts(config), config.distributed_timeout_seconds)
    member.watch(on_lost)
    if config.master_addr is not None:
        _connect(config, config.master_addr)
    return member


def check_mesh(mesh: Mesh | None, nnodes: int) -> None:
    """Raise a ValueError unless a mesh has devices of every process."""
    used = {0} if mesh is None else {device.process_index for device in mesh.devices.flat}
    idle = sorted(set(range(nnodes)) - used)
    if idle:
        size = 1 if mesh is None else mesh.size
        raise ValueError(
            f"nnodes={nnodes} processes have {jax.device_count()} devices, and the model is laid out over {size} of "
            f"them, none of node_rank {', '.join(map(str, idle))}; set tensor_parallel_size={jax.device_count()}, or "
            "start fewer processes"
        )


def _connect(config: EngineConfig, address: str) -> None:
    """Connect all devices."""
    prepare_gpus(config)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from the process
    host = f"[{address}]" if ":" in address else address
    coordinator = f"{host}:{config.master_port + 1}"
    jax.distributed.initialize(
        coordinator,
        config.nnodes,
        config.node_rank,
        cluster_detection_method="deactivate",  # every process has all devices of its host
        coordinator_bind_address=coordinator,
        initialization_timeout=JAX_CONNECT_SECONDS,
        heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=JAX_SHUTDOWN_SECONDS,
    )
    _log_devices()


def _connect_pod(config: EngineConfig) -> str:
    """Connect all devices of a TPU pod, which knows its own processes; the address of process 0.

    Raises:
        ValueError: this is no pod, or not with such processes.
    """
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            initialization_timeout=int(config.distributed_timeout_seconds),
            heartbeat_timeout_seconds=JAX_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=JAX_SHUTDOWN_SECONDS,
        )
    except (ValueError, TypeError) as error:  # it found no cluster
        raise ValueError(
            f"nnodes={config.nnodes} needs master_addr, the address of the machine with node_rank=0; only a TPU pod "
            "knows it by itself"
        ) from error
    for name, given, found in (
        ("nnodes", config.nnodes, jax.process_count()),
        ("node_rank", config.node_rank, jax.process_index()),
    ):
        if given != found:
            raise ValueError(f"{name}={given} is {found} by the TPU pod's own account; set it to that")
    _log_devices()
    own = socket.gethostbyname(socket.gethostname()).encode()
    address = multihost_utils.broadcast_one_to_all(np.frombuffer(own.ljust(ADDRESS_BYTES), np.uint8))
    return np.asarray(address).tobytes().decode().strip()


def _log_devices() -> None:
    logger.info(
        "process %d of %d: %d of %d devices (%s)",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        jax.local_devices()[0].device_kind,
    )


def _facts(config: EngineConfig) -> Facts:
    """What must be the same in all processes."""
    settings = {name: value for name, value in asdict(config).items() if name not in OWN_SETTINGS}
    folder = resolve_model_path(config.model, revision=config.revision)
    weights = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    contents = json.dumps([read_model_config(folder), weights], sort_keys=True)
    if is_converted(folder):
        contents += read_checkpoint_manifest(folder).sha256
    versions = {f"the version of {name}": metadata.version(name) for name in ("jax-engine", "jax", "jaxlib")}
    files = {"the model's config.json and sizes of weight files": _digest(contents.encode())}
    if config.sharding_rules is not None and (rules := Path(config.sharding_rules)).is_file():
        files["the file of sharding_rules"] = _digest(rules.read_bytes())
    facts: Facts = json.loads(json.dumps(settings | versions | files))  # as they arrive: without tuples
    return facts


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
