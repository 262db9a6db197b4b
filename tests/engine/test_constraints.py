"""A request whose next mask is not made waits, and nobody waits for it."""

from plans import asked, limits, ranges, tokens_of

from jax_engine.scheduler import Scheduler


class Slow:
    """A constraint that is ready when it is told so."""

    error = None
    is_ready = True
    allows_drafts = True

    def fill(self, rows, drafts=()) -> None:
        raise AssertionError("nothing is run here")

    def advance(self, tokens: list[int]) -> None:
        self.is_ready = False


def test_only_requests_whose_mask_is_made_are_planned():
    scheduler, slow = Scheduler(limits()), Slow()
    scheduler.add(asked("held", 3, 5), slow)
    scheduler.add(asked("free", 3, 5))
    plan = scheduler.schedule()
    assert ranges(plan) == [("held", 0, 3), ("free", 0, 3)]
    assert plan.waits_for_host
    scheduler.commit(plan, tokens_of(plan))
    plan = scheduler.schedule()
    assert ranges(plan) == [("free", 3, 1)]
    assert not plan.waits_for_host
    slow.is_ready = True
    scheduler.commit(plan, tokens_of(plan))
    assert ranges(scheduler.schedule()) == [("held", 3, 1), ("free", 4, 1)]


def test_what_cannot_be_followed_ends_with_the_reason():
    scheduler, slow = Scheduler(limits()), Slow()
    scheduler.add(asked("held", 3, 5), slow)
    plan = scheduler.schedule()
    slow.error = "it is too complex"
    (output,) = scheduler.commit(plan, tokens_of(plan))
    assert (output.finish_reason, output.error) == ("error", "it is too complex")
    assert not scheduler.has_work
