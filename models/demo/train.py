"""Trains the demo checkpoint from scratch and exports it in Hugging Face's layout.

    python -m jax_engine.models.demo.train --work-dir DIR --tokenizer DIR --steps N --cooldown-steps M --export DIR

Runs on CPU and resumes from what the work folder holds. Muon (Jordan et al., 2024) for the matrices, AdamW for the
embedding and the norms; warm-up, a constant rate, then a linear fall to zero whose start need not be known beforehand
(arXiv 2405.18392).
"""

import argparse
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from safetensors import safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jax_engine.models.config import ModelConfig
from jax_engine.models.demo.examination import Examination
from jax_engine.models.demo.generator import TASKS, Task, boosted, training_samples
from jax_engine.models.demo.packing import Packer, RowShape
from jax_engine.models.demo.trainee import Parameters, Rows, Trainee, as_rows, export, hf_config

logger = logging.getLogger("demo.train")

STEPS_A_CHAPTER = 100
"""The training text starts afresh, with its own seed, this often, so that a run can resume without replaying it."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the result besides the code; `rate` is Muon's, `embedding_rate` is AdamW's.

    The schedule covers `steps` steps; the run ends after `until` of them, which leaves the rest to another recipe.
    """

    steps: int
    warmup_steps: int
    cooldown_steps: int
    rate: float
    embedding_rate: float
    seed: int
    rows: tuple[RowShape, ...]
    compute_dtype: str
    until: int
    tasks: tuple[Task, ...] = TASKS


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Gradients clipped to norm 1, then Muon and AdamW on one schedule."""

    def schedule(peak: float) -> optax.Schedule:
        falling = optax.linear_schedule(peak, 0.0, max(recipe.cooldown_steps, 1))
        rising = optax.linear_schedule(0.0, peak, max(recipe.warmup_steps, 1))
        return optax.join_schedules(
            [rising, optax.constant_schedule(peak), falling],
            [recipe.warmup_steps, recipe.steps - recipe.cooldown_steps],
        )

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            schedule(recipe.rate),
            weight_decay=0.01,
            adam_learning_rate=schedule(recipe.embedding_rate),
            adam_b2=0.98,
            muon_weight_dimension_numbers=matrix_dimensions,
        ),
    )


def matrix_dimensions(parameters: Parameters) -> dict[str, MuonDimensionNumbers | None]:
    """Which dimensions of a weight are its input and its output; None for what AdamW trains."""

    def of(name: str) -> MuonDimensionNumbers | None:
        if name.endswith("o_proj.weight"):
            return MuonDimensionNumbers((0, 1), (2,))
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            return MuonDimensionNumbers((0,), (1, 2))
        return MuonDimensionNumbers((0,), (1,)) if ".mlp." in name else None

    return {name: of(name) for name in parameters}


@dataclass
class Progress:
    """What a run has reached; owned and changed by `train`."""

    step: int
    parameters: Parameters
    optimizer_state: optax.OptState

    def save(self, folder: Path) -> None:
        """Write everything that resuming needs; a write that breaks off leaves the old file."""
        tensors = {f"parameters.{name}": np.asarray(value) for name, value in self.parameters.items()}
        for index, leaf in enumerate(jax.tree.leaves(self.optimizer_state)):
            tensors[f"optimizer.{index}"] = np.asarray(leaf)
        unfinished = folder / "progress.unfinished"
        save_file(tensors, unfinished, metadata={"step": str(self.step)})
        unfinished.rename(folder / "progress.safetensors")

    def restore(self, folder: Path) -> None:
        """Take over what was saved; nothing where nothing was."""
        path = folder / "progress.safetensors"
        if not path.exists():
            return
        old_leaves, structure = jax.tree.flatten(self.optimizer_state)
        with safe_open(path, framework="numpy") as file:
            self.step = int(file.metadata()["step"])
            self.parameters = {name: jnp.asarray(file.get_tensor(f"parameters.{name}")) for name in self.parameters}
            leaves = [jnp.asarray(file.get_tensor(f"optimizer.{index}")) for index in range(len(old_leaves))]
        self.optimizer_state = jax.tree.unflatten(structure, leaves)


Step = Callable[[Parameters, optax.OptState, Sequence[Rows]], tuple[Parameters, optax.OptState, jax.Array, jax.Array]]


def make_step(trainee: Trainee, optimizer: optax.GradientTransformation, dtype: str) -> Step:
    """One compiled update, which donates its first two arguments; also gives loss and share of right first guesses."""

    def step(
        parameters: Parameters, state: optax.OptState, batch: Sequence[Rows]
    ) -> tuple[Parameters, optax.OptState, jax.Array, jax.Array]:
        (loss, right), gradients = jax.value_and_grad(trainee.loss, has_aux=True)(parameters, batch, dtype)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, right

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    recipe: Recipe, config: dict[str, Any], tokenizer: Tokenizer, folder: Path, *, examine_every: int
) -> Parameters:
    """Run `recipe` to its end, from where `folder` left off; returns the parameters. Logs loss, speed and grades."""
    trainee = Trainee(ModelConfig.from_hf(config), seed=recipe.seed)
    optimizer = make_optimizer(recipe)
    progress = Progress(0, trainee.initial, optimizer.init(trainee.initial))
    progress.restore(folder)
    step = make_step(trainee, optimizer, recipe.compute_dtype)
    examination = Examination(trainee, tokenizer, count=24, lengths=(128, 512), seed=recipe.seed)
    num_parameters = sum(value.size for value in trainee.initial.values())
    logger.info("%d parameters, from step %d to %d", num_parameters, progress.step, recipe.until)
    while progress.step < recipe.until:
        run_chapter(recipe, tokenizer, progress, step)
        progress.save(folder)
        if progress.step % examine_every == 0 or progress.step == recipe.until:
            grades = examination.grades(progress.parameters)
            listed = ", ".join(f"{task} {grade:.0f}" for task, grade in grades.items())
            logger.info("step %d grades %.1f: %s", progress.step, np.mean(list(grades.values())), listed)
    return progress.parameters


def run_chapter(recipe: Recipe, tokenizer: Tokenizer, progress: Progress, step: Step) -> None:
    """Train up to the next multiple of `STEPS_A_CHAPTER` steps, or the last one."""
    started, num_tokens, losses, guesses = time.monotonic(), 0, [], []
    chapter, steps_done = divmod(progress.step, STEPS_A_CHAPTER)
    seed = recipe.seed * 100_000 + chapter * STEPS_A_CHAPTER
    packer = Packer(training_samples(seed=seed, tasks=recipe.tasks), tokenizer, recipe.rows)
    for _ in range(min(STEPS_A_CHAPTER - steps_done, recipe.until - progress.step)):
        blocks = packer.next_blocks()
        num_tokens += sum(int((block.segments > 0).sum()) for block in blocks)
        progress.parameters, progress.optimizer_state, loss, right = step(
            progress.parameters, progress.optimizer_state, [as_rows(block) for block in blocks]
        )
        losses.append(float(loss))
        guesses.append(float(right))
        progress.step += 1
    speed = num_tokens / (time.monotonic() - started)
    logger.info("step %d loss %.4f right %.4f, %.0f tokens/s", progress.step, np.mean(losses), np.mean(guesses), speed)


def parse_boost(text: str) -> tuple[Task, ...]:
    """Read `comparison=2,sorting=1.5`."""
    pairs = (part.split("=") for part in text.split(","))
    return boosted({name: float(factor) for name, factor in pairs})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for what resuming needs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--export", type=Path, help="folder to write the checkpoint to at the end")
    parser.add_argument("--steps", type=int, required=True, help="length of the schedule")
    parser.add_argument("--until", type=int, help="stop after this many steps; default: all of the schedule")
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--cooldown-steps", type=int, default=0, help="let the rate fall over the last steps")
    parser.add_argument(
        "--rows",
        type=RowShape.parse,
        nargs="+",
        default=[RowShape(20, 128), RowShape(3, 256), RowShape(2, 416)],
        help="rows of a batch and their length in tokens, shortest first, such as 20x128 3x256",
    )
    parser.add_argument(
        "--boost", type=parse_boost, default=TASKS, help="multiply tasks' shares, such as 'comparison=2,sorting=1.5'"
    )
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--embedding-rate", type=float, default=0.004)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--examine-every", type=int, default=200, help="steps from one grading to the next")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    config = hf_config(tokenizer)
    recipe = Recipe(
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        cooldown_steps=options.cooldown_steps,
        rate=options.rate,
        embedding_rate=options.embedding_rate,
        seed=options.seed,
        rows=tuple(options.rows),
        compute_dtype=options.compute_dtype,
        until=options.steps if options.until is None else options.until,
        tasks=options.boost,
    )
    options.work_dir.mkdir(parents=True, exist_ok=True)
    parameters = train(recipe, config, tokenizer, options.work_dir, examine_every=options.examine_every)
    if options.export:
        export(parameters, config, options.export)


if __name__ == "__main__":
    main()
