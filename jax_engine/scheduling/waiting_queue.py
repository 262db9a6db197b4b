"""Requests that wait to run, the most urgent first, and what makes one more urgent than another."""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from jax_engine.scheduling.request import Request, Urgency

# What a second of waiting is worth under "sjf": a prompt of 32,000 tokens lets later ones pass for 32 seconds at most.
AGING_TOKENS_PER_SECOND = 1000.0


def _in_order_of_arrival(request: Request) -> Urgency:
    return 0.0, request.order


def _by_priority(request: Request) -> Urgency:
    """By the number its client gave, the lowest first, and in order of arrival within one; vLLM's rule."""
    return float(request.asked.priority), request.order


def _shortest_prompt(request: Request) -> Urgency:
    """By the prompt's length and the time of arrival: a request of n tokens is passed only by those that arrive within
    n / AGING_TOKENS_PER_SECOND seconds after it, so that none starves.

    Waiting makes all requests more urgent at one rate, which leaves their order as it is: no clock is read. The prompt
    counts and not max_tokens, which is a bound that clients leave at its largest and tells little about the answer.
    """
    return request.num_prompt + AGING_TOKENS_PER_SECOND * request.asked.arrival_time, request.order


POLICIES: Mapping[str, Callable[[Request], Urgency]] = MappingProxyType(
    {"fcfs": _in_order_of_arrival, "priority": _by_priority, "sjf": _shortest_prompt}
)


class WaitingQueue:
    """Requests ordered by `Request.urgency`, the lowest first. Mutable; owned by the `Scheduler`.

    Adding and taking the first one out take O(log n), taking out any other O(1), on average over many.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        # (urgency, number, request); those whose number is no longer their request's have been taken out.
        self._heap: list[tuple[Urgency, int, Request]] = []
        self._number_of: dict[str, int] = {}  # by request id

    def __len__(self) -> int:
        return len(self._number_of)

    def __contains__(self, request: Request) -> bool:
        return request.asked.request_id in self._number_of

    def __iter__(self) -> Iterator[Request]:
        """The most urgent first; takes O(n log n)."""
        return (entry[2] for entry in sorted(filter(self._is_live, self._heap)))

    def add(self, request: Request) -> None:
        number = self._number_of[request.asked.request_id] = next(self._numbers)
        heapq.heappush(self._heap, (request.urgency, number, request))

    def first(self) -> Request | None:
        """The most urgent one, which stays; None when nobody waits."""
        while self._heap and not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def some(self, count: int) -> list[Request]:
        """The most urgent one and others, nearly the next ones, in order; takes the same time however many wait."""
        return [entry[2] for entry in heapq.nsmallest(count, filter(self._is_live, self._heap[: 8 * count]))]

    def remove(self, request: Request) -> None:
        """Take one out, wherever it stands."""
        del self._number_of[request.asked.request_id]
        if len(self._heap) > 2 * len(self._number_of) + 8:
            self._heap = list(filter(self._is_live, self._heap))
            heapq.heapify(self._heap)

    def _is_live(self, entry: tuple[Urgency, int, Request]) -> bool:
        return self._number_of.get(entry[2].asked.request_id) == entry[1]
