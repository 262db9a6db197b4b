"""A device for the scheduler's tests: pages whose content tells whether every token found what it sees."""

from collections import Counter
from itertools import product

from plans import drawn_by, token_at

from jax_engine.kv_cache.cache_records import held
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import Chunk, SchedulerLimits, StepPlan


class FakeDevice:
    """Pages that hold, for each token, the whole sequence up to it: what its keys and values depend on.

    A step's rows read what was there before it, and their own; tokens that the host does not know yet are those that
    this test's model draws. A row whose request has ended, as the host is yet to learn, reads and writes what it likes
    in its own pages.
    """

    def __init__(self, limits: SchedulerLimits, *, num_undone: int = 0) -> None:
        self.page_size, self.windows = limits.page_size, limits.windows
        self.partition_size = limits.num_pages // limits.partitions.count
        self.pages: list[list[tuple[object, ...] | None]] = [[None] * limits.page_size for _ in range(limits.num_pages)]
        self.host_pages: dict[int, list[tuple[object, ...] | None]] = {}
        self.tables: dict[int, list[int]] = {}  # of each slot, its groups in turn
        self.ended: set[str] = set()
        self.num_undone = num_undone  # entries of a block table that may be given again

    def place(self, chunk: Chunk, group: int, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.page_size)
        page = self.tables[chunk.slot][index * len(self.windows) + group]
        assert page >= 0, "a page is gone that is seen"
        return page, offset

    def run(self, plan: StepPlan) -> None:
        for page, host_page in plan.copies.saves:
            self.host_pages[host_page] = list(self.pages[page])
        for source, target in plan.copies.copies:
            assert source // self.partition_size == target // self.partition_size, "a copy between partitions"
            self.pages[target] = list(self.pages[source])
        for host_page, page in plan.copies.loads:
            self.pages[page] = list(self.host_pages[host_page])
        for chunk in plan.chunks:
            if chunk.first_new_page == 0 and chunk.new_pages:
                self.tables[chunk.slot] = []
            table = self.tables[chunk.slot]
            # Pages of drafts that were wrong may have been taken back.
            assert not chunk.new_pages or chunk.first_new_page <= len(table) <= chunk.first_new_page + self.num_undone
            if chunk.new_pages:
                table[chunk.first_new_page :] = chunk.new_pages
        groups = list(enumerate(self.windows))
        places = [
            self.place(chunk, group, position)
            for chunk in plan.chunks
            for group, _ in groups
            for position in range(chunk.start, end_of(chunk))
        ]
        written = set(places)
        assert len(written) == len(places), "two sequences write one place"
        live = [chunk for chunk in plan.chunks if chunk.request.asked.request_id not in self.ended]
        for chunk, (group, window) in product(live, groups):
            whole = self.sequence(chunk, chunk.start)
            for position in range(max(0, chunk.start - window + 1) if window else 0, chunk.start):
                page, offset = self.place(chunk, group, position)
                assert self.pages[page][offset] == (group, *whole[: position + 1])
                assert (page, offset) not in written, "a shared page is written"
        for chunk in plan.chunks:
            for page in held(chunk.new_pages) if chunk not in live else ():
                self.pages[page] = [None] * self.page_size
        for chunk in live:
            drawn = drawn_by(chunk)
            stop = chunk.start + chunk.length + len(drawn) - len(chunk.drafts) - 1
            whole = (*self.sequence(chunk, stop - len(chunk.drafts)), *chunk.drafts)
            for position, (group, _) in product(range(chunk.start, stop), groups):
                page, offset = self.place(chunk, group, position)
                self.pages[page][offset] = (group, *whole[: position + 1])
            if chunk.num_draws and not chunk.drafts and drawn[-1] in chunk.request.asked.stop_token_ids:
                self.ended.add(chunk.request.asked.request_id)

    def sequence(self, chunk: Chunk, length: int) -> tuple[int, ...]:
        prompt = chunk.request.asked.prompt_token_ids
        name = chunk.request.asked.request_id
        return (*prompt, *(token_at(name, position) for position in range(len(prompt), length)))[:length]


def end_of(chunk: Chunk) -> int:
    """Where what a chunk may write ends."""
    return chunk.start + chunk.length + max(0, chunk.num_draws - len(chunk.drafts) - 1)


def check_pages(scheduler: Scheduler, max_steps: int) -> None:
    """Every running request has just the pages that its tokens to come see; each is counted for each that has it."""
    page_size, windows = scheduler.limits.page_size, scheduler.limits.windows
    users = Counter(page for request in scheduler.running for page in held(request.pages))
    assert scheduler.cache.pool._counts == [users[page] for page in range(scheduler.limits.num_pages)]
    shares = scheduler.limits.enable_prefix_caching or any(request.asked.prompt_group for request in scheduler.running)
    assert shares or set(users.values()) <= {1}
    places = set()
    partitions = scheduler.limits.partitions
    size = scheduler.limits.num_pages // partitions.count
    for request in scheduler.running:
        where = [
            (page // size, partitions.of(request.owner, place // len(windows)))
            for place, page in enumerate(request.pages)
            if page >= 0
        ]
        assert all(lies == belongs for lies, belongs in where)
        assert len(request.pages) == -(-request.num_computed // page_size) * len(windows)
        for group, window in enumerate(windows):
            outside = request.num_outside[window] if window else 0
            table = request.pages[group :: len(windows)]
            most = -(-(window + max(scheduler.limits.token_budget, 2 * max_steps) - 2) // page_size) + 1
            assert not window or len(held(table)) <= most
            assert [page >= 0 for page in table] == [index >= outside // page_size for index in range(len(table))]
            known = min(request.num_computed, len(request.tokens))
            seen = max(0, known - window + 1) if window else 0
            tokens = range(outside // page_size * page_size, request.num_computed)
            places |= {
                (table[token // page_size], token % page_size)
                for token in tokens
                if token >= seen or token // page_size < seen // page_size  # passed, and held for steps in flight
            }
    assert scheduler.cache.num_tokens_in_pages(scheduler.running) == len(places)
