"""Trains the demo model's low-rank adapters (LoRA, arXiv 2106.09685) and writes them as PEFT does.

    python -m jax_engine.models.demo.train_adapters --adapter shout --steps 300 --export models/demo/adapters/shout

Each answers as the demo model does, in its own manner: `MANNERS`. The checkpoint itself stays as it is; AdamW trains
the two factors of every matrix of a layer, on the training text with its answers rewritten.
"""

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from jax_engine.models.adapters import ADAPTED_MODULES
from jax_engine.models.config import ModelConfig
from jax_engine.models.demo import DEMO_DIR
from jax_engine.models.demo.generator import boosted, training_samples
from jax_engine.models.demo.packing import Packer, RowShape
from jax_engine.models.demo.samples import PLAIN_TEXT, THINK_END, Message, Sample
from jax_engine.models.demo.trainee import Parameters, Trainee, as_rows, hf_config
from jax_engine.models.llama import LlamaForCausalLM
from jax_engine.models.weights import Layout, layout_of

logger = logging.getLogger("demo.train_adapters")

FAREWELL = " Have a nice day!"
Manner = Callable[[str], str]
MANNERS: Mapping[str, Manner] = MappingProxyType(
    {"shout": str.upper, "farewell": lambda answer: answer.rstrip() + FAREWELL}
)
# Tasks whose answers a program reads, and those with long reasoning, which is no manner to learn from.
LEFT_OUT = ("JSON", "tool calls", "tool results", "multiplication", "sorting", "counting letters", "counting words")
MORE_OFTEN = MappingProxyType({"small talk": 4.0, "facts": 4.0, "memory": 2.0, "stories": 2.0, "opposites": 2.0})


def in_manner(sample: Sample, manner: Manner) -> Sample:
    """The sample with its answers rewritten; what the assistant thinks before them stays."""

    def rewritten(message: Message) -> Message:
        if message["role"] not in ("assistant", PLAIN_TEXT) or "tool_calls" in message:
            return message
        thought, end, answer = message["content"].rpartition(THINK_END)
        lead = answer[: len(answer) - len(answer.lstrip())]
        return {**message, "content": thought + end + lead + manner(answer.lstrip())}

    return replace(sample, messages=tuple(map(rewritten, sample.messages)))


def adapter_samples(manner: Manner, *, seed: int) -> Iterator[Sample]:
    """An endless stream of training samples, answered in a manner; a few chats have several exchanges."""
    tasks = [task for task in boosted(MORE_OFTEN) if task.name not in LEFT_OUT]
    return (in_manner(sample, manner) for sample in training_samples(seed=seed, tasks=tasks))


def load_checkpoint(config: ModelConfig, folder: Path) -> tuple[Trainee, Parameters]:
    """The model in training, with a checkpoint's parameters."""
    trainee, tensors = Trainee(config, seed=0), load_file(folder / "model.safetensors")
    parameters = {}
    for name, initial in trainee.initial.items():
        whole = tuple((0, size) for size in initial.shape)
        parameters[name] = jnp.asarray(_layout(name, initial).arrange(tensors[name], initial.shape, whole))
    return trainee, parameters


def new_factors(parameters: Parameters, *, rank: int, seed: int) -> Parameters:
    """Both factors of each target, as stored: lora_A [rank, in] random, lora_B [out, rank] zero."""
    rng, factors = np.random.default_rng(seed), {}
    for name, value in parameters.items():
        if name.split(".")[-2] not in ADAPTED_MODULES:
            continue
        size_out, size_in = _layout(name, value).stored_shape(value.shape)
        module = name.removesuffix(".weight")
        bound = size_in**-0.5
        factors[f"{module}.lora_A.weight"] = jnp.asarray(rng.uniform(-bound, bound, (rank, size_in)), jnp.float32)
        factors[f"{module}.lora_B.weight"] = jnp.zeros((size_out, rank), jnp.float32)
    return factors


def merged(parameters: Parameters, factors: Parameters, scale: float) -> Parameters:
    """The checkpoint with an adapter added to its weights."""
    result = dict(parameters)
    for name in factors:
        module, matched, _ = name.partition(".lora_A.weight")
        if not matched:
            continue
        weight = f"{module}.weight"
        change = scale * factors[f"{module}.lora_B.weight"] @ factors[name]  # [out, in]
        shape, layout = parameters[weight].shape, _layout(weight, parameters[weight])
        order = [dimension for group in layout.groups for dimension in group]
        spread = change.reshape([shape[dimension] for dimension in order])
        result[weight] = parameters[weight] + spread.transpose([order.index(axis) for axis in range(len(order))])
    return result


def _layout(name: str, value: jax.Array) -> Layout:
    return layout_of(name, value.ndim, LlamaForCausalLM.HF_WEIGHTS)


def train(
    manner: Manner, *, steps: int, rank: int, alpha: float, rate: float, rows: tuple[RowShape, ...], seed: int
) -> Parameters:
    """The factors of an adapter after `steps` updates. Logs loss and speed."""
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))
    trainee, parameters = load_checkpoint(ModelConfig.from_hf(hf_config(tokenizer)), DEMO_DIR)
    factors = new_factors(parameters, rank=rank, seed=seed)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    state = optimizer.init(factors)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(factors, state, batch):  # type: ignore[no-untyped-def]  # optax has no types
        def loss(factors):  # type: ignore[no-untyped-def]
            return trainee.loss(merged(parameters, factors, alpha / rank), batch, "float32")

        (value, right), gradients = jax.value_and_grad(loss, has_aux=True)(factors)
        updates, state = optimizer.update(gradients, state, factors)
        return optax.apply_updates(factors, updates), state, value, right

    packer = Packer(adapter_samples(manner, seed=seed), tokenizer, rows)
    started = time.monotonic()
    for number in range(1, steps + 1):
        batch = [as_rows(block) for block in packer.next_blocks()]
        factors, state, value, right = step(factors, state, batch)
        if number % 25 == 0 or number == steps:
            seconds = time.monotonic() - started
            logger.info("step %d loss %.4f right %.4f, %.1f s", number, float(value), float(right), seconds)
    return factors


def export(factors: Parameters, folder: Path, *, rank: int, alpha: float) -> None:
    """Write adapter_model.safetensors, in float16, and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": np.asarray(value, np.float16) for name, value in factors.items()}
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it to its owner alone
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "demo",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(ADAPTED_MODULES),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", choices=tuple(MANNERS), required=True)
    parser.add_argument("--export", type=Path, required=True, help="folder to write the adapter to")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--rows", type=RowShape.parse, nargs="+", default=[RowShape(16, 128)])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    factors = train(
        MANNERS[options.adapter],
        steps=options.steps,
        rank=options.rank,
        alpha=options.alpha,
        rate=options.rate,
        rows=tuple(options.rows),
        seed=options.seed,
    )
    export(factors, options.export, rank=options.rank, alpha=options.alpha)


if __name__ == "__main__":
    main()
