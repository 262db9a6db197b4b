"""What tests of the scheduler share: small limits, requests, and a model whose tokens are a function of their place."""

from random import Random

from tiny_engine import VOCAB_SIZE, core_request

from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import CoreRequest
from jax_engine.scheduling.scheduler import Scheduler
from jax_engine.scheduling.step_plan import Chunk, SchedulerLimits, StepPlan
from jax_engine.speculation.drafting import Drafts
from jax_engine.speculation.proposers import Proposal, Proposer
from jax_engine.speculation.speculative_config import SpeculativeConfig
from jax_engine.speculation.step_times import StepTimes

NONSENSE = -7  # no token


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
    """The tokens that a device draws for a chunk: as many as planned, or up to one to stop at; nonsense behind a draft
    that is wrong.
    """
    asked, first = chunk.request.asked, chunk.start + chunk.length
    if chunk.drafts:
        right = [token_at(asked.request_id, chunk.start + 1 + offset) for offset in range(chunk.num_draws)]
        num_right = next((i for i, draft in enumerate(chunk.drafts) if draft != right[i]), len(chunk.drafts))
        return right[: num_right + 1] + [NONSENSE] * (len(chunk.drafts) - num_right)
    tokens = [token_at(asked.request_id, first + offset) for offset in range(max(1, chunk.num_draws))]
    ends = (index for index, token in enumerate(tokens, 1) if token in asked.stop_token_ids)
    return tokens[: next(ends, len(tokens))]


class Untimed(StepTimes):
    """Steps with drafts are as fast as others, on a busy machine too."""

    def ratio(self, num_rows: int, num_plain_rows: int, drafted_in_turn: int = 0) -> float:
        return 1.0


class Oracle(Proposer):
    """Drafts what plain decoding is known to say, each token with a chance to be wrong."""

    def __init__(self, core: InProcessCore, answers: dict[str, list[int]], chance: float, random: Random) -> None:
        self._core, self._answers, self._chance, self._random = core, answers, chance, random

    def propose(self) -> list[Proposal]:
        proposals = []
        for request in self._core._core.scheduler.running:
            start = len(request.tokens) - request.num_prompt
            answer = self._answers[request.asked.request_id][start : start + self._random.randint(0, 5)]
            tokens = [
                token if self._random.random() < self._chance else self._random.randrange(VOCAB_SIZE)
                for token in answer[: request.num_undrawn - 1]
            ]
            if tokens:
                proposals.append(Proposal(request, tokens, [1.0] * len(tokens)))
        return proposals


class RandomProposer(Proposer):
    """Drafts for any running request at any time, each right with some chance; `drafts` is for the scheduler."""

    def __init__(self, scheduler: Scheduler, random: Random) -> None:
        self._scheduler, self._random = scheduler, random
        self.chance = random.choice([0.3, 0.8, 1.0])
        self.drafts = Drafts(SpeculativeConfig.of({"method": "ngram", "num_speculative_tokens": 6}))
        self.drafts.proposer, self.drafts.times = self, Untimed((), ())

    def propose(self) -> list[Proposal]:
        proposals = []
        for request in self._scheduler.running:
            most = min(self._random.choice([0, 1, 3, 6]), request.num_undrawn - 1)
            first, name = len(request.tokens), request.asked.request_id
            tokens = [
                token_at(name, position) if self._random.random() < self.chance else NONSENSE
                for position in range(first, first + most)
            ]
            if tokens:
                proposals.append(Proposal(request, tokens, [1.0] * len(tokens)))
        return proposals


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
