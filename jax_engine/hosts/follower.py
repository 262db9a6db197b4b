"""A process of an engine over several hosts that does not schedule: `python -m jax_engine.hosts.follower`.

It reads its settings from standard input, loads its part of the model, and then does what process 0 has done, order for
order. It ends with process 0, or when its parent is gone.
"""

import gc
import logging
import os
import sys
from collections import deque
from functools import partial
from types import TracebackType
from typing import Any, NoReturn

import jax

from jax_engine.config import EngineConfig
from jax_engine.core.child_process import begin_as_child
from jax_engine.execution.orders import ORDERS, StartProfile, StopProfile
from jax_engine.execution.runner import Runner
from jax_engine.hosts.group import GroupError
from jax_engine.hosts.group_member import Member
from jax_engine.hosts.hosts import join

logger = logging.getLogger(__name__)

EXIT_LOST, EXIT_USER_ERROR = 1, 2
MAX_AHEAD = 2  # orders that are launched and may not have run


def follow(runner: Runner, member: Member) -> None:
    """Do what is ordered until the leader ends; GroupError when that is not in good order."""
    launched: deque[Any] = deque()
    member.say_loaded()
    while (order := member.receive()) is not None:
        if isinstance(order, StartProfile | StopProfile):
            try:
                order.run(runner.devices)
            except (ValueError, OSError, jax.errors.JaxRuntimeError):
                logger.exception("this process records no profile")
            continue
        launched.append(order.run(runner.devices))
        if len(launched) > MAX_AHEAD:
            jax.block_until_ready(launched.popleft())  # nobody else would see that it failed


def main() -> None:
    settings = begin_as_child()
    config = EngineConfig(**settings["config"])
    try:
        member = join(config, ORDERS, _end)
    except GroupError as error:
        _end(str(error))
    except ValueError as error:
        _end(str(error), EXIT_USER_ERROR)
    sys.excepthook = partial(_report_failure, member)
    try:
        runner = Runner(config, group=member)
    except ValueError as error:
        _report_failure(member, type(error), error, None, user_error=True)
    gc.collect()
    gc.freeze()  # as in the engine core: all processes wait for the slowest one's step
    logger.info("following process 0")
    try:
        follow(runner, member)
    except GroupError as error:
        _end(str(error))
    jax.distributed.shutdown()
    runner.shutdown()
    member.close()


def _report_failure(
    member: Member,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
    *,
    user_error: bool = False,
) -> NoReturn:
    """An exception hook: end because of the failure, or because of another process's that has led to it."""
    if not user_error:
        sys.__excepthook__(kind, error, trace)
        if (words := member.last_words()) is not None:
            _end(words)
    reason = str(error) if user_error else f"{kind.__name__}: {error}"
    member.say_failing(reason, user_error=user_error)
    member.last_words()  # time to send it
    _end(reason, EXIT_USER_ERROR if user_error else EXIT_LOST)


def _end(reason: str, status: int = EXIT_LOST) -> NoReturn:
    """Say why, and end at once: other threads may wait for devices that will never answer."""
    print(f"jax-engine serve: error: {reason}", file=sys.stderr, flush=True)
    os._exit(status)


if __name__ == "__main__":
    main()
