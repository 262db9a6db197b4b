"""What one training or test sample is, how its answer is judged, and which side of the split it falls on."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]
"""One turn in OpenAI's shape: `role` and `content`, and `tool_calls` where the assistant calls tools."""

Checker = Callable[[str], bool]
"""Judges the text that a model generated after the prompt."""

PLAIN_TEXT = "text"
"""Role of the only message of a sample that is no chat but a text of its own."""

HELD_OUT_PERCENT = 10
THINK_END = "</think>"
TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """One conversation that ends with the assistant's reference answer.

    `instance` names the underlying problem, free of wording wherever the answer can be worked out, and alone
    decides (with `task`) whether the sample may be trained on: see `is_held_out`. The first `num_history` messages
    are context from elsewhere: their answers are not to be learned.
    """

    task: str
    instance: str
    messages: tuple[Message, ...]
    check: Checker
    tools: tuple[dict[str, Any], ...] = ()
    num_history: int = 0

    @property
    def prompt(self) -> list[Message]:
        """The turns that a model is given."""
        return list(self.messages[:-1])

    @property
    def held_out(self) -> bool:
        return is_held_out(self.task, self.instance)


def is_held_out(task: str, instance: str) -> bool:
    """True for the tenth of all problem instances that training never sees.

    A hash of the problem itself decides, so no wording of a held-out problem can reach the training text.
    """
    digest = hashlib.blake2b(f"{task}\n{instance}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def thought(trace: str, answer: str) -> str:
    """An assistant turn with a reasoning part, in the layout that Qwen3 made common."""
    return f"<think>\n{trace}\n{THINK_END}\n\n{answer}"


def final_answer(text: str) -> str:
    """What the user is meant to read: the text after the reasoning part, without surrounding white space."""
    return text.rpartition(THINK_END)[2].strip()


@dataclass(frozen=True)
class ExactAnswer:
    """The final answer must equal `expected`, character by character."""

    expected: str

    def __call__(self, text: str) -> bool:
        return final_answer(text) == self.expected


@dataclass(frozen=True)
class JsonAnswer:
    """The final answer must be JSON whose value equals that of `expected` (itself JSON text)."""

    expected: str

    def __call__(self, text: str) -> bool:
        try:
            return bool(json.loads(final_answer(text)) == json.loads(self.expected))
        except json.JSONDecodeError:
            return False


@dataclass(frozen=True)
class ToolCallAnswer:
    """There must be exactly one tool call, whose name and arguments equal those of `expected` (JSON text)."""

    expected: str

    def __call__(self, text: str) -> bool:
        calls = TOOL_CALL.findall(text)
        return len(calls) == 1 and JsonAnswer(self.expected)(calls[0])


@dataclass(frozen=True)
class StoryAnswer:
    """A story has no single right text: it must mention every word asked for, and be whole.

    Whole means three sentences or more, none said twice, the last one finished.
    """

    mentions: tuple[str, ...]

    def __call__(self, text: str) -> bool:
        story = final_answer(text)
        sentences = re.findall(r"[^.!?]+[.!?]", story)
        distinct = len(sentences) >= 3 and len(set(sentences)) == len(sentences)
        return distinct and story.endswith((".", "!")) and all(word in story for word in self.mentions)
