"""The engine cores of a server's replicas: started together, ended together, each request in one of them."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from jax_engine.adapters.adapter_client import AdapterClient
from jax_engine.config import EngineConfig
from jax_engine.core.admin_client import AdminClient
from jax_engine.core.core_client import CoreConnection, CoreProcess, OnProgress
from jax_engine.core.engine_view import EngineView
from jax_engine.core.messages import (
    Abort,
    AbortNamed,
    AdapterReply,
    Add,
    AdminReply,
    CoreRequest,
    PrefixCacheReset,
    ServedAdapters,
    Starting,
    StepOutputs,
    Vocabulary,
)
from jax_engine.core.routing import Router
from jax_engine.core.stats import EngineStats
from jax_engine.core.view_client import ViewClient


async def spawn_cores(config: EngineConfig, *, num_channels: int = 1) -> list[CoreProcess]:
    """Start the core of every replica; returns before they serve. ValueError when there are too few devices."""
    cores: list[CoreProcess] = []
    try:
        while len(cores) < config.data_parallel_size:
            cores.append(await CoreProcess.spawn(config, num_channels=num_channels, replica=len(cores)))
    except BaseException:
        await end_cores(cores, timeout=0)
        raise
    return cores


async def end_cores(cores: Sequence[CoreProcess], *, timeout: float = 5.0) -> None:
    """End all of them, by force after `timeout` seconds."""
    await asyncio.gather(*(core.shutdown(timeout) for core in cores))


async def start_cores(config: EngineConfig, on_progress: OnProgress | None = None) -> list[CoreProcess]:
    """Start the cores for one front end, and wait until all serve, with the errors of `wait_until_ready`."""
    cores = await spawn_cores(config)
    try:
        await wait_until_ready(cores, on_progress)
    except BaseException:  # cancelled, or dead already: nothing of them may stay behind
        await end_cores(cores, timeout=0)
        raise
    return cores


async def wait_until_ready(cores: Sequence[CoreConnection], on_progress: OnProgress | None = None) -> None:
    """Return once all cores serve; `on_progress` is told meanwhile how far they are together.

    Raises:
        ValueError: the model or the settings cannot be served.
        EngineDeadError: a core failed for another reason.
    """
    latest = [Starting()] * len(cores)

    def teller(number: int) -> Callable[[Starting], object]:
        def tell(progress: Starting) -> None:
            latest[number] = progress
            if on_progress is not None:
                on_progress(together(latest))

        return tell

    waiting = [asyncio.ensure_future(core.wait_until_ready(teller(number))) for number, core in enumerate(cores)]
    try:
        await asyncio.gather(*waiting)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


def together(progress: Sequence[Starting]) -> Starting:
    """How far several cores are: nothing is known of how many programs there will be until all have said so."""
    planned = [one.programs_planned for one in progress]
    return Starting(
        programs_compiled=sum(one.programs_compiled for one in progress),
        programs_planned=sum(planned) if all(planned) else 0,
        compile_eta_seconds=max(one.compile_eta_seconds for one in progress),
    )


class Replicas:
    """One front end's connections to the replicas' cores, which serve. Mutable; owned by an `AsyncLLM`, in its event
    loop.

    `info` is what holds for all of them; `stats` are the latest counters that each has sent.
    """

    def __init__(self, cores: Sequence[CoreConnection], config: EngineConfig) -> None:
        infos = [core.info for core in cores]
        self.info = msgspec.structs.replace(infos[0], max_model_len=min(info.max_model_len for info in infos))
        self.stats = [EngineStats(num_pages=info.num_pages, page_size=info.page_size) for info in infos]
        self._cores = tuple(cores)
        self._config = config
        limit = config.max_num_queued_reqs
        pages = [info.num_pages for info in infos]
        self._router = Router(pages, self.info.page_size, max_adapters=config.max_loras, max_sequences=limit)
        sends = [core.send for core in cores]
        self.admin = AdminClient(sends, on_forget=self._router.forget_prefixes)
        self.adapters = AdapterClient(self.info.adapters, sends)
        self.views = tuple(ViewClient(send) for send in sends)
        self._know_text = False  # whether they were sent the vocabulary

    def __len__(self) -> int:
        return len(self._cores)

    def add(self, groups: Sequence[Sequence[CoreRequest]], vocabulary: Callable[[], Vocabulary]) -> list[int]:
        """Send sequences, each group of them to a replica, the numbers of which are returned. `vocabulary` is asked for
        before the first one that has a grammar.

        With a bound on what is in flight, and for branches of one search, all go to the same: a replica takes what is
        sent to it at once all or none, and branches share pages.
        """
        if not self._know_text and any(sequence.structured for group in groups for sequence in group):
            self._know_text = True
            for core in self._cores:
                core.send(vocabulary())
        everything = [sequence for group in groups for sequence in group]
        if len(self) == 1:
            self._cores[0].send(Add(everything))
            return [0] * len(groups)
        if self._config.max_num_queued_reqs is not None or any(sequence.branches for sequence in everything):
            replica = self._router.route(everything)
            self._cores[replica].send(Add(everything))
            return [replica] * len(groups)
        chosen = [self._router.route(group) for group in groups]
        for replica, core in enumerate(self._cores):
            own = [group for number, group in zip(chosen, groups, strict=True) if number == replica]
            if own:
                core.send(Add([sequence for group in own for sequence in group]))
        return chosen

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drop sequences and free their pages at the next step; unknown or finished ones are ignored."""
        if len(self) == 1:
            self._cores[0].send(Abort(list(request_ids)))
            return
        by_replica: dict[int, list[str]] = {}
        for request_id in request_ids:
            if (replica := self._router.place_of(request_id)) is not None:
                by_replica.setdefault(replica, []).append(request_id)
                self._router.ended(request_id)
        for replica, own in by_replica.items():
            self._cores[replica].send(Abort(own))

    async def receive(self, replica: int) -> StepOutputs | AbortNamed:
        """The next thing that a replica's core sends beside answers to what it was asked, which go to who asked.
        EngineDeadError once it has died.
        """
        while True:
            event = await self._cores[replica].receive()
            match event:
                case StepOutputs():
                    self._take_step(replica, event)
                    return event
                case AbortNamed():
                    return event
                case PrefixCacheReset() | AdminReply():
                    self.admin.take(replica, event)
                case AdapterReply() | ServedAdapters():
                    self.adapters.take(replica, event)
                case EngineView():
                    self.views[replica].take(event)

    def fail(self, reason: str) -> None:
        """A core has died: whoever waits for an answer of any gets an EngineDeadError."""
        self.admin.fail(reason)
        self.adapters.fail(reason)
        for view in self.views:
            view.fail(reason)

    async def shutdown(self) -> None:
        """End the cores, if they were started here, and release the sockets."""
        ending: list[Awaitable[None]] = [core.shutdown() for core in self._cores]
        await asyncio.gather(*ending)

    def _take_step(self, replica: int, step: StepOutputs) -> None:
        if step.stats is not None:
            self.stats[replica] = step.stats
        if len(self) > 1:
            for output in step.outputs:
                if output.finish_reason is not None:
                    self._router.ended(output.request_id)
            if step.stats is not None:
                self._router.report(replica, step.stats)
