"""Requests being answered, each of which ends early when its client leaves, when it takes too long, or when the server
stops waiting for it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.types import Receive

from jax_engine.server.errors import ApiError
from jax_engine.server.metrics.cells import Cells


class ClientGoneError(Exception):
    """The client closed its connection; nobody is there to answer."""


class ShuttingDownError(Exception):
    """The server's grace period is over."""


class InFlight:
    """The tasks that wait for the engine. Mutable; owned by the `Service`."""

    def __init__(self, load: Cells, request_timeout: float | None = None) -> None:
        """How many there are is counted in `load`, which has room for one number. `request_timeout`: seconds that each
        may take; None for any number.
        """
        self._load = load
        self._request_timeout = request_timeout
        self._tasks: set[asyncio.Task[object]] = set()
        self._stopped = False

    @property
    def num_in_all(self) -> int:
        """How many all front ends are answering."""
        return int(self._load.total(0))

    def stop(self) -> None:
        """End all of them now, and each that comes later at once."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def track(self, receive: Receive) -> AsyncIterator[None]:
        """Run a block that may be ended from outside. The request's body must have been read.

        Raises, inside the block's await and out of this:
            ApiError: 504, the request has taken `request_timeout` seconds.
            ClientGoneError: the client closed its connection.
            ShuttingDownError: `stop` was called.
        """
        if self._stopped:
            raise ShuttingDownError
        task = asyncio.current_task()
        assert task is not None
        gone = late = False

        def expire() -> None:
            nonlocal late
            late = True
            task.cancel()

        async def watch() -> None:
            nonlocal gone
            while (await receive())["type"] != "http.disconnect":
                pass
            gone = True
            task.cancel()

        timeout = self._request_timeout
        timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, expire)
        watcher = asyncio.create_task(watch())
        self._tasks.add(task)
        self._load.own[0] += 1
        try:
            yield
        except asyncio.CancelledError:
            if not gone and not late and not self._stopped:
                raise
            task.uncancel()
            if late and not gone:
                raise timed_out(timeout) from None
            raise (ClientGoneError if gone else ShuttingDownError) from None
        finally:
            self._tasks.discard(task)
            self._load.own[0] -= 1
            watcher.cancel()
            if timer is not None:
                timer.cancel()


def timed_out(seconds: float | None) -> ApiError:
    """The answer to a request that takes too long: 504 and not 408, because the client has done its part."""
    message = f"the request was not answered within the {seconds:g} seconds that the server's --request-timeout allows"
    return ApiError(504, message, code="request_timeout")
