"""The host's side of pooling: which rows a step adds up, and what comes of it for each chunk."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from jax_engine.scheduling.step_plan import NO_FINDINGS, Chunk, ChunkFindings


def asks_pooling(chunk: Chunk) -> bool:
    """Whether a chunk is the last of a pooling request, whose vector is to come to the host."""
    return chunk.num_draws > 0 and chunk.request.asked.pools


def pooled_rows(chunks: Sequence[Chunk], num_sequences: int) -> NDArray[np.int32]:
    """For each sequence of a step over these ordered chunks, the token rows that are added to its slot's vector: the
    first, and the one behind the last; -1 for one that does not pool.
    """
    ranges, first_row = np.full((num_sequences, 2), -1, np.int32), 0
    for index, chunk in enumerate(chunks):
        end = first_row + chunk.length
        controls = chunk.request.asked.controls
        pooling = None if controls is None else controls.pooling
        if pooling == "MEAN":
            ranges[index] = first_row, end
        elif pooling == "CLS" and chunk.start == 0:
            ranges[index] = first_row, first_row + 1
        elif pooling == "LAST" and chunk.num_draws:
            ranges[index] = end - 1, end
        elif pooling is not None:  # nothing is added, and the sum may be asked for
            ranges[index] = end, end
        first_row = end
    return ranges


def with_pooled(
    findings: Sequence[ChunkFindings] | None, pooled: Float[Array, "B D"] | None, chunks: Sequence[Chunk]
) -> list[ChunkFindings] | None:
    """What a step found for its ordered chunks, with the vectors of those that are the last of theirs. Waits for it."""
    if pooled is None:
        return None if findings is None else list(findings)
    vectors = np.asarray(pooled)
    results = [NO_FINDINGS] * len(chunks) if findings is None else list(findings)
    for index, chunk in enumerate(chunks):
        if asks_pooling(chunk):
            controls, vector = chunk.request.asked.controls, vectors[index]
            if controls is not None and controls.pooling == "MEAN":
                vector = vector / np.float32(chunk.request.num_prompt)
            results[index] = ChunkFindings(pooled=vector.astype(np.float32, copy=False).tobytes())
    return results
