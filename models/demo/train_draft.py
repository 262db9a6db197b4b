"""Trains the demo model's draft: a smaller model that guesses what it says next (speculative decoding).

    python -m jax_engine.models.demo.train_draft --steps 1600 --until 1000 --export models/demo/draft

It is distilled: on the training text, each answer's tokens are learned as the demo model would go on there, from the
whole of its distribution. The embedding and `LAYERS` of the demo model are what training starts from.
"""

import argparse
import logging
import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from jax_engine.models.config import ModelConfig
from jax_engine.models.demo import DEMO_DIR
from jax_engine.models.demo.generator import training_samples
from jax_engine.models.demo.packing import Packer, RowShape
from jax_engine.models.demo.train import Recipe, make_optimizer
from jax_engine.models.demo.train_adapters import load_checkpoint
from jax_engine.models.demo.trainee import Parameters, Rows, Trainee, as_rows, export, hf_config

logger = logging.getLogger("demo.train_draft")

LAYERS = (0, 4)  # of the demo model, that those of the draft begin as


def draft_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config.json` of the draft, from the demo model's."""
    return config | {"num_hidden_layers": len(LAYERS), "torch_dtype": "float16"}


def first_parameters(trainee: Trainee, teacher: Parameters) -> Parameters:
    """The demo model's embedding, last norm and `LAYERS`."""

    def source(name: str) -> str:
        return re.sub(r"layers\.(\d+)", lambda match: f"layers.{LAYERS[int(match[1])]}", name)

    return {name: teacher[source(name)] for name in trainee.initial}


def distil(
    student: Trainee, parameters: Parameters, teacher: Trainee, frozen: Parameters, batch: Sequence[Rows], dtype: str
) -> tuple[jax.Array, jax.Array]:
    """The mean divergence of the student's distribution from the teacher's, and the share of places where both have
    the same likeliest token. Forward passes run in `dtype`, losses in float32.
    """
    ours = {name: value.astype(dtype) for name, value in parameters.items()}
    theirs = {name: value.astype(dtype) for name, value in frozen.items()}
    total = count = agreed = jnp.float32(0)
    for rows in batch:
        chosen, valid = jnp.asarray(rows["chosen"]), jnp.asarray(rows["wanted"]) >= 0
        wanted = jax.nn.log_softmax(teacher.logits(theirs, rows, chosen))
        guessed = jax.nn.log_softmax(student.logits(ours, rows, chosen))
        total += jnp.sum(jnp.sum(jnp.exp(wanted) * (wanted - guessed), axis=-1) * valid)
        agreed += jnp.sum((jnp.argmax(guessed, -1) == jnp.argmax(wanted, -1)) & valid)
        count += jnp.sum(valid)
    return total / count, agreed / count


def train(recipe: Recipe, *, folder: Path | None) -> Parameters:
    """The draft's parameters after a recipe, which are written to `folder`, too. Logs loss and speed."""
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))
    config = hf_config(tokenizer)
    teacher, frozen = load_checkpoint(ModelConfig.from_hf(config), DEMO_DIR)
    student = Trainee(ModelConfig.from_hf(draft_config(config)), seed=recipe.seed)
    parameters = jax.tree.map(jnp.copy, first_parameters(student, frozen))
    optimizer = make_optimizer(recipe)
    state = optimizer.init(parameters)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state, batch):  # type: ignore[no-untyped-def]  # optax has no types
        def loss(parameters):  # type: ignore[no-untyped-def]
            return distil(student, parameters, teacher, frozen, batch, recipe.compute_dtype)

        (value, agreed), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value, agreed

    packer = Packer(training_samples(seed=recipe.seed, tasks=recipe.tasks), tokenizer, recipe.rows)
    started, figures, num_tokens = time.monotonic(), [], 0
    for number in range(1, recipe.until + 1):
        blocks = packer.next_blocks()
        num_tokens += sum(int((block.segments > 0).sum()) for block in blocks)
        parameters, state, value, agreed = step(parameters, state, [as_rows(block) for block in blocks])
        figures.append((float(value), float(agreed)))
        if number % 50 == 0 or number == recipe.until:
            loss, share = np.mean(figures[-100:], axis=0)
            seconds = time.monotonic() - started
            logger.info("step %d loss %.4f agreed %.4f, %d tokens, %.0f s", number, loss, share, num_tokens, seconds)
    if folder is not None:
        export_half(parameters, draft_config(config), folder)
    return parameters


def export_half(parameters: Parameters, config: dict[str, Any], folder: Path) -> None:
    """Write the checkpoint with weights in float16."""
    export(parameters, config, folder)
    path = folder / "model.safetensors"
    tensors = {name: value.astype(np.float16) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it to its owner alone
    (folder / "generation_config.json").unlink()  # the demo model's counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, help="folder to write the checkpoint to")
    parser.add_argument("--steps", type=int, default=1600, help="length of the schedule")
    parser.add_argument("--until", type=int, help="stop after this many steps; default: all of the schedule")
    parser.add_argument("--cooldown-steps", type=int, default=1000, help="let the rate fall over the last steps")
    parser.add_argument(
        "--rows", type=RowShape.parse, nargs="+", default=[RowShape(10, 128), RowShape(2, 256), RowShape(1, 512)]
    )
    parser.add_argument("--rate", type=float, default=0.008)
    parser.add_argument("--embedding-rate", type=float, default=0.001)
    parser.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    recipe = Recipe(
        steps=options.steps,
        warmup_steps=20,
        cooldown_steps=options.cooldown_steps,
        rate=options.rate,
        embedding_rate=options.embedding_rate,
        seed=options.seed,
        rows=tuple(options.rows),
        compute_dtype=options.compute_dtype,
        until=options.steps if options.until is None else options.until,
    )
    train(recipe, folder=options.export)


if __name__ == "__main__":
    main()
