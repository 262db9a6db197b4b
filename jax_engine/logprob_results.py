"""A step's log-probabilities as the host gets them: arrays of rows, turned into what each request asked for."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jax_engine.logprobs import RowLogprobs
from jax_engine.messages import TokenLogprobs
from jax_engine.step_plan import NO_LOGPROBS, Chunk, ChunkLogprobs


def any_drawn(chunks: Sequence[Chunk]) -> bool:
    """Whether a step is to find log-probabilities of what it draws."""
    return any(chunk.num_draws and num_logprobs(chunk) is not None for chunk in chunks)


def any_scored(chunks: Sequence[Chunk]) -> bool:
    """Whether a step is to find log-probabilities of prompts."""
    return any(chunk.scored for chunk in chunks)


def num_logprobs(chunk: Chunk) -> int | None:
    controls = chunk.request.asked.controls
    return controls.num_logprobs if controls is not None else None


def prompt_targets(chunks: Sequence[Chunk], num_rows: int) -> NDArray[np.int32]:
    """For each token row of a step over these ordered chunks, the token that follows it if its log-probability is to be
    found, or else -1.
    """
    targets = np.full(num_rows, -1, np.int32)
    first_row = 0
    for chunk in chunks:
        if scored := chunk.scored:
            row = first_row + scored.start - 1 - chunk.start  # of the token before the first
            targets[row : row + len(scored)] = chunk.request.tokens[scored.start : scored.stop]
        first_row += chunk.length
    return targets


def read_logprobs(
    chunks: Sequence[Chunk], tokens: Sequence[Sequence[int]], drawn: RowLogprobs | None, prompt: RowLogprobs | None
) -> list[ChunkLogprobs]:
    """What a step found for each of its ordered chunks, which drew these tokens; None where nobody asked. Waits for the
    arrays.
    """
    drawn_rows = None if drawn is None else _Rows(drawn)
    prompt_rows = None if prompt is None else _Rows(prompt)
    results, first_row = [], 0
    for row, chunk in enumerate(chunks):
        results.append(NO_LOGPROBS)
        asked, scored = num_logprobs(chunk), chunk.scored
        found: dict[str, list[TokenLogprobs]] = {}
        if drawn_rows is not None and asked is not None and chunk.num_draws:
            found["drawn"] = drawn_rows.read(row, tokens[row][:1], asked)
        if prompt_rows is not None and scored:
            controls = chunk.request.asked.controls
            assert controls is not None and controls.num_prompt_logprobs is not None
            own = chunk.request.tokens[scored.start : scored.stop]
            start = first_row + scored.start - 1 - chunk.start
            found["prompt"] = prompt_rows.read(start, own, controls.num_prompt_logprobs)
        if found:
            results[-1] = ChunkLogprobs(**found)
        first_row += chunk.length
    return results


class _Rows:
    """The arrays of `RowLogprobs`, on the host."""

    def __init__(self, rows: RowLogprobs) -> None:
        self._own, self._ranks = np.asarray(rows.own), np.asarray(rows.ranks)
        self._top_ids, self._top = np.asarray(rows.top_ids), np.asarray(rows.top)

    def read(self, first_row: int, own: Sequence[int], num_top: int) -> list[TokenLogprobs]:
        """Of rows from `first_row` on, whose own tokens are given, and of `num_top` of the likeliest in each."""
        rows = slice(first_row, first_row + len(own))
        ids = self._top_ids[rows, :num_top].tolist()
        logprobs = self._top[rows, :num_top].tolist()
        zipped = zip(self._ranks[rows].tolist(), own, ids, self._own[rows].tolist(), logprobs, strict=True)
        return [TokenLogprobs(rank, [token, *top], [value, *values]) for rank, token, top, value, values in zipped]
