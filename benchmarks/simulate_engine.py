"""The real scheduler and block pool in virtual time: arrivals are events, a step lasts what the cost model says.

Steps follow each other as in `EngineCore.step`: a step is planned and launched while the one before it runs, then that
one's tokens are taken. So a request that arrives during a step waits for the next plan, whose step waits for the one
that runs.
"""

import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from jax_engine.compilation.planner import step_sizes
from jax_engine.core.messages import CoreOutput, CoreRequest
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import SchedulerLimits, StepPlan
from jax_engine.server.bench.figures import RequestTiming
from simulate_cost import StepCost
from simulate_load import END, FILLER, Conversation

WASTE_PERIOD = 16  # steps between two looks at how full the pages are, which takes time for every running request


@dataclass(slots=True)
class Life:
    """One request from its arrival on, in seconds of the simulation. Mutable; owned by the `Simulation`."""

    conversation: Conversation
    turn: int
    arrival: float
    prompt_tokens: int
    output_tokens: int
    scheduled: float = math.nan  # when a plan first had it
    first_token: float = math.nan
    finished: float = math.nan
    num_tokens: int = 0  # generated so far
    num_cached_tokens: int = 0
    gave_up: bool = False

    @property
    def timing(self) -> RequestTiming:
        """Of a finished request."""
        return RequestTiming(self.arrival, (self.first_token, self.finished), self.prompt_tokens, self.num_tokens)


@dataclass
class Counters:
    """What the simulation adds up besides the scheduler's own counters. Mutable; owned by the `Simulation`."""

    steps: int = 0
    token_rows: int = 0
    padding_rows: int = 0
    busy_seconds: float = 0.0  # of the device
    page_tokens: int = 0  # room in the pages in use, summed over looks at it
    page_tokens_unused: int = 0
    schedule_us: float = 0.0  # of a core of this machine: the code is the real one
    commit_us: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """A finished simulation."""

    lives: Sequence[Life]  # every request, in order of arrival
    scheduler: Scheduler
    counters: Counters


@dataclass(slots=True)
class Launched:
    """A step on the device, and when it ends."""

    plan: StepPlan
    end: float


@dataclass
class Simulation:
    """One load through one scheduler. Mutable; `run` is called once.

    `max_tokens` is what each request allows itself at most; its answer ends before that, by an end of sequence that
    the scheduler cannot foresee (None: each request asks for exactly its length). A client gives up on a request that
    has no first token after `patience` seconds.
    """

    conversations: Sequence[Conversation]
    limits: SchedulerLimits
    cost: StepCost
    max_model_len: int
    max_tokens: int | None = None
    patience: float = math.inf
    now: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, clock=lambda: self.now)
        self._rows = step_sizes(self.limits.max_num_seqs, self.limits.token_budget)
        self._order = count()  # of events at one time
        # Conversation's index and turn; or, to give up, a request's id.
        self._events: list[tuple[float, int, tuple[Conversation, int] | str]] = []
        for conversation in self.conversations:
            self._expect(conversation, 0, conversation.turns[0].delay)
        self._lives: list[Life] = []
        self._open: dict[str, Life] = {}
        self._counters = Counters()
        self._device_free = 0.0  # when the last launched step ends

    def run(self) -> Outcome:
        """Until every request has ended."""
        pending: Launched | None = None
        while True:
            if pending is None and not self.scheduler.has_work:
                if not self._events:
                    return Outcome(self._lives, self.scheduler, self._counters)
                self.now = max(self.now, self._events[0][0])
            self._take_events()
            previous, pending = pending, self._launch()
            if previous is not None:
                self.now = max(self.now, previous.end)
                self._commit(previous.plan)
            elif pending is None and self.scheduler.has_work:
                raise RuntimeError("requests wait, nothing runs, and the scheduler plans no step")

    def _expect(self, conversation: Conversation, turn: int, arrival: float) -> None:
        heapq.heappush(self._events, (arrival, next(self._order), (conversation, turn)))

    def _take_events(self) -> None:
        """Everything that has happened by now."""
        while self._events and self._events[0][0] <= self.now:
            when, _, event = heapq.heappop(self._events)
            if isinstance(event, str):
                self._give_up(event)
            else:
                self._arrive(*event, when)

    def _arrive(self, conversation: Conversation, turn: int, arrival: float) -> None:
        prompt = conversation.prompt(turn)
        output_tokens = conversation.turns[turn].output_tokens
        request_id = str(len(self._lives))
        life = Life(conversation, turn, arrival, len(prompt), output_tokens)
        self._lives.append(life)
        self._open[request_id] = life
        most = output_tokens if self.max_tokens is None else max(self.max_tokens, output_tokens)
        self.scheduler.add(
            CoreRequest(
                request_id=request_id,
                prompt_token_ids=prompt,
                max_tokens=min(most, self.max_model_len - len(prompt)),
                min_tokens=0,
                temperature=0.0,
                top_k=0,
                top_p=1.0,
                min_p=0.0,
                prng_key=(0, 0),
                eos_token_ids=(END,),
                stop_token_ids=(),
                arrival_time=arrival,
                # Under other policies the front end takes no priority.
                priority=conversation.priority if self.limits.policy == "priority" else 0,
            )
        )
        if self.patience < math.inf:
            heapq.heappush(self._events, (arrival + self.patience, next(self._order), request_id))

    def _give_up(self, request_id: str) -> None:
        """Abort a request that has no token yet; its conversation ends with it."""
        life = self._open.get(request_id)
        if life is not None and not life.num_tokens:
            life.gave_up = True
            first_scheduled = self.scheduler.requests[request_id].first_scheduled_time
            life.scheduled = self.now if first_scheduled is None else first_scheduled
            del self._open[request_id]
            self.scheduler.abort([request_id])

    def _launch(self) -> Launched | None:
        """Plan a step and put it behind the one that runs."""
        start = time.thread_time()
        plan = self.scheduler.schedule()
        counters = self._counters
        counters.schedule_us += (time.thread_time() - start) * 1e6
        if plan is None:
            return None
        num_tokens = plan.num_tokens
        rows = next(rows for rows in self._rows if rows >= num_tokens)
        seconds = self.cost.seconds(plan.chunks, rows)
        self._device_free = max(self.now, self._device_free) + seconds
        if counters.steps % WASTE_PERIOD == 0:
            cache = self.scheduler.cache
            room = cache.pool.num_in_use * cache.page_size
            counters.page_tokens += room
            counters.page_tokens_unused += room - cache.num_tokens_in_pages(self.scheduler.running)
        counters.steps += 1
        counters.token_rows += rows
        counters.padding_rows += rows - num_tokens
        counters.busy_seconds += seconds
        return Launched(plan, self._device_free)

    def _commit(self, plan: StepPlan) -> None:
        """Give the scheduler a step's tokens: filler, and the end of each answer where it is due."""
        tokens = []
        for chunk in plan.chunks:
            life = self._open.get(chunk.request.asked.request_id) if chunk.num_draws else None
            tokens.append([END if life is not None and life.num_tokens + 1 == life.output_tokens else FILLER])
        start = time.thread_time()
        outputs = self.scheduler.commit(plan, tokens)
        self._counters.commit_us += (time.thread_time() - start) * 1e6
        for output in outputs:
            life = self._open[output.request_id]
            life.num_tokens += 1
            if life.num_tokens == 1:
                self._start(life, output)
            if output.finish_reason is not None:
                self._end(life, output.request_id)

    def _start(self, life: Life, output: CoreOutput) -> None:
        assert output.first_scheduled_time is not None
        life.scheduled = output.first_scheduled_time
        life.first_token = self.now
        life.num_cached_tokens = output.num_cached_tokens

    def _end(self, life: Life, request_id: str) -> None:
        life.finished = self.now
        del self._open[request_id]
        following = life.turn + 1
        if following < len(life.conversation.turns):
            self._expect(life.conversation, following, self.now + life.conversation.turns[following].delay)
