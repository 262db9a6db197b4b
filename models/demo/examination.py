"""Grades during training: how many held-out answers the model would give in every token, without decoding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jax_engine.models.demo.generator import TASKS, held_out_samples
from jax_engine.models.demo.packing import Document, tokenize
from jax_engine.models.demo.trainee import Parameters, Rows, Trainee

NUM_ROWS = 32
"""Samples examined at once, one a row."""


class Examination:
    """Held-out samples of every task, each token of an answer guessed after the reference tokens before it.

    Stricter than `benchmarks/accuracy.py`, since the reasoning must match too; stories, which have no single right
    text, are left out.
    """

    def __init__(self, trainee: Trainee, tokenizer: Tokenizer, *, count: int, lengths: tuple[int, ...], seed: int):
        self._guesses = jax.jit(lambda parameters, rows: _guess_everywhere(trainee, parameters, rows))
        groups: dict[int, list[tuple[str, Document]]] = {length: [] for length in lengths}
        self.tasks = [task for task in TASKS if task.name != "stories"]
        for task in self.tasks:
            for sample in held_out_samples(task, seed=seed, count=count):
                document = tokenize(tokenizer, sample)
                groups[min(length for length in lengths if len(document) <= length)].append((task.name, document))
        self._batches = [
            ([name for name, _ in members[start : start + NUM_ROWS]], _rows(members[start : start + NUM_ROWS], length))
            for length, members in groups.items()
            for start in range(0, len(members), NUM_ROWS)
        ]

    def grades(self, parameters: Parameters) -> dict[str, float]:
        """Percentage of entirely right answers by task."""
        results: dict[str, list[bool]] = {task.name: [] for task in self.tasks}
        for names, rows in self._batches:
            guesses, targets = np.asarray(self._guesses(parameters, rows)), rows["targets"]
            right = np.all((guesses == targets) | (targets < 0), axis=1)
            for row, name in enumerate(names):
                results[name].append(bool(right[row]))
        return {name: 100 * float(np.mean(answers)) for name, answers in results.items()}


def _rows(members: list[tuple[str, Document]], length: int) -> Rows:
    ids: np.ndarray[Any, Any] = np.zeros((NUM_ROWS, length), np.int32)
    targets = np.full_like(ids, -1)
    for row, (_, document) in enumerate(members):
        ids[row, : len(document)] = document.ids
        targets[row, : len(document)] = np.where(document.learned, document.targets, -1)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return {"ids": ids, "targets": targets, "positions": positions, "segments": np.ones_like(ids)}


def _guess_everywhere(trainee: Trainee, parameters: Parameters, rows: Rows) -> jax.Array:
    places = jnp.arange(rows["ids"].size)
    return jnp.argmax(trainee.logits(parameters, rows, places), axis=-1).reshape(rows["ids"].shape)
