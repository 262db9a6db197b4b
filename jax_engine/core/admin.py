"""What the core does on an operator's order: sleep, wake up, record a profile."""

import logging

import jax

from jax_engine.core.messages import AdminReply, IsSleeping, Profile, Sleep, WakeUp
from jax_engine.execution.orders import (
    BringBackWeights,
    DropState,
    PutAwayWeights,
    RenewState,
    StartProfile,
    StopProfile,
)
from jax_engine.execution.runner import Runner
from jax_engine.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

ASLEEP = "the engine is asleep and takes no requests until it is woken up"


class Admin:
    """Which parts of the engine are asleep, and whether a profile is recorded. Mutable; owned by the `EngineCore`."""

    def __init__(self, runner: Runner, scheduler: Scheduler, *, profile_dir: str | None) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._profile_dir = profile_dir
        self._asleep: set[str] = set()  # of `SLEEP_TAGS`
        self._is_recording = False

    @property
    def is_sleeping(self) -> bool:
        return bool(self._asleep)

    def handle(self, order: Sleep | WakeUp | IsSleeping | Profile, *, is_idle: bool) -> AdminReply:
        """Do as told; `is_idle`: no request is in flight."""
        try:
            if isinstance(order, Sleep):
                if not is_idle:
                    return self._busy("requests are running; wait for their end or abort them, then ask again")
                self._sleep(order.level)
            elif isinstance(order, WakeUp):
                self._wake_up(order.tags)
            elif isinstance(order, Profile):
                return self._profile(start=order.start)
        except (ValueError, OSError, jax.errors.JaxRuntimeError) as error:
            logger.exception("the engine could not do as it was told")
            return AdminReply(self.is_sleeping, str(error))
        return AdminReply(self.is_sleeping)

    def stop(self) -> None:
        """Write the profile that is being recorded, if one is."""
        if self._is_recording:
            self._profile(start=False)

    def _sleep(self, level: int) -> None:
        if "kv_cache" not in self._asleep:
            assert self._scheduler.cache.reset(), "no request holds pages"
            if self._scheduler.drafts is not None:
                self._scheduler.drafts.proposer.reset()
            self._runner.do(DropState())
        if "weights" not in self._asleep or level > 1:
            self._runner.do(PutAwayWeights(keep=level == 1))
        self._asleep = {"weights", "kv_cache"}
        logger.info("asleep, level %d: the devices' memory is free", level)

    def _wake_up(self, tags: tuple[str, ...]) -> None:
        if "weights" in self._asleep and "weights" in tags:
            if not self._runner.do(BringBackWeights()):
                self._scheduler.adapters.forget_all()
            self._asleep.remove("weights")
        if "kv_cache" in self._asleep and "kv_cache" in tags:
            self._runner.do(RenewState())
            self._asleep.remove("kv_cache")
        if not self._asleep:
            logger.info("awake")

    def _profile(self, *, start: bool) -> AdminReply:
        assert self._profile_dir is not None, "front ends know whether there is one"
        if start == self._is_recording:
            return self._busy("a profile is being recorded; stop it first" if start else "no profile is being recorded")
        if start:
            self._runner.do(StartProfile(self._profile_dir))
            logger.info("recording a profile into %s", self._profile_dir)
        else:
            self._runner.do(StopProfile())
            logger.info("a profile was written into %s", self._profile_dir)
        self._is_recording = start
        return AdminReply(self.is_sleeping)

    def _busy(self, reason: str) -> AdminReply:
        return AdminReply(self.is_sleeping, reason, is_busy=True)
