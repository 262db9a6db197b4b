"""Requests that wait to run, the most urgent first, and what makes one more urgent than another."""

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jax_engine.request import Request, Urgency

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


@dataclass(slots=True)
class _Entry:
    """A place in the heap; `request` is None once it was taken out from the middle."""

    urgency: Urgency
    request: Request | None

    def __lt__(self, other: "_Entry") -> bool:
        return self.urgency < other.urgency


class WaitingQueue:
    """Requests ordered by `Request.urgency`, the lowest first. Mutable; owned by the `Scheduler`.

    Adding and popping take O(log n), removing from anywhere O(1), on average over many.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they would be popped; takes O(n log n)."""
        return iter(sorted((entry.request for entry in self._heap if entry.request), key=lambda r: r.urgency))

    def add(self, request: Request) -> None:
        entry = _Entry(request.urgency, request)
        self._entries[request.asked.request_id] = entry
        heapq.heappush(self._heap, entry)

    def first(self) -> Request | None:
        """The most urgent one, which stays; None when nobody waits."""
        while self._heap and self._heap[0].request is None:
            heapq.heappop(self._heap)
        return self._heap[0].request if self._heap else None

    def remove(self, request: Request) -> None:
        """Take one out, wherever it stands."""
        self._entries.pop(request.asked.request_id).request = None
        if len(self._heap) > 2 * len(self._entries) + 8:
            self._heap = [entry for entry in self._heap if entry.request is not None]
            heapq.heapify(self._heap)
