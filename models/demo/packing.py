"""Packs rendered samples into training batches of a fixed shape."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer

from jax_engine.models.demo.chat_template import render
from jax_engine.models.demo.samples import Sample

Integers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Document:
    """One tokenized sample. `targets[i]` is what follows `ids[i]`; it is learned where `learned[i]`."""

    ids: list[int]
    targets: list[int]
    learned: list[bool]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class RowShape:
    """How many rows of which length, in tokens."""

    rows: int
    length: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `20x128`."""
        rows, _, length = text.partition("x")
        return cls(int(rows), int(length))


@dataclass(frozen=True)
class Block:
    """Rows of packed documents; every array is int32 [rows, length].

    `segments` numbers the documents of a row from 1, 0 is padding; `positions` count from 0 in each document;
    `targets` is -1 where nothing is learned.
    """

    ids: Integers
    targets: Integers
    positions: Integers
    segments: Integers


def tokenize(tokenizer: Tokenizer, sample: Sample) -> Document:
    """Encode span by span, so that the model's own tokens are known; equal to encoding the whole text at once."""
    ids: list[int] = []
    own: list[bool] = []
    for span in render(sample):
        encoded = tokenizer.encode(span.text, add_special_tokens=False).ids
        ids += encoded
        own += [span.answer] * len(encoded)
    return Document(ids[:-1], ids[1:], own[1:])


class Packer:
    """Turns an endless stream of samples into blocks, one for each of `shapes` (shortest rows first) at a time.

    A document goes to the shortest rows that hold it. Owns the documents drawn but not yet placed; documents longer
    than every row are dropped.
    """

    def __init__(self, samples: Iterator[Sample], tokenizer: Tokenizer, shapes: tuple[RowShape, ...]):
        self.samples = samples
        self.tokenizer = tokenizer
        self.shapes = shapes
        self.waiting: list[list[Document]] = [[] for _ in shapes]

    def next_blocks(self) -> tuple[Block, ...]:
        """The next batch, a block for each shape. More documents wait than fit, so that the last gaps fill too."""
        shortest = self.shapes[0]
        while sum(map(len, self.waiting[0])) < 1.2 * shortest.rows * shortest.length:
            self._draw()
        return tuple(self._fill(index) for index in range(len(self.shapes)))

    def _draw(self) -> None:
        document = tokenize(self.tokenizer, next(self.samples))
        for waiting, shape in zip(self.waiting, self.shapes, strict=True):
            if len(document) <= shape.length:
                waiting.append(document)
                return

    def _fill(self, index: int) -> Block:
        """Each document, longest first within what waits, goes to the first row with room."""
        shape = self.shapes[index]
        block = Block(*(np.full((shape.rows, shape.length), fill, np.int32) for fill in (0, -1, 0, 0)))
        used, counts = [0] * shape.rows, [0] * shape.rows
        for source in reversed(range(index + 1)):
            left = []
            for document in self.waiting[source]:
                row = next((row for row in range(shape.rows) if used[row] + len(document) <= shape.length), None)
                if row is None:
                    left.append(document)
                    continue
                counts[row] += 1
                _place(block, document, row, used[row], counts[row])
                used[row] += len(document)
            self.waiting[source] = left
        return block


def _place(block: Block, document: Document, row: int, start: int, segment: int) -> None:
    place = slice(start, start + len(document))
    block.ids[row, place] = document.ids
    block.targets[row, place] = np.where(document.learned, document.targets, -1)
    block.positions[row, place] = np.arange(len(document))
    block.segments[row, place] = segment
