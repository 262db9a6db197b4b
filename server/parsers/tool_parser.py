"""What the parsers of tool calls have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jax_engine.server.parsers.reader import Reader, Reading


class ToolParser(ABC):
    """Reads the calls of one message; everything else in it is content. A call that is none stays content."""

    tags: ClassVar[tuple[str, ...]]  # what a model writes around calls; kept in its text though they be special tokens

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        """`tools` are those that may be called, in OpenAI's form."""
        self.tools = tools

    @abstractmethod
    def read(self, reader: Reader) -> Reading[None]:
        """Read to the end of the text."""
