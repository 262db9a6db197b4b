"""Speculative decoding (Leviathan et al. 2023): tokens that are guessed ahead, and computed in one step to be checked.

A running request's next range is its last token and its drafts after it, and the step draws what follows each of them.
The token at a position is drawn with that position's own random number (see `sampler`), whatever was drafted: drafts
are kept as long as they are the tokens drawn, and then the first one drawn otherwise is kept too. So the tokens are the
very ones that come without drafts, greedy or sampled; no correction of the distribution is needed.

Steps with drafts are not overlapped: the host must see which are kept. They are planned only while they are expected to
be faster than plain steps, by how often drafts of their kind have been right and by the time that steps have taken.
Guessing by n-grams is cheap enough to go on meanwhile, and to be judged by the tokens that come.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from jax_engine.kv_cache_manager import KVCacheManager
from jax_engine.ngram import NgramHistory
from jax_engine.request import Request
from jax_engine.speculative_config import SpeculativeConfig
from jax_engine.step_plan import StepPlan
from jax_engine.step_times import StepTimes

LEAST_CHANCE = 0.2  # that a draft is kept: less likely ones are not worth a row
LEAST_GAIN = 1.15  # over plain decoding, as expected: the plain step that follows one with drafts is late, too
PRIOR_CHANCE, PRIOR_COUNT = 0.5, 2
LATEST_WEIGHT = 1 / 64


@dataclass
class DraftCounters:
    """Cumulative figures. Mutable; owned by `Drafts`."""

    drafts: int = 0  # ranges with drafted tokens
    tokens: int = 0  # drafted
    accepted: list[int] = field(default_factory=list)  # by position: how often all drafts up to it were kept


class Chances:
    """How often guesses come true, by how many tokens before them agree. Mutable; owned by a proposer."""

    def __init__(self) -> None:
        self._by_class = [PRIOR_CHANCE] * 8
        self._counts = [PRIOR_COUNT] * 8

    def of(self, match: int) -> float:
        return self._by_class[min(match.bit_length(), 7)]

    def observe(self, match: int, is_right: bool) -> None:
        index = min(match.bit_length(), 7)
        self._counts[index] += 1
        self._by_class[index] += max(1 / self._counts[index], LATEST_WEIGHT) * (is_right - self._by_class[index])


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next in a request, and for each the chance that it and all before it do."""

    request: Request
    tokens: list[int]
    chances: list[float]


class Proposer(Protocol):
    """Guesses tokens from those that the host knows."""

    def learn(self, request: Request) -> None:
        """Take in a running request's new tokens, just drawn."""

    def forget(self, request: Request) -> None:
        """The request has ended."""

    def propose(self) -> list[Proposal]:
        """For requests with tokens that are likely enough to come: none that is less so than `LEAST_CHANCE`."""


class NgramProposer:
    """Looks up what the latest tokens were followed by before. Mutable; owned by `Drafts`."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._chances = Chances()
        self._histories: dict[str, NgramHistory] = {}
        self._promising: dict[str, NgramHistory] = {}  # those with a next token that is likely enough

    def learn(self, request: Request) -> None:
        name = request.asked.request_id
        history = self._histories.get(name)
        if history is None:
            config = self._config
            history = NgramHistory(request, shortest=config.prompt_lookup_min, longest=config.prompt_lookup_max)
            self._histories[name] = history
        for match, is_right in history.learn():
            self._chances.observe(match, is_right)
        if history.place >= 0 and self._chances.of(history.match) >= LEAST_CHANCE:
            self._promising[name] = history
        else:
            self._promising.pop(name, None)

    def forget(self, request: Request) -> None:
        self._histories.pop(request.asked.request_id, None)
        self._promising.pop(request.asked.request_id, None)

    def propose(self) -> list[Proposal]:
        proposals = []
        for history in self._promising.values():
            tokens = history.propose(min(self._config.num_speculative_tokens, history.request.num_undrawn - 1))
            chances: list[float] = []
            chance = 1.0
            for offset in range(len(tokens)):
                chance *= self._chances.of(history.match + offset)
                if chance < LEAST_CHANCE:
                    break
                chances.append(chance)
            if chances:
                proposals.append(Proposal(history.request, tokens[: len(chances)], chances))
        return proposals


class Drafts:
    """Which requests are given drafts in a step, and what came of them. Mutable; owned by the `Scheduler`."""

    def __init__(
        self, config: SpeculativeConfig, *, step_sizes: Sequence[int] = (), draft_sizes: Sequence[int] = ()
    ) -> None:
        """`step_sizes` and `draft_sizes` are the token rows of step programs without and with drafts, ascending."""
        self.proposer: Proposer = NgramProposer(config)
        self.times = StepTimes(step_sizes, draft_sizes)
        self.counters = DraftCounters(accepted=[0] * config.num_speculative_tokens)
        depth = config.num_speculative_tokens
        self._depths = sorted({depth, -(-depth // 2), 1}, reverse=True)

    def learn(self, request: Request) -> None:
        """A running request has new tokens."""
        if self._can_draft(request):
            self.proposer.learn(request)

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self.proposer.forget(request)

    def plan(self, running: Sequence[Request], cache: KVCacheManager, budget: int) -> dict[str, Sequence[int]]:
        """Drafts for the next step of at most `budget` tokens, by request, if there are free pages for all of them."""
        decoding = [request for request in running if request.num_uncomputed == 1]
        drafts = self.choose(len(decoding), budget - len(decoding)) if decoding else {}
        if drafts:
            lengths = [1 + len(drafts.get(request.asked.request_id, ())) for request in decoding]
            if sum(map(cache.num_new_pages, decoding, lengths)) > cache.pool.num_free:
                return {}
        return drafts

    def choose(self, num_decodes: int, num_tokens: int, *, num_pending: int = 0) -> dict[str, Sequence[int]]:
        """Drafts for the next step, by request, at most `num_tokens` of them; none where plain steps are expected to be
        faster. `num_decodes` requests are to decode in it. The first `num_pending` of the proposed tokens are drawn in
        the step before, and the drafts come behind them.
        """
        proposals = [
            proposal
            for proposal in self.proposer.propose()
            if proposal.request.slot >= 0
            and len(proposal.request.tokens) - proposal.request.num_computed <= 1
            and self._can_draft(proposal.request)
        ]
        hoped = best = LEAST_GAIN
        drafts: dict[str, Sequence[int]] = {}
        for depth in self._depths if proposals else ():
            chosen: dict[str, Sequence[int]] = {
                proposal.request.asked.request_id: proposal.tokens[:depth] for proposal in proposals
            }
            num_drafted = sum(map(len, chosen.values()))
            if num_drafted > num_tokens:
                continue
            chances = [proposal.chances[num_pending : num_pending + depth] for proposal in proposals]
            hoped = max(hoped, 1 + sum(map(sum, chances)) / num_decodes)
            gain = (1 + sum(map(sum, chances)) / num_decodes) / self.times.ratio(num_decodes + num_drafted, num_decodes)
            if gain > best:
                best, drafts = gain, chosen
        if hoped > LEAST_GAIN and not drafts:
            self.times.doubt(num_decodes + sum(len(proposal.tokens) for proposal in proposals))
        return drafts

    def keep(self, request: Request, drafts: Sequence[int], drawn: Sequence[int], cache: KVCacheManager) -> list[int]:
        """Give a request the tokens to keep of those drawn behind its last token and behind each of its drafts, up to
        one that ends it, and take back what was computed for the rest; the tokens given.
        """
        num_kept = next((index for index, draft in enumerate(drafts) if draft != drawn[index]), len(drafts))
        self.counters.drafts += 1
        self.counters.tokens += len(drafts)
        for position in range(num_kept):
            self.counters.accepted[position] += 1
        tokens = []
        for token in drawn[: num_kept + 1]:
            tokens.append(token)
            if request.append(token) is not None:
                break
        cache.roll_back(request, len(request.tokens) - 1)
        return tokens

    def observe(self, plan: StepPlan, seconds: float, *, is_ahead: bool) -> None:
        """Take note of the time from the tokens of the step before to those of a step. `is_ahead`: the host's work
        for it and for the step after it was done meanwhile; other times of plain steps tell nothing.
        """
        num_drafted = sum(len(chunk.drafts) for chunk in plan.chunks)
        if (is_ahead or num_drafted) and plan.num_tokens == len(plan.chunks) + num_drafted:
            self.times.observe(plan.num_tokens, seconds, drafted=num_drafted > 0)

    def _can_draft(self, request: Request) -> bool:
        """Whether what its rows ask for does not depend on its tokens, so that it is the same behind each draft."""
        asked = request.asked
        return asked.structured is None and (asked.controls is None or asked.controls.is_constant)
