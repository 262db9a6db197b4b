"""Beam search: the sequences that are likeliest as a whole, found by going on with several at once.

The search itself, on the host; the engine gives it the likeliest next tokens of each beam. Candidates, finished
hypotheses, their scores and the rules to stop are those of `transformers`, whose results it reproduces: at each step
the `beam_width` best continuations that end are hypotheses, scored by their log-probability over their length to the
power of `length_penalty`, and the `beam_width` best that do not end are the next beams.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jax_engine.outputs import LogprobsAtPosition
from jax_engine.sampling_params import integer, number


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """How to search; vLLM's names, and `early_stopping`, which is of `transformers`.

    Raises:
        ValueError: a value outside its range; the message names field, value, range and remedy.
    """

    beam_width: int  # sequences that go on, and sequences returned
    max_tokens: int
    ignore_eos: bool = False  # go on past the end of sequence: all are `max_tokens` long
    temperature: float = 0.0  # beam search draws nothing: no other value
    length_penalty: float = 1.0  # above 0 favours long sequences, 0 is their plain log-probability
    include_stop_str_in_output: bool = False  # the end-of-sequence token stays in a sequence that it ends
    # With `beam_width` hypotheses: stop at once (True), or unless the best beam's score, at its length, is better than
    # the worst of them (False), or unless it could be at any length ("never").
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        integer("beam_width", self.beam_width, low=1, high=2**31 - 1, remedy="1 is greedy search")
        integer("max_tokens", self.max_tokens, low=1, high=2**31 - 1, remedy="a search has to end")
        number("length_penalty", self.length_penalty, low=-math.inf, high=math.inf, remedy="1 is the default")
        if isinstance(self.temperature, bool) or self.temperature != 0:
            raise ValueError(
                f"temperature={self.temperature!r} must be 0: beam search takes the likeliest tokens; leave it out"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f'early_stopping={self.early_stopping!r} must be true, false or "never"')
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be true or false")


@dataclass(frozen=True)
class BeamSearchSequence:
    """A sequence that a search found, prompt included."""

    tokens: list[int]
    logprobs: list[LogprobsAtPosition]  # of the tokens after the prompt
    cum_logprob: float  # of all that follows the prompt, the end of sequence included
    text: str
    finish_reason: str  # "stop" at the end of sequence, or "length"
    stop_reason: int | str | None  # the token that ended it
    score: float  # `cum_logprob` over the length to the power of `length_penalty`


@dataclass(frozen=True)
class BeamSearchOutput:
    """What a search found from one prompt: `beam_width` sequences, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True)
class Beam:
    """A continuation of the prompt."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[LogprobsAtPosition, ...] = ()
    cumulative_logprob: float = 0.0

    def extended(self, token: int, position: LogprobsAtPosition) -> "Beam":
        cumulative = self.cumulative_logprob + position[token].logprob
        return Beam((*self.token_ids, token), (*self.logprobs, position), cumulative)


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that has ended, and its score."""

    beam: Beam
    score: float
    finish_reason: str  # "stop" or "length"


class BeamSearch:
    """The search from one prompt. Mutable; owned by whoever runs it: as long as `beams` are left, find the likeliest
    tokens after each and `advance`.
    """

    def __init__(self, params: BeamSearchParams, end_ids: Sequence[int]) -> None:
        """`end_ids` end a sequence, unless they are to be ignored."""
        self.params = params
        self.beams = [Beam()]
        self.hypotheses: list[Hypothesis] = []  # the best first
        self._end_ids = frozenset(() if params.ignore_eos else end_ids)

    @property
    def num_logprobs(self) -> int:
        """Next tokens of a beam that can matter: even if all that end a sequence are among them, enough are left."""
        return self.params.beam_width + len(self._end_ids)

    def advance(self, positions: Sequence[LogprobsAtPosition]) -> None:
        """Take the likeliest next tokens of each beam."""
        width = self.params.beam_width
        candidates = [
            (beam.cumulative_logprob + entry.logprob, token, beam, position)
            for beam, position in zip(self.beams, positions, strict=True)
            for token, entry in position.items()
        ]
        candidates.sort(key=lambda candidate: -candidate[0])
        length = len(self.beams[0].token_ids) + 1
        is_last = length == self.params.max_tokens
        for _, token, beam, position in candidates[:width]:
            if is_last or token in self._end_ids:
                self.hypotheses.append(self._hypothesis(beam.extended(token, position)))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[width:]
        going_on = [candidate for candidate in candidates if candidate[1] not in self._end_ids][:width]
        self.beams = [beam.extended(token, position) for _, token, beam, position in going_on]
        if is_last or self._can_stop(length):
            self.beams = []

    def _can_stop(self, length: int) -> bool:
        """Whether no beam will become one of the best hypotheses, as far as `early_stopping` cares."""
        params = self.params
        if not self.beams:
            return True
        if len(self.hypotheses) < params.beam_width:
            return False
        if params.early_stopping is True:
            return True
        if params.early_stopping == "never" and params.length_penalty > 0:
            length = params.max_tokens
        best = self.beams[0].cumulative_logprob / length**params.length_penalty
        return best <= self.hypotheses[-1].score

    def _hypothesis(self, beam: Beam) -> Hypothesis:
        score = beam.cumulative_logprob / len(beam.token_ids) ** self.params.length_penalty
        return Hypothesis(beam, score, "stop" if beam.token_ids[-1] in self._end_ids else "length")
