"""How full the pages in use are."""

from collections.abc import Iterable

from jax_engine.kv_cache.block_pool import BlockPool
from jax_engine.kv_cache.cache_records import NO_PAGE, CacheGroups, first_seen
from jax_engine.scheduling.request import Request


def num_tokens_in_pages(running: Iterable[Request], pool: BlockPool, groups: CacheGroups, page_size: int) -> int:
    """Tokens whose keys and values the pages in use hold for a step to come, those of shared pages once.

    A token counts in each group that holds it; one that has left the window, but not its page, does not. All pages
    are full but a sequence's last ones.
    """
    filled: dict[int, int] = {}  # of the last pages
    outside: dict[int, list[int]] = {}  # first page in a window: tokens of it outside, for each that begins there
    for request in running:
        if not request.pages:
            continue
        in_last = request.num_computed - (len(request.pages) // groups.number - 1) * page_size
        for page in request.pages[-groups.number :]:
            if page != NO_PAGE:
                filled[page] = max(in_last, filled.get(page, 0))
        known = min(request.num_computed, len(request.tokens))
        for window, of_window in groups.by_window.items():  # pages that it has passed are held for steps in flight
            index, rest = divmod(first_seen(known, window), page_size)
            for group in of_window if rest else ():
                outside.setdefault(request.pages[index * groups.number + group], []).append(rest)
    total_outside = sum(min(rests) for page, rests in outside.items() if len(rests) == pool.num_users(page))
    return (pool.num_in_use - len(filled)) * page_size + sum(filled.values()) - total_outside
