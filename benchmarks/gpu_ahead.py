"""Programs compiled ahead of their turn, many at once: one after the other would take longer than what they are for."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

MOST_THREADS = 15

Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """What functions make, by name, made in threads from the beginning. Mutable; owned by a job."""

    def __init__(self, makers: Mapping[str, Callable[[], Made]], *, one_by_one: bool) -> None:
        """`one_by_one` makes each when it is asked for: a compiler that crashes then costs that one alone."""
        self._makers = dict(makers) if one_by_one else {}
        self._pool = ThreadPoolExecutor(max(1, min(MOST_THREADS, (os.cpu_count() or 1) - 1)))
        self._made: dict[str, Future[Made]] = {}
        if not one_by_one:
            self._made = {name: self._pool.submit(make) for name, make in makers.items()}

    def __enter__(self) -> "Ahead[Made]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, name: str) -> Made:
        """What was made of a name, once. Raises what making it raised."""
        if name in self._makers:
            return self._makers[name]()
        return self._made.pop(name).result()

    def wait(self) -> int:
        """Until all is made, or has failed; how many there are."""
        wait(self._made.values())
        return len(self._made)
