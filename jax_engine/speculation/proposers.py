"""Who guesses the tokens to come: the interface, and guesses by n-grams."""

from dataclasses import dataclass

from jax_engine.scheduling.request import Request
from jax_engine.speculation.ngram import NgramHistory
from jax_engine.speculation.speculative_config import SpeculativeConfig

LEAST_CHANCE = 0.2  # that a draft is kept: less likely ones are not worth a row
PRIOR_CHANCE, PRIOR_COUNT = 0.5, 2
LATEST_WEIGHT = 1 / 64
NUM_MATCHES = 8  # classes of `match`


class Chances:
    """How often guesses come true, by their class. Mutable; owned by a proposer."""

    def __init__(self, num_classes: int) -> None:
        self._by_class = [PRIOR_CHANCE] * num_classes
        self._counts = [PRIOR_COUNT] * num_classes

    def of(self, index: int) -> float:
        return self._by_class[index]

    def observe(self, index: int, is_right: bool) -> None:
        self._counts[index] += 1
        self._by_class[index] += max(1 / self._counts[index], LATEST_WEIGHT) * (is_right - self._by_class[index])

    def doubt(self, weight: float) -> None:
        """None has been tried: they may be better by now."""
        self._by_class = [chance + weight * (1 - chance) for chance in self._by_class]


@dataclass(frozen=True, slots=True)
class Proposal:
    """Tokens that may come next in a request, and for each the chance that it and all before it do.

    Tokens that only the device knows are `TAKE_DRAFT`, `TAKE_DRAFT - 1` and so on. Those are guessed behind whatever
    has been drawn by then, while known ones are guessed behind the tokens that the host knows now.
    """

    request: Request
    tokens: list[int]
    chances: list[float]
    is_on_device: bool = False


class Proposer:
    """Guesses tokens to come; this one none.

    A proposer on the host guesses from the tokens that it knows (`NgramProposer`). One on the device only says how many
    tokens are worth guessing and what the device has to take in before it does (`fills`); a program that is launched
    before the step guesses them into `DeviceState.drafts`, where the step finds them (`ModelProposer`,
    `draft_program.py`).

    A head that goes on from the model's own hidden states (EAGLE: Li et al. 2024) is one of the latter. Its program
    reads, beside each token of a fill, the hidden state that the model had there. So it needs a cache of those in pages
    of the same numbers, as another field of `DeviceState` that the step functions write where they write the model's
    keys and values; its own keys and values go to `DeviceState.draft_cache`; and its loop hands the hidden state that
    it guesses itself from one iteration to the next. What is planned, checked, kept and counted stays as it is.
    """

    def learn(self, request: Request) -> None:
        """Take in a running request's new tokens, just drawn."""

    def forget(self, request: Request) -> None:
        """The request has ended."""

    def propose(self) -> list[Proposal]:
        """For requests with tokens that are likely enough to come: none that is less so than `LEAST_CHANCE`."""
        return []

    def fills(self, drafts: dict[str, list[int]]) -> dict[str, range]:
        """For requests that are to be drafted for, which of their tokens the device takes in before it drafts. Takes
        those out of `drafts` that have to wait for more of that than a step has room for.
        """
        return {}

    def launch(self, request: Request, fill: range, num_drafted: int) -> None:
        """A step is planned before which the device takes in `fill` of a request and drafts so many tokens."""

    def judge(self, request: Request, num_kept: int, num_drafted: int) -> None:
        """Of a request's drafts in the latest step so many are kept; its tokens are still those before that."""

    def reset(self) -> None:
        """The device has forgotten all that it was given. No request is in flight."""

    def rest(self) -> None:
        """A step without drafts has been taken."""


class NgramProposer(Proposer):
    """Looks up what the latest tokens were followed by before. Mutable; owned by `Drafts`.

    Its guesses cost so little that they go on while none is run: the tokens that come judge them.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._config = config
        self._chances = Chances(NUM_MATCHES)
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
            self._chances.observe(_class_of(match), is_right)
        if history.place >= 0 and self._chances.of(_class_of(history.match)) >= LEAST_CHANCE:
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
                chance *= self._chances.of(_class_of(history.match + offset))
                if chance < LEAST_CHANCE:
                    break
                chances.append(chance)
            if chances:
                proposals.append(Proposal(history.request, tokens[: len(chances)], chances))
        return proposals


def _class_of(match: int) -> int:
    """By how many tokens agree before a guess."""
    return min(match.bit_length(), NUM_MATCHES - 1)
