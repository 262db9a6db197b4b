"""What a waiting request finds computed: in known pages, or in those of a running one that has the same prompt."""

from collections.abc import Iterator
from dataclasses import dataclass

from jax_engine.kv_cache.block_pool import BlockPool
from jax_engine.kv_cache.cache_records import IN_HOST, NO_PAGE, CachedPrefix, CacheGroups, first_seen
from jax_engine.kv_cache.host_pool import HostPool
from jax_engine.kv_cache.page_partitions import PagePartitions
from jax_engine.kv_cache.tail_pages import find_tail
from jax_engine.scheduling.request import Request


@dataclass(frozen=True, slots=True)
class PrefixFinder:
    """Looks for the computed beginnings of requests, in known pages; it changes nothing.

    Groups without a window must have all of a prefix, others what the token behind it sees. `owner` is the partition
    that a request is to have its pages in, where sequences have one: what others hold is of no use to it.
    """

    pool: BlockPool
    groups: CacheGroups
    partitions: PagePartitions
    page_size: int

    def find_known(self, request: Request, owner: int, *, host: HostPool | None) -> CachedPrefix:
        """The longest prefix in known pages, of all but the last token; with `host`, in its pages, too."""
        most = count = (len(request.tokens) - 1) // self.page_size
        pages: list[int] = []
        for index in range(count if self.groups.full else 0):
            row = self._find_full(request, index, owner, host)
            if row is None:
                count = index
                break
            pages += row
        if self.groups.by_window:
            count, pages = self._with_windows(request, count, pages, owner, host)
        if count == most:
            partition = self.partitions.of(owner, count)
            tail = find_tail(self.pool, request, self.page_size, self.groups.suffixes, partition)
            if tail:
                return self._seen(len(request.tokens) - 1, [*pages, *tail], owner)
        return CachedPrefix(count * self.page_size, pages, owner)

    def share_prompt(self, donor: Request, request: Request, owner: int) -> CachedPrefix | None:
        """What a request begins with, in the pages of one that has computed the same prompt; None where a window has
        passed some of it, or where they are another owner's.
        """
        if donor.owner != owner:
            return None
        num_tokens = min(request.num_prompt, len(request.tokens) - 1)
        for window in self.groups.by_window:
            if donor.num_outside[window] // self.page_size > first_seen(num_tokens, window) // self.page_size:
                return None
        num_pages = -(-num_tokens // self.page_size) * self.groups.number
        return self._seen(num_tokens, donor.pages[:num_pages], owner)

    def _seen(self, num_tokens: int, pages: list[int], owner: int) -> CachedPrefix:
        """A sequence's first tokens, in those of its pages that the token behind them sees."""
        number_of_groups = self.groups.number
        for window, groups in self.groups.by_window.items():
            number = first_seen(num_tokens, window) // self.page_size
            for group in groups:
                pages[group : number * number_of_groups : number_of_groups] = [NO_PAGE] * number
        return CachedPrefix(num_tokens, pages, owner)

    def _find_full(self, request: Request, index: int, owner: int, host: HostPool | None) -> list[int] | None:
        """Page `index` of a request's tokens in the groups without a window, `NO_PAGE` in others; None if one of them
        has no such page.
        """
        row = [NO_PAGE] * self.groups.number
        for group in self.groups.full:
            page = self._find(request, index, group, owner, host)
            if page is None:
                return None
            row[group] = page
        return row

    def _with_windows(
        self, request: Request, count: int, pages: list[int], owner: int, host: HostPool | None
    ) -> tuple[int, list[int]]:
        """Of the longest prefix, of at most `count` full pages, of which groups with a window have what they need: the
        number of full pages, and its pages. `pages` are those of the other groups.
        """
        number = self.groups.number
        while True:
            seen: dict[int, int] = {}
            for place in self._places_seen(count):
                page = self._find(request, *divmod(place, number), owner, host)
                if page is None:
                    # Every shorter prefix that reaches beyond this page needs it, too: a window's length is skipped.
                    count = place // number
                    break
                seen[place] = page
            else:
                pages = pages[: count * number] or [NO_PAGE] * (count * number)
                for place, page in seen.items():
                    pages[place] = page
                return count, pages

    def _places_seen(self, count: int) -> Iterator[int]:
        """Where, among a request's pages, those stand that the token behind `count` full pages sees through windows."""
        for window, groups in self.groups.by_window.items():
            for index in range(first_seen(count * self.page_size, window) // self.page_size, count):
                yield from (index * self.groups.number + group for group in groups)

    def _find(self, request: Request, index: int, group: int, owner: int, host: HostPool | None) -> int | None:
        """Page `index` of a request's tokens in a group, or `IN_HOST`; None when there is none."""
        page_hash = request.page_hash(index, self.page_size) + self.groups.suffixes[group]
        page = self.pool.find(page_hash, self.partitions.of(owner, index))
        if page is None and host is not None and host.find(page_hash) is not None:
            return IN_HOST
        return page
