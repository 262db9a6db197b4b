"""What a model thinks before it answers: a form applies after it, and a budget ends it."""

import numpy as np
from numpy.typing import NDArray

from jax_engine.core.messages import ThinkingRequest
from jax_engine.frontend.tokenizer import Tokenizer
from jax_engine.grammar.bitmasks import all_tokens, has_bit, pack_bits
from jax_engine.sampling_params import SamplingParams

MAX_BLANKS = 2  # tokens between the end of the thinking and a form
BLANKS = ("\n", "\n\n", " ")


def thinking_request(params: SamplingParams, tokenizer: Tokenizer) -> ThinkingRequest | None:
    """What the core needs to know of a request's thinking; None where it may be as it likes.

    Raises:
        ValueError: a budget, and nobody has said how the model marks its thinking.
    """
    reasoning, budget = params.reasoning, params.thinking_token_budget
    if reasoning is None:
        if budget is not None:
            raise ValueError(
                f"thinking_token_budget={budget} is for chats with a model whose reasoning is told apart "
                "(--reasoning-parser; SamplingParams.reasoning); leave it out"
            )
        return None
    if params.structured_outputs is None and budget is None:
        return None
    blanks = [tokenizer.encode(text, add_special_tokens=False) for text in BLANKS]
    return ThinkingRequest(
        start=tuple(tokenizer.encode(reasoning.start, add_special_tokens=False)),
        end=tuple(tokenizer.encode(reasoning.end, add_special_tokens=False)),
        begins_inside=reasoning.begins_inside,
        budget=budget,
        blanks=tuple(ids[0] for ids in blanks if len(ids) == 1),
    )


class Thinking:
    """One sequence's thinking as far as it has come. Mutable; owned by its `GrammarConstraint`.

    At first it is open whether the model thinks: its first token tells. Thinking ends with the tokens of its end; the
    budget spent, no others are allowed. What follows, but for a few blanks, belongs to the form.
    """

    def __init__(self, asked: ThinkingRequest, vocab_size: int, held_back: tuple[int, ...]) -> None:
        """`held_back` are tokens that do not come while it lasts."""
        self._asked = asked
        self._vocab_size = vocab_size
        self._free = all_tokens(1, vocab_size)[0] & ~pack_bits(held_back, vocab_size)
        self._num_started = len(asked.start) if asked.begins_inside else 0  # tokens of the start
        self._tokens: list[int] = []  # since then, its end among them
        self._num_ended = 0  # of those, the latest ones that are the beginning of the end
        self._num_blanks = 0
        self._form_mask = self._free  # what the form allows next
        self.is_over = False

    def take(self, tokens: list[int]) -> list[int]:
        """Follow new tokens; returns those that belong to the form."""
        for number, token in enumerate(tokens):
            if not self._takes(token):
                self.is_over = True
                return tokens[number:]
        return []

    def mask(self, form_mask: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """The bitmask of the tokens that may come next, `form_mask` being that of the form: [words]."""
        asked, self._form_mask = self._asked, form_mask
        if self.is_over:
            return form_mask
        if self._num_started == 0:
            return form_mask | self._bits(asked.start[0])
        if self._num_started < len(asked.start):
            return self._bits(asked.start[self._num_started])
        if self._has_ended:
            return form_mask | self._bits(*asked.blanks) if self._num_blanks < MAX_BLANKS else form_mask
        if asked.budget is not None and len(self._tokens) >= asked.budget:
            return self._bits(asked.end[self._num_ended])
        return self._free

    @property
    def _has_ended(self) -> bool:
        return self._num_ended == len(self._asked.end)

    def _takes(self, token: int) -> bool:
        """Whether a token belongs to the thinking, its tags or the blanks behind it."""
        asked = self._asked
        if self.is_over:
            return False
        if self._num_started < len(asked.start):
            # A text that merely begins like a tag of several tokens is the form's, where that allows it.
            is_start = token == asked.start[self._num_started]
            is_form = self._num_started == 0 and len(asked.start) > 1 and self._in_form(token)
            self._num_started += is_start and not is_form
            return is_start and not is_form
        if self._has_ended:
            self._num_blanks += 1
            return token in asked.blanks and self._num_blanks <= MAX_BLANKS and not self._in_form(token)
        self._tokens.append(token)
        longest = min(len(asked.end), len(self._tokens))
        lengths = range(longest, 0, -1)
        self._num_ended = next((n for n in lengths if tuple(self._tokens[-n:]) == asked.end[:n]), 0)
        return True

    def _in_form(self, token: int) -> bool:
        return has_bit(self._form_mask, token)

    def _bits(self, *tokens: int) -> NDArray[np.uint32]:
        return pack_bits(tokens, self._vocab_size)
