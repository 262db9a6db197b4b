"""Reasoning before an answer, between two tags."""

from dataclasses import dataclass

from jax_engine.server.parsers.reader import BLANKS, Reader, Reading


@dataclass(frozen=True)
class ReasoningFormat:
    """The tags around reasoning; with `begins_inside` a text without a first tag begins as reasoning."""

    start: str = "<think>"
    end: str = "</think>"
    begins_inside: bool = False

    @property
    def tags(self) -> tuple[str, ...]:
        return self.start, self.end

    def read(self, reader: Reader, *, begins_inside: bool) -> Reading[None]:
        """Read the reasoning, if there is any, and the blanks around it; what follows is left."""
        yield from reader.blanks()
        if (yield from reader.follows(self.start)):
            yield from reader.blanks()
        elif not (begins_inside or self.begins_inside):
            reader.at = 0
            return
        reader.drop()
        if (yield from reader.reasoning_up_to(self.end)):
            yield from reader.blanks()
            reader.drop()

    def is_open(self, text: str) -> bool:
        """Whether a prompt ends with begun reasoning."""
        return text.rstrip(BLANKS).endswith(self.start)

    def is_over(self, text: str) -> bool:
        """Whether a prompt ends with reasoning that has ended, so that the answer has none."""
        return text.rstrip(BLANKS).endswith(self.end)
