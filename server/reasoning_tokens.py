"""How many of a completion's tokens are reasoning."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from jax_engine.server.message_parts import MessageFormat
from jax_engine.token_texts import TokenTexts


@dataclass(frozen=True)
class ReasoningCounter:
    """Counts for the answers to one request, which are read by `message_format`."""

    message_format: MessageFormat
    texts: TokenTexts

    def count(self, text: str, token_ids: Sequence[int]) -> int:
        """The tokens of a whole completion up to the one after which it is certain that no reasoning follows."""
        parser, decoder, place = self.message_format.parser(), codecs.getincrementaldecoder("utf-8")("ignore"), 0
        for number, token in enumerate(token_ids):
            length = len(decoder.decode(self.texts.utf8(token)))
            parser.feed(text[place : place + length])
            place += length
            if parser.has_answered:
                return number if parser.has_reasoned else 0
        return len(token_ids) if parser.has_reasoned else 0


def reasoning_counter(message_format: MessageFormat, texts: TokenTexts) -> ReasoningCounter | None:
    """What counts the reasoning of answers; None where there is none."""
    return ReasoningCounter(message_format, texts) if message_format.reasoning is not None else None
