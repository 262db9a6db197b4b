"""How many of a completion's tokens are reasoning."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from jax_engine.frontend.token_texts import TokenTexts
from jax_engine.server.openai.message_parts import MessageFormat, MessageParser


@dataclass(frozen=True)
class ReasoningCounter:
    """Counts for the answers to one request, which are read by `message_format`."""

    message_format: MessageFormat
    texts: TokenTexts

    def count(self, text: str, token_ids: Sequence[int]) -> int:
        """The tokens of a whole completion before the one with which the answer begins, for certain."""
        begins = bisect.bisect_left(
            range(len(text) + 1), True, key=lambda length: self._parsed(text[:length]).has_answered
        )
        parser = self._parsed(text[:begins])
        if not parser.has_reasoned:
            return 0
        if not parser.has_answered:
            return len(token_ids)
        ends = list(accumulate(len(self.texts.utf8(token)) for token in token_ids))
        return bisect.bisect_right(ends, len(text[: begins - 1].encode()))

    def _parsed(self, text: str) -> MessageParser:
        """What has read the beginning of a completion; in one piece that takes no time."""
        parser = self.message_format.parser()
        parser.feed(text)
        return parser


def reasoning_counter(message_format: MessageFormat, texts: TokenTexts) -> ReasoningCounter | None:
    """What counts the reasoning of answers; None where there is none. A call begins the answer with its first tag, and
    not where it is certain that it is one.
    """
    if message_format.reasoning is None:
        return None
    return ReasoningCounter(replace(message_format, tool_parser=None), texts)
