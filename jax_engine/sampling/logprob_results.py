"""A step's log-probabilities as the host gets them: arrays of rows, turned into what each request asked for."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jax_engine.core.messages import TokenLogprobs
from jax_engine.sampling.full_sampling import Drawn, ForwardResults
from jax_engine.sampling.logprobs import RowLogprobs
from jax_engine.sampling.pooling_results import asks_pooling
from jax_engine.scheduling.step_plan import NO_FINDINGS, Chunk, ChunkFindings


def asks_logprobs(chunk: Chunk) -> bool:
    """Whether log-probabilities of what a chunk draws are to be found."""
    controls = chunk.request.asked.controls
    return controls is not None and controls.num_logprobs is not None and chunk.num_draws > 0


def asked_of_forward(results: ForwardResults, chunks: Sequence[Chunk]) -> ForwardResults:
    """A step's results without those that none of its chunks asks for: what has to come to the host."""
    if all(chunk.request.asked.controls is None for chunk in chunks):
        return ForwardResults(None, None)
    return ForwardResults(
        results.prompt if any(chunk.scored for chunk in chunks) else None,
        results.pooled if any(map(asks_pooling, chunks)) else None,
    )


def asked_of_draw(drawn: Drawn, chunks: Sequence[Chunk]) -> Drawn:
    """The same of what it drew."""
    return Drawn(drawn.tokens, drawn.logprobs if any(map(asks_logprobs, chunks)) else None)


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
    of_drawn: RowLogprobs | None,
    of_prompt_rows: RowLogprobs | None,
    chunks: Sequence[Chunk],
    tokens: Sequence[Sequence[int]],
    *,
    by_draws: bool,
) -> list[ChunkFindings] | None:
    """What a step found for each of its ordered chunks, which drew these tokens; None if nobody asked. Waits for it.
    `by_draws`: each chunk has a row for each of its draws, as in programs that draw behind drafts, and not just one.
    """
    if of_drawn is None and of_prompt_rows is None:
        return None
    drawn = None if of_drawn is None else _Rows(of_drawn)
    prompt = None if of_prompt_rows is None else _Rows(of_prompt_rows)
    results, first_row, next_row = [NO_FINDINGS] * len(chunks), 0, 0
    for index, chunk in enumerate(chunks):
        row = next_row if by_draws else index
        next_row += chunk.num_draws
        controls, scored = chunk.request.asked.controls, chunk.scored
        if controls is not None and (scored or asks_logprobs(chunk)):
            of_tokens, of_prompt = None, None
            if drawn is not None and controls.num_logprobs is not None and chunk.num_draws:
                of_tokens = drawn.read(row, tokens[index], controls.num_logprobs)
            if prompt is not None and controls.num_prompt_logprobs is not None and scored:
                start = first_row + scored.start - 1 - chunk.start
                own = chunk.request.tokens[scored.start : scored.stop]
                of_prompt = prompt.read(start, own, controls.num_prompt_logprobs)
            results[index] = ChunkFindings(of_tokens, of_prompt)
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
