"""A request whose next mask is not made waits, and nobody waits for it."""

from plans import asked, limits, ranges, tokens_of

from jax_engine.scheduling.scheduler import Scheduler


class Slow:
    """A constraint that is ready when it is told so."""

    error = None
    is_ready = True
    is_quick = False
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
    ahead = scheduler.schedule()
    assert ranges(ahead) == [("free", 3, 1)], "the mask behind the first token will take long"
    scheduler.commit(plan, tokens_of(plan))
    plan = scheduler.schedule()
    assert ranges(plan) == [("free", 4, 1)]
    slow.is_ready = True
    for each in (ahead, plan):
        scheduler.commit(each, tokens_of(each))
    assert ranges(scheduler.schedule()) == [("held", 3, 1), ("free", 5, 1)]


def test_a_mask_that_is_quick_to_make_is_waited_for_with_the_draw_alone():
    scheduler, quick = Scheduler(limits()), Slow()
    quick.is_quick = True
    scheduler.add(asked("held", 3, 5), quick)
    scheduler.add(asked("free", 3, 5))
    first = scheduler.schedule()
    assert not first.draws_later, "the first mask is there"
    ahead = scheduler.schedule()
    assert ranges(ahead) == [("held", 3, 1), ("free", 3, 1)]
    assert ahead.draws_later, "what may follow depends on the first token"
    assert not ahead.waits_for_host
    scheduler.commit(first, tokens_of(first))
    assert not quick.is_ready
    assert ranges(scheduler.schedule()) == [("held", 4, 1), ("free", 4, 1)]


def test_what_cannot_be_followed_ends_with_the_reason():
    scheduler, slow = Scheduler(limits()), Slow()
    scheduler.add(asked("held", 3, 5), slow)
    plan = scheduler.schedule()
    slow.error = "it is too complex"
    (output,) = scheduler.commit(plan, tokens_of(plan))
    assert (output.finish_reason, output.error) == ("error", "it is too complex")
    assert not scheduler.has_work
