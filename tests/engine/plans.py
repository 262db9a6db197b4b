"""What tests of the scheduler share: small limits, requests, a model whose tokens are a function of their place, and a
device that keeps what its pages hold.
"""

from tiny_engine import core_request

from jax_engine.messages import CoreRequest
from jax_engine.scheduler import Chunk, Scheduler, SchedulerLimits, StepPlan


def limits(**changes: object) -> SchedulerLimits:
    return SchedulerLimits(
        **({"num_pages": 64, "page_size": 4, "max_num_seqs": 4, "token_budget": 16, "watermark": 0.0} | changes)
    )


def asked(name: str, num_prompt: int, max_tokens: int, **fields: object) -> CoreRequest:
    """A request whose prompt begins like no other's: nothing is shared unless a test wants it."""
    return core_request(name, [hash_of(name), *range(1, num_prompt)], max_tokens, **fields)


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big")


def ranges(plan: StepPlan | None) -> list[tuple[str, int, int]]:
    return [(chunk.request.asked.request_id, chunk.start, chunk.length) for chunk in plan.chunks] if plan else []


def token_at(request_id: str, position: int) -> int:
    """The token that this test's model says stands at a position: a pure function, as a real greedy model is."""
    return (sum(map(ord, request_id)) * 31 + position * 7) % 1000


def tokens_of(plan: StepPlan) -> list[list[int]]:
    return [drawn_by(chunk) for chunk in plan.chunks]


def drawn_by(chunk: Chunk) -> list[int]:
    """The tokens that a device draws for a chunk: as many as planned, or up to one to stop at."""
    asked, first = chunk.request.asked, chunk.start + chunk.length
    tokens = [token_at(asked.request_id, first + offset) for offset in range(max(1, chunk.num_draws))]
    ends = (index for index, token in enumerate(tokens, 1) if token in asked.stop_token_ids)
    return tokens[: next(ends, len(tokens))]


def finish(scheduler: Scheduler, previous: StepPlan | None = None) -> dict[str, int]:
    """Run until nothing is left, one step ahead of `previous`; how many tokens each request found cached."""
    cached: dict[str, int] = {}
    while scheduler.has_work or previous is not None:
        plan = scheduler.schedule()
        if previous is not None:
            for output in scheduler.commit(previous, tokens_of(previous)):
                cached[output.request_id] = output.num_cached_tokens
        previous = plan
    return cached


class FakeDevice:
    """Pages that hold, for each token, the whole sequence up to it: what its keys and values depend on.

    A step's rows read what was there before it, and their own; tokens that the host does not know yet are those that
    this test's model draws. A row whose request has ended, as the host is yet to learn, reads and writes what it likes
    in its own pages.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.pages: list[list[tuple[int, ...] | None]] = [[None] * page_size for _ in range(num_pages)]
        self.host_pages: dict[int, list[tuple[int, ...] | None]] = {}
        self.tables: dict[int, list[int]] = {}
        self.ended: set[str] = set()

    def run(self, plan: StepPlan) -> None:
        for page, host_page in plan.copies.saves:
            self.host_pages[host_page] = list(self.pages[page])
        for source, target in plan.copies.copies:
            self.pages[target] = list(self.pages[source])
        for host_page, page in plan.copies.loads:
            self.pages[page] = list(self.host_pages[host_page])
        for chunk in plan.chunks:
            if chunk.first_new_page == 0 and chunk.new_pages:
                self.tables[chunk.slot] = []
            table = self.tables[chunk.slot]
            assert chunk.first_new_page == len(table) or not chunk.new_pages
            table += chunk.new_pages
        written = set()
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.length + max(0, chunk.num_draws - 1)):
                page, offset = divmod(position, self.page_size)
                place = (self.tables[chunk.slot][page], offset)
                assert place not in written, "two sequences write one place"
                written.add(place)
        live = [chunk for chunk in plan.chunks if chunk.request.asked.request_id not in self.ended]
        for chunk in live:
            whole = self.sequence(chunk, chunk.start)
            for position in range(chunk.start):
                page, offset = divmod(position, self.page_size)
                assert self.pages[self.tables[chunk.slot][page]][offset] == whole[: position + 1]
                assert (self.tables[chunk.slot][page], offset) not in written, "a shared page is written"
        for chunk in plan.chunks:
            for page in chunk.new_pages if chunk not in live else ():
                self.pages[page] = [None] * self.page_size
        for chunk in live:
            drawn = drawn_by(chunk)
            stop = chunk.start + chunk.length + len(drawn) - 1
            whole = self.sequence(chunk, stop)
            for position in range(chunk.start, stop):
                page, offset = divmod(position, self.page_size)
                self.pages[self.tables[chunk.slot][page]][offset] = whole[: position + 1]
            if chunk.num_draws and drawn[-1] in chunk.request.asked.stop_token_ids:
                self.ended.add(chunk.request.asked.request_id)

    def sequence(self, chunk: Chunk, length: int) -> tuple[int, ...]:
        prompt = chunk.request.asked.prompt_token_ids
        name = chunk.request.asked.request_id
        return (*prompt, *(token_at(name, position) for position in range(len(prompt), length)))[:length]
