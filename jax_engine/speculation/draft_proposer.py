"""The host's side of a draft model: whom it drafts for, how much, and what its cache lacks before it can."""

from dataclasses import dataclass

from jax_engine.scheduling.request import Request
from jax_engine.scheduling.step_plan import TAKE_DRAFT
from jax_engine.speculation.proposers import LEAST_CHANCE, Chances, Proposal, Proposer
from jax_engine.speculation.speculative_config import SpeculativeConfig

TEMPERATURES = (0.0, 0.5, 1.0)  # requests up to each, and those above, are classes of guesses
FORGET = 0.99  # of what a request's own drafts have told, for each token without
DOUBT = 1 / 2000  # of the chances, for each step without drafts, so that they are tried again some day


@dataclass(slots=True)
class _Sequence:
    """One request, as the draft model knows it. Mutable; owned by the `ModelProposer`."""

    request: Request
    num_filled: int = -1  # tokens whose keys and values the draft model's cache has; -1: to be found out
    num_preemptions: int = 0  # when that was found out
    hits: float = 0.0
    tries: float = 0.0
    was_judged: bool = False  # in the latest step


class ModelProposer(Proposer):
    """Drafts by a smaller model, on the device. Mutable; owned by `Drafts`.

    What the draft model's cache lacks of a sequence is taken in when there is something to draft, not before: steps
    without drafts, whether of prompts or of answers, cost nothing. A page that was filled for one request is right for
    whoever has the same content in it: that is known by the page's hash, whatever became of the page meanwhile.
    """

    def __init__(
        self, config: SpeculativeConfig, *, page_size: int, token_budget: int, max_len: int, shares_pages: bool
    ) -> None:
        """A fill has at most `token_budget` tokens, and the draft model sees `max_len`; `shares_pages`: requests find
        the pages of others.
        """
        self._num_drafts = config.num_speculative_tokens
        self._page_size = page_size
        self._token_budget = token_budget
        self._max_len = max_len
        self._shares_pages = shares_pages
        self._chances = Chances(len(TEMPERATURES) + 1)
        self._sequences: dict[str, _Sequence] = {}
        self._contents: dict[int, bytes] = {}  # page -> hash of the content whose keys and values it has here

    def learn(self, request: Request) -> None:
        sequence = self._sequences.get(request.asked.request_id)
        if sequence is None:
            self._sequences[request.asked.request_id] = _Sequence(request)
        elif sequence.was_judged:
            sequence.was_judged = False
        else:
            sequence.hits, sequence.tries = FORGET * sequence.hits, FORGET * sequence.tries

    def forget(self, request: Request) -> None:
        self._sequences.pop(request.asked.request_id, None)

    def propose(self) -> list[Proposal]:
        proposals = []
        for sequence in self._sequences.values():
            request = sequence.request
            room = min(self._num_drafts, request.num_undrawn - 1, self._max_len - request.length)
            if request.slot < 0 or room < 1:
                continue
            chance = (self._chances.of(_class_of(request)) + sequence.hits) / (1 + sequence.tries)
            chances: list[float] = []
            likely = chance
            while len(chances) < room and likely >= LEAST_CHANCE:
                chances.append(likely)
                likely *= chance
            if chances:
                tokens = [TAKE_DRAFT - index for index in range(len(chances))]
                proposals.append(Proposal(request, tokens, chances, is_on_device=True))
        return proposals

    def fills(self, drafts: dict[str, list[int]]) -> dict[str, range]:
        fills, room = {}, self._token_budget
        for name in sorted(drafts, key=lambda name: self._num_missing(self._sequences[name])):
            sequence = self._sequences[name]
            start, end = sequence.num_filled, len(sequence.request.tokens)
            fill = range(start, min(end, start + room))
            room -= len(fill)
            if fill:
                fills[name] = fill
            if fill.stop < end or not fill:
                del drafts[name]
        return fills

    def launch(self, request: Request, fill: range, num_drafted: int) -> None:
        sequence = self._sequences[request.asked.request_id]
        sequence.num_filled = fill.stop
        if not self._shares_pages:
            return
        size, pages = self._page_size, request.pages
        first, last = fill.start // size, (fill.stop + num_drafted - 1) // size
        for page in pages[first : last + 1]:
            self._contents.pop(page, None)
        for index in range(first, fill.stop // size):
            self._contents[pages[index]] = request.page_hash(index, size)

    def judge(self, request: Request, num_kept: int, num_drafted: int) -> None:
        sequence = self._sequences[request.asked.request_id]
        sequence.was_judged = True
        # The last draft was not run.
        sequence.num_filled = len(request.tokens) + min(num_kept, num_drafted - 1)
        for is_right in (*[True] * num_kept, *[False] * (num_kept < num_drafted)):
            sequence.hits, sequence.tries = sequence.hits + is_right, sequence.tries + 1
            self._chances.observe(_class_of(request), is_right)

    def reset(self) -> None:
        self._contents.clear()

    def rest(self) -> None:
        self._chances.doubt(DOUBT)

    def _num_missing(self, sequence: _Sequence) -> int:
        """How many of a sequence's tokens the draft model's cache lacks."""
        request = sequence.request
        if sequence.num_filled < 0 or sequence.num_preemptions != request.num_preemptions:
            sequence.num_preemptions = request.num_preemptions
            sequence.num_filled = self._num_shared(request) * self._page_size
        return len(request.tokens) - sequence.num_filled

    def _num_shared(self, request: Request) -> int:
        """Pages at a request's beginning that were filled for others, or before it was preempted."""
        if not self._shares_pages:
            return 0
        most = (len(request.tokens) - 1) // self._page_size
        for index, page in enumerate(request.pages[:most]):
            if self._contents.get(page) != request.page_hash(index, self._page_size):
                return index
        return min(most, len(request.pages))


def _class_of(request: Request) -> int:
    """By temperature: what is drawn at a high one is hard to guess."""
    return sum(request.asked.temperature > limit for limit in TEMPERATURES)
