"""`transformers` generate with PyTorch, batched as well as it can be: what the engine is compared with."""

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jax_engine.server.bench.figures import Rates, WorkItem, median_run, workload_rates


@dataclass(frozen=True)
class PeerRun:
    """One workload at one batch size: the repetition of median duration."""

    batch_size: int
    rates: Rates
    answers: tuple[tuple[int, ...], ...]  # in the workload's order, cut to what each request asked for


def load(model: str, *, dtype: str, random_weights: bool) -> Any:
    """The causal language model in evaluation mode, on the GPU where PyTorch has one, else on every core."""
    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if random_weights:
        with torch.device(device):  # drawn there: on the host it would take minutes for a large model
            loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=getattr(torch, dtype))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    # Lengths are the workload's: neither an end-of-sequence token nor a limit of the checkpoint ends an answer.
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.max_length = None
    return loaded.to(device).eval()


def run(model: Any, workload: Sequence[WorkItem], *, batch_size: int, repeats: int) -> PeerRun:
    """Generate the whole workload greedily, batch after batch."""
    seconds, answers = median_run(lambda: generate(model, workload, batch_size), repeats=repeats)
    return PeerRun(batch_size, workload_rates(workload, seconds), answers)


def generate(model: Any, workload: Sequence[WorkItem], batch_size: int) -> tuple[tuple[int, ...], ...]:
    """Greedy answers in the workload's order; batches hold requests of similar length."""
    answers: list[tuple[int, ...]] = [()] * len(workload)
    for batch in batches_by_length(workload, batch_size):
        for index, tokens in zip(batch, generate_batch(model, [workload[i] for i in batch]), strict=True):
            answers[index] = tokens
    return tuple(answers)


def batches_by_length(workload: Sequence[WorkItem], batch_size: int) -> Iterator[list[int]]:
    """Indices into the workload, sorted by answer length first: a step too many costs more than a padded prompt row."""
    order = sorted(
        range(len(workload)), key=lambda i: (workload[i].output_tokens, len(workload[i].prompt_token_ids)), reverse=True
    )
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def generate_batch(model: Any, items: Sequence[WorkItem]) -> list[tuple[int, ...]]:
    """Left-pad the prompts, generate to the longest answer, and cut each answer to its own length."""
    width = max(len(item.prompt_token_ids) for item in items)
    padding = [width - len(item.prompt_token_ids) for item in items]
    ids = torch.tensor([[0] * pad + list(item.prompt_token_ids) for pad, item in zip(padding, items, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    with torch.inference_mode(), warnings.catch_warnings():
        # A checkpoint's sampling settings are announced as unused; greedy decoding is what is asked for.
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            max_new_tokens=max(item.output_tokens for item in items),
            pad_token_id=0,
        )
    new = out[:, width:].tolist()
    return [tuple(tokens[: item.output_tokens]) for tokens, item in zip(new, items, strict=True)]


def folder_of_demo() -> str:
    """The built-in checkpoint as a folder that transformers can read."""
    import jax_engine.models.demo

    return str(Path(jax_engine.models.demo.__file__).parent)
