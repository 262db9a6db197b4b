"""Processes that compile ahead of time for one engine over several hosts: each for the devices of all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import jax

from jax_engine.config import EngineConfig
from jax_engine.execution.orders import ORDERS
from jax_engine.hosts.group import Group, GroupError
from jax_engine.hosts.group_leader import Leader
from jax_engine.hosts.group_member import Member
from jax_engine.hosts.hosts import join, lead


@contextmanager
def compiling_group(config: EngineConfig) -> Iterator[Group | None]:
    """The other processes of `nnodes`, which do the same; none goes before all are done. None for a single process.

    If one fails, all end, at once and for its reason.

    Raises:
        ValueError: they have not come, or do not fit together.
    """
    if config.nnodes == 1:
        yield None
        return
    try:
        group = lead(config, _end) if config.node_rank == 0 else join(config, ORDERS, _end)
        try:
            yield group
            _wait_for_all(group)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            user_error = isinstance(error, ValueError)
            _tell(group, str(error), user_error=user_error)
            _end(str(error), user_error=user_error)
    except GroupError as error:
        raise ValueError(str(error)) from error


def _wait_for_all(group: Leader | Member) -> None:
    if isinstance(group, Leader):
        group.wait_until_loaded()
        group.close()
        jax.distributed.shutdown()
        return
    group.say_loaded()
    while group.receive() is not None:
        pass
    jax.distributed.shutdown()
    group.close()


def _tell(group: Leader | Member, reason: str, *, user_error: bool) -> None:
    if isinstance(group, Leader):
        group.close(reason, user_error=user_error)
    else:
        group.say_failing(reason, user_error=user_error)
        group.last_words()  # time to send it


def _end(reason: str, user_error: bool = False) -> NoReturn:
    """Say why, and end at once: other threads may wait for devices that will never answer."""
    print(f"jax-engine compile: error: {reason}", file=sys.stderr, flush=True)
    os._exit(2 if user_error else 1)
