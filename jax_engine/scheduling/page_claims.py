"""Where a waiting request can start, and who gives way to whom when pages run out."""

from collections.abc import Sequence
from dataclasses import dataclass

from jax_engine.kv_cache.cache_records import CachedPrefix
from jax_engine.kv_cache.kv_cache_manager import KVCacheManager
from jax_engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class Start:
    """How a waiting request could start: with what it finds computed, and so many tokens more."""

    cached: CachedPrefix
    length: int  # 0: the step has no room for any


@dataclass(frozen=True, slots=True)
class PageClaims:
    """Weighs requests that claim the same pages; the `Scheduler` acts on it."""

    cache: KVCacheManager
    reserve: int  # pages of a partition that admission leaves to those who run on it, so that it does not preempt soon

    def choose(
        self, starts: Sequence[Start], running: Sequence[Request], outranked: Sequence[Request], *, has_slot: bool
    ) -> tuple[Start | None, Sequence[Request]]:
        """The first of `starts` for which there are pages, a slot and tokens; or else, the first for which there are
        once some of the `outranked` running requests have given way, and those of which one is to do so next. None
        where the request must wait.
        """
        for start in starts if has_slot else ():
            if start.length and self._fits(start, running):
                return start, ()
        for start in starts if outranked else ():
            if start.length or not has_slot:  # who gives a slot gives the tokens of its next step, too
                fits = self._fits(start, running)
                useful = outranked if fits else [other for other in outranked if other.owner == start.cached.owner]
                if fits or self._fits(start, running, without=useful):
                    return start, useful
        return None, ()

    def victim(self, candidates: Sequence[Request], partition: int | None = None) -> Request:
        """Who gives way: of the lowest priority, whoever frees a page, of a partition or of any, at the least cost; the
        least urgent of equals.
        """

        def loss(request: Request) -> tuple[int, bool, int]:
            own = self.cache.own_pages(request)
            frees_none = not (any(own) if partition is None else own[partition])
            return -request.asked.priority, frees_none, self.cost(request)

        return min(reversed(candidates), key=loss)

    def cost(self, request: Request) -> int:
        """Tokens to compute again when a request that gives way returns. Pages shared with others will still be there;
        its own are counted as lost, since they are what it gives way for.
        """
        groups, pool, page_size = self.cache.groups, self.cache.pool, self.cache.page_size
        tables = [self.cache.table(request, group) for group in groups.full[:1]]
        shared = [len(table) - pool.num_unshared(table) for table in tables]
        for window, windowed in groups.by_window.items():
            first = request.num_outside[window] // page_size
            users = [pool.num_users(page) for page in self.cache.table(request, windowed[0], window)]
            shared.append(max((first + index for index, count in enumerate(users, 1) if count > 1), default=0))
        return request.num_computed - min(shared) * page_size

    def _fits(self, start: Start, running: Sequence[Request], without: Sequence[Request] = ()) -> bool:
        cached = start.cached
        reserve = self.reserve if any(request.owner == cached.owner for request in running) else 0
        return self.cache.can_start(cached, cached.num_tokens + start.length, reserve=reserve, without=without)
