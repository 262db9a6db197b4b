"""The pages that sequences end in, partly filled: found by those that go on from them, and copied before they write.

A search that branches asks for them (`CoreRequest.branches`), so that a branch computes its newest token only.
"""

from collections.abc import Sequence

from jax_engine.kv_cache.block_pool import BlockPool
from jax_engine.scheduling.request import Request


def keep_tail(pool: BlockPool, request: Request, page_size: int, suffixes: Sequence[bytes]) -> None:
    """Let the last page of a request that is about to give its pages back be found, in each cache group: `suffixes`
    tell theirs apart.
    """
    num_tokens = min(request.num_computed, len(request.tokens))
    index, rest = divmod(num_tokens, page_size)
    if request.asked.branches and rest:
        tail_hash = request.tail_hash(num_tokens, page_size)
        pages = request.pages[index * len(suffixes) : (index + 1) * len(suffixes)]
        for page, suffix in zip(pages, suffixes, strict=True):
            pool.register(page, tail_hash + suffix, is_tail=True)


def find_tail(
    pool: BlockPool, request: Request, page_size: int, suffixes: Sequence[bytes], partition: int
) -> list[int]:
    """The pages of a partition that all but a request's last token end in, after full ones; none if one is not
    there.
    """
    num_tokens = len(request.tokens) - 1
    if not request.asked.branches or num_tokens % page_size == 0:
        return []
    tail_hash = request.tail_hash(num_tokens, page_size)
    pages = [page for suffix in suffixes if (page := pool.find(tail_hash + suffix, partition)) is not None]
    return pages if len(pages) == len(suffixes) else []
