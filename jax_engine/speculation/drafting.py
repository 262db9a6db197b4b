"""Speculative decoding (Leviathan et al. 2023): tokens that are guessed ahead, and computed in one step to be checked.

A running request's next range is its last token and its drafts after it, and the step draws what follows each of them.
The token at a position is drawn with that position's own random number (see `sampler`), whatever was drafted: drafts
are kept as long as they are the tokens drawn, and then the first one drawn otherwise is kept too. So the tokens are the
very ones that come without drafts, greedy or sampled; no correction of the distribution is needed.

Steps with drafts are not overlapped: the host must see which are kept. They are planned only while they are expected to
be faster than plain steps, by how often drafts of their kind have been right and by the time that steps have taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jax_engine.kv_cache.kv_cache_manager import KVCacheManager
from jax_engine.scheduling.request import NO_POSITIONS, Request
from jax_engine.scheduling.step_plan import SchedulerLimits, StepPlan
from jax_engine.speculation.draft_proposer import ModelProposer
from jax_engine.speculation.proposers import NgramProposer, Proposal, Proposer
from jax_engine.speculation.speculative_config import SpeculativeConfig
from jax_engine.speculation.step_times import StepTimes

LEAST_GAIN = 1.15  # over plain decoding, as expected: the plain step that follows one with drafts is late, too


@dataclass
class DraftCounters:
    """Cumulative figures. Mutable; owned by `Drafts`."""

    drafts: int = 0  # ranges with drafted tokens
    tokens: int = 0  # drafted
    accepted: list[int] = field(default_factory=list)  # by position: how often all drafts up to it were kept


@dataclass(frozen=True, slots=True)
class PlannedDrafts:
    """For a step, by request."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    fills: dict[str, range] = field(default_factory=dict)  # tokens that the draft model takes in before

    def of(self, request: Request) -> tuple[Sequence[int], range]:
        """A request's drafts, and its fill."""
        name = request.asked.request_id
        return self.tokens.get(name, ()), self.fills.get(name, NO_POSITIONS)


NO_DRAFTS = PlannedDrafts()


class Drafts:
    """Which requests are given drafts in a step, and what came of them. Mutable; owned by the `Scheduler`."""

    def __init__(
        self,
        config: SpeculativeConfig,
        *,
        proposer: Proposer | None = None,
        step_sizes: Sequence[int] = (),
        draft_sizes: Sequence[int] = (),
    ) -> None:
        """`step_sizes` and `draft_sizes` are the token rows of step programs without and with drafts, ascending."""
        self.proposer: Proposer = NgramProposer(config) if proposer is None else proposer
        self.times = StepTimes(step_sizes, draft_sizes)
        self.counters = DraftCounters(accepted=[0] * config.num_speculative_tokens)
        depth = config.num_speculative_tokens
        self._depths = sorted({depth, -(-depth // 2), 1}, reverse=True)

    @classmethod
    def of(cls, config: SpeculativeConfig, limits: SchedulerLimits) -> "Drafts":
        """Those of an engine."""
        proposer: Proposer = NgramProposer(config)
        if config.model is not None:
            proposer = ModelProposer(
                config,
                page_size=limits.page_size,
                token_budget=limits.token_budget,
                max_len=limits.draft_context,
                shares_pages=limits.enable_prefix_caching,
            )
        return cls(config, proposer=proposer, step_sizes=limits.step_sizes, draft_sizes=limits.draft_sizes)

    def learn(self, request: Request) -> None:
        """A running request has new tokens."""
        if self._can_draft(request):
            self.proposer.learn(request)

    def forget(self, request: Request) -> None:
        """A request has ended."""
        self.proposer.forget(request)

    def plan(self, running: Sequence[Request], cache: KVCacheManager, budget: int) -> PlannedDrafts:
        """Drafts for the next step of at most `budget` tokens, if there are free pages for all of them."""
        decoding = [request for request in running if request.num_uncomputed == 1]
        drafts = self.choose(len(decoding), budget - len(decoding)) if decoding else {}
        if drafts:
            lengths = [1 + len(drafts.get(request.asked.request_id, ())) for request in decoding]
            if not cache.have_room(decoding, lengths):
                return NO_DRAFTS
        fills = self.proposer.fills(drafts) if drafts else {}
        return PlannedDrafts(drafts, fills)

    def choose(self, num_decodes: int, num_tokens: int, *, num_pending: int = 0) -> dict[str, list[int]]:
        """Drafts for the next step, by request, at most `num_tokens` of them; none where plain steps are expected to be
        faster. `num_decodes` requests are to decode in it. `num_pending` tokens are drawn in the step before: the first
        of the tokens proposed on the host.
        """
        proposals = [
            proposal
            for proposal in self.proposer.propose()
            if proposal.request.slot >= 0
            and len(proposal.request.tokens) - proposal.request.num_computed <= 1
            and self._can_draft(proposal.request)
        ]
        hoped = best = LEAST_GAIN
        drafts: dict[str, list[int]] = {}
        for depth in self._depths if proposals else ():
            chosen = {proposal.request.asked.request_id: proposal.tokens[:depth] for proposal in proposals}
            num_drafted, drafted_in_turn = sum(map(len, chosen.values())), _in_turn(proposals, depth)
            if num_drafted > num_tokens:
                continue
            num_gained = sum(sum(_chances(proposal, depth, num_pending)) for proposal in proposals) / num_decodes
            hoped = max(hoped, 1 + num_gained)
            gain = (1 + num_gained) / self.times.ratio(num_decodes + num_drafted, num_decodes, drafted_in_turn)
            if gain > best:
                best, drafts = gain, chosen
        if hoped > LEAST_GAIN and not drafts:
            deepest = {_in_turn(proposals, depth): depth for depth in reversed(self._depths)}
            for drafted_in_turn, depth in deepest.items():
                num_drafted = sum(len(proposal.tokens[:depth]) for proposal in proposals)
                self.times.doubt(num_decodes + num_drafted, drafted_in_turn)
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
        self.proposer.judge(request, num_kept, len(drafts))
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
        if not num_drafted:
            self.proposer.rest()
        if any(len(chunk.fill) > 2 for chunk in plan.chunks):
            return  # the draft model has had to catch up
        if (is_ahead or num_drafted) and plan.num_tokens == len(plan.chunks) + num_drafted:
            drafted_in_turn = max(len(chunk.drafts) * bool(chunk.fill) for chunk in plan.chunks)
            self.times.observe(plan.num_tokens, seconds, drafted=num_drafted > 0, drafted_in_turn=drafted_in_turn)

    def _can_draft(self, request: Request) -> bool:
        """Whether what each of its rows needs can be made in time."""
        return request.constraint is None or request.constraint.allows_drafts


def _chances(proposal: Proposal, depth: int, num_pending: int) -> list[float]:
    """Of a proposal's first `depth` tokens that come behind those that are pending."""
    first = 0 if proposal.is_on_device else num_pending
    return proposal.chances[first : first + depth]


def _in_turn(proposals: Sequence[Proposal], depth: int) -> int:
    """How many of a step's drafts the device makes one after another."""
    return max((len(proposal.tokens[:depth]) for proposal in proposals if proposal.is_on_device), default=0)
