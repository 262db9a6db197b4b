"""Checks of the settings that make several processes one engine."""

from typing import TYPE_CHECKING

from jax_engine.sampling_params import integer, number

if TYPE_CHECKING:
    from jax_engine.config import EngineConfig


def check_hosts(config: "EngineConfig") -> None:
    """Raise a ValueError unless the settings of several hosts are in range, and fit the others."""
    nnodes, address = config.nnodes, config.master_addr
    integer("nnodes", nnodes, low=1, high=1024, remedy="it is how many processes run the engine, one a host")
    remedy = f"the processes of nnodes={nnodes} are numbered from 0"
    integer("node_rank", config.node_rank, low=0, high=nnodes - 1, remedy=remedy)
    remedy = "29501 is the default; the next one is used too"
    integer("master_port", config.master_port, low=1, high=65534, remedy=remedy)
    timeout, remedy = config.distributed_timeout_seconds, "300 seconds are the default"
    number("distributed_timeout_seconds", timeout, low=0, high=86400, open_low=True, remedy=remedy)
    if address is not None and (nnodes == 1 or not address):
        raise ValueError(f"master_addr={address!r} must be an address, and needs nnodes above 1")
    if config.data_parallel_size > 1 and nnodes > 1:
        raise ValueError(
            f"data_parallel_size={config.data_parallel_size} shares the devices of one host, and nnodes={nnodes} joins "
            "those of several; start a group of processes for each replica"
        )
