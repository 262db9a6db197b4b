"""A front end's orders to the cores beside requests: sleep, profiles, aborts by name, the prefix cache."""

import asyncio
import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from jax_engine.core.core_client import EngineDeadError
from jax_engine.core.messages import (
    AbortNamed,
    AdminReply,
    IsSleeping,
    PrefixCacheReset,
    Profile,
    ResetPrefixCache,
    Sleep,
    WakeUp,
)

Order = AbortNamed | IsSleeping | Profile | ResetPrefixCache | Sleep | WakeUp
Reply = TypeVar("Reply", AdminReply, PrefixCacheReset)

SLEEP_LEVELS = (1, 2)
SLEEP_TAGS = ("weights", "kv_cache")
# What the server puts behind a client's id, so that two requests may have the same, and a beam search behind that.
_ID_SUFFIX = re.compile(r"-[0-9a-f]{12}(-\d+)?")


class EngineBusyError(RuntimeError):
    """What is asked cannot be done now; the message says why."""


class AdminClient:
    """Asks the core of every replica, which answers in the order asked. Mutable; owned by an `AsyncLLM`, in its event
    loop.

    All raise an EngineDeadError when a core dies.
    """

    def __init__(self, sends: Sequence[Callable[[Order], None]], *, on_forget: Callable[[], None]) -> None:
        """`sends` reach the replicas; `on_forget` is told when their prefix caches may have been forgotten."""
        self._sends = sends
        self._on_forget = on_forget
        self._replies: list[deque[asyncio.Future[AdminReply]]] = [deque() for _ in sends]
        self._resets: list[deque[asyncio.Future[PrefixCacheReset]]] = [deque() for _ in sends]

    async def sleep(self, level: int = 1) -> None:
        """Give up the devices' memory: weights go to host memory (level 1) or are dropped (2), KV pages are dropped.
        All replicas sleep, or none.

        Raises:
            ValueError: another level.
            EngineBusyError: requests are running.
        """
        replies = await self._ask_all(Sleep(checked_level(level)))
        self._on_forget()
        refused = [reply for reply in replies if reply.error is not None]
        if refused and len(refused) < len(replies):
            await self._ask_all(WakeUp(SLEEP_TAGS))  # one that cannot sleep was awake, and so were all
        for reply in refused:
            raise_for(reply)

    async def wake_up(self, tags: Collection[str] | None = None) -> None:
        """Have the weights, the KV pages or (None) both again; of weights that were dropped, from the checkpoint.

        Raises:
            ValueError: another tag.
            RuntimeError: they cannot be had; the engine sleeps on.
        """
        await self._ask(WakeUp(checked_tags(tags)))

    async def is_sleeping(self) -> bool:
        """Whether weights or KV pages of a replica are not there, and its requests are refused."""
        return any(reply.is_sleeping for reply in await self._ask_all(IsSleeping()))

    async def start_profile(self) -> None:
        """Begin to record what the core does into `profile_dir`. EngineBusyError while that is being done."""
        await self._ask(Profile(start=True))

    async def stop_profile(self) -> None:
        """Write what was recorded. EngineBusyError when nothing was."""
        await self._ask(Profile(start=False))

    async def reset_prefix_cache(self) -> bool:
        """Forget the keys and values of earlier prompts; whether that was done: not where requests run."""
        replies = await self._answers(ResetPrefixCache(), self._resets)
        self._on_forget()
        return all(reply.done for reply in replies)

    def abort(self, request_ids: Collection[str] | None) -> None:
        """Drop the requests of these ids, or all (None), whichever front end has them."""
        first = self._sends[0]  # every core reaches every front end, which knows where its requests are
        first(AbortNamed(None if request_ids is None else list(request_ids)))

    def take(self, replica: int, reply: AdminReply | PrefixCacheReset) -> None:
        """Take what a core sends. For the `AsyncLLM`."""
        if isinstance(reply, PrefixCacheReset):
            _settle(self._resets[replica].popleft(), reply)
        else:
            _settle(self._replies[replica].popleft(), reply)

    def fail(self, reason: str) -> None:
        """A core has died. For the `AsyncLLM`."""
        queues: list[deque[Any]] = [*self._replies, *self._resets]
        for queue in queues:
            for answer in queue:
                if not answer.cancelled():
                    answer.set_exception(EngineDeadError(reason))
            queue.clear()

    async def _ask(self, order: Order) -> None:
        for reply in await self._ask_all(order):
            raise_for(reply)

    async def _ask_all(self, order: Order) -> list[AdminReply]:
        return await self._answers(order, self._replies)

    async def _answers(self, order: Order, waiting: "Sequence[deque[asyncio.Future[Reply]]]") -> list[Reply]:
        """Every replica's answer."""
        answers: list[asyncio.Future[Reply]] = []
        for send, queue in zip(self._sends, waiting, strict=True):
            answers.append(asyncio.get_running_loop().create_future())
            queue.append(answers[-1])
            send(order)
        return await asyncio.gather(*answers)


def _settle(waiting: "asyncio.Future[Reply]", reply: Reply) -> None:
    if not waiting.cancelled():
        waiting.set_result(reply)


def raise_for(reply: AdminReply) -> None:
    """Raise what a reply says went wrong, if anything did."""
    if reply.error is not None:
        raise EngineBusyError(reply.error) if reply.is_busy else RuntimeError(reply.error)


def checked_level(level: int) -> int:
    """`level` itself; ValueError for one that there is not."""
    if level not in SLEEP_LEVELS or isinstance(level, bool):
        raise ValueError(f"level={level!r} must be 1 (weights go to host memory) or 2 (they are read again)")
    return level


def checked_tags(tags: Collection[str] | None) -> tuple[str, ...]:
    """All tags for None, else those given; ValueError for one that there is not."""
    given = SLEEP_TAGS if tags is None else tuple(tags)
    if not given or isinstance(tags, str) or set(given) - set(SLEEP_TAGS):
        raise ValueError(f"tags={tags!r} must be of {' and '.join(SLEEP_TAGS)}; leave them out for both")
    return given


def is_named(request_id: str, names: Collection[str] | None) -> bool:
    """Whether an engine's request is of one of the clients' ids; None names all."""
    return (
        names is None
        or request_id in names
        or any(request_id.startswith(name) and _ID_SUFFIX.fullmatch(request_id, len(name)) for name in names)
    )
