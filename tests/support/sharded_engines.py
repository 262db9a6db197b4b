"""Engines whose model is spread over devices, and what they answer: a table of cases, each equal to one device.

`report` runs in a child process over eight devices that the CPU pretends to be, and prints what `test_sharded_answers`
compares. A strategy is covered by a row of `CASES`: every case runs all kinds of steps.
"""

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from adapters import write_adapter
from plans import Oracle, Untimed
from tiny_engine import TINY, TINY_MIXTURE, core_request, run_requests

from jax_engine.compilation import planner
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.lora_request import LoRARequest
from jax_engine.models.adapters import ADAPTED_MODULES

# Two key and value heads: over four and eight devices, several hold the same one.
HF = TINY | {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 104}
MIXTURE = TINY_MIXTURE | {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 104}
SIZES = 8, 8  # sequences and rows of a step
NUM_DRAFTS = 3  # of a draft model
MODELS: dict[str, dict[str, Any]] = {
    "plain": HF,
    "uneven": HF | {"vocab_size": 101, "tie_word_embeddings": True, "num_attention_heads": 6},
    "windows": HF
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 10,
        "max_window_layers": 1,
    },
    # Three periods and a half: four stages have one each, the last one's half of zeros.
    "windows in turn": HF
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 7,
        "use_sliding_window": True,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
    },
    "mixture": MIXTURE,
    "int8": HF,
    "fp8": HF,
}
# What an engine has on one device too.
ALWAYS: dict[str, dict[str, Any]] = {name: {"quantization": name} for name in ("int8", "fp8")}


@dataclass(frozen=True)
class Case:
    """A model under settings that spread it over devices; it must answer as its model does on one device."""

    name: str
    settings: dict[str, Any]
    model: str = "plain"
    counters: tuple[str, ...] = field(default=("prefix_cache_hits_total", "spec_draft_tokens_total"))  # above 0
    drafts_itself: bool = False  # as a draft model of its own, not from what is known
    is_slow: bool = False  # left to `-m slow`: what others show together


def tensor(size: int, **settings: Any) -> dict[str, Any]:
    return {"tensor_parallel_size": size, "scan_layers": True} | settings


def by(strategy: str, size: int, **settings: Any) -> dict[str, Any]:
    return tensor(size, sharding_strategy=strategy, **settings)


def few_pages(page_bytes: int) -> dict[str, Any]:
    """Nine pages on each of four devices, and a hundred of all four parts in host memory."""
    return {
        "kv_cache_memory_bytes": 9 * page_bytes,
        "kv_offloading_size": 100 * 4 * page_bytes / 2**30,
        "kv_offloading_load": "always",
    }


CASES = (
    Case("tensor_sequence 8", by("tensor_sequence", 8)),
    Case("fully_sharded 8", by("fully_sharded", 8)),
    Case("tensor_2d 8", by("tensor_2d", 8)),
    Case("context 8", by("context", 8)),
    Case(
        "context 2 of tensor 2, windows", by("context", 4, mesh_shape={"data": 2, "tensor": 2}), "windows", is_slow=True
    ),
    Case("context 4, a draft model", by("context", 4), drafts_itself=True, is_slow=True),
    Case("data_attention 4, a draft model", by("data_attention", 4), drafts_itself=True, is_slow=True),
    Case("data_attention 8", by("data_attention", 8), is_slow=True),
    Case(
        "data_attention 2 of tensor 2, windows",
        by("data_attention", 4, mesh_shape={"data": 2, "tensor": 2}),
        "windows",
    ),
    Case("rules of one's own 8", tensor(8, sharding_rules=str(Path(__file__).parent / "hybrid.toml"))),
    Case("tensor 2, unrolled", tensor(2, scan_layers=False)),
    Case("tensor 8", tensor(8)),
    Case("tensor 4, uneven heads and vocabulary, tied", tensor(4), "uneven"),
    Case("expert 8", tensor(8, enable_expert_parallel=True), "mixture"),
    Case("fully_sharded 8, mixture", by("fully_sharded", 8), "mixture", is_slow=True),
    Case(
        "context 2 of tensor 2, mixture", by("context", 4, mesh_shape={"data": 2, "tensor": 2}), "mixture", is_slow=True
    ),
    Case(
        "expert 2, tensor 2, stage 2",
        by("expert", 4, pipeline_parallel_size=2, mesh_shape={"stage": 2, "expert": 2, "tensor": 2}),
        "mixture",
        is_slow=True,
    ),
    Case("tensor 2, windows", tensor(2), "windows", is_slow=True),
    Case("4 stages of tensor 2, windows in turn", tensor(2, pipeline_parallel_size=4), "windows in turn"),
    Case("2 stages of tensor 4, int8", tensor(4, pipeline_parallel_size=2), "int8", is_slow=True),
    Case("fully_sharded 8, int8", by("fully_sharded", 8), "int8", is_slow=True),
    Case("tensor_2d 8, fp8", by("tensor_2d", 8), "fp8", is_slow=True),
    Case("tensor 2, unrolled, fp8", tensor(2, scan_layers=False), "fp8", is_slow=True),
    # Pages of two layers and one head, or of one layer and one head.
    Case("tensor 4, pages in host memory", tensor(4, **few_pages(1024)), counters=("loaded_pages_total",)),
    # Of two layers and two heads: three pages for each of four stripes, nine for each of two owners.
    Case(
        "context 4, pages in host memory",
        by("context", 4, **few_pages(2048) | {"kv_cache_memory_bytes": 3 * 2048}),
        counters=("loaded_pages_total",),
        is_slow=True,
    ),
    Case(
        "data_attention 2, pages in host memory",
        by("data_attention", 2, **few_pages(2048)),
        counters=("loaded_pages_total",),
        is_slow=True,
    ),
    Case(
        "2 stages of tensor 2, pages in host memory",
        tensor(2, pipeline_parallel_size=2, **few_pages(512)),
        counters=("loaded_pages_total",),
        is_slow=True,
    ),
)


def answers(
    folder: Path,
    known: dict[str, list[int]],
    counters: tuple[str, ...] = (),
    *,
    drafts_itself: bool = False,
    **settings: Any,
) -> dict[str, list[int]]:
    """What requests of all kinds are given: greedy and seeded, with an adapter and without, and, in a second round,
    behind a prefix that the pages hold. Drafts are of the answers that are `known`, some of them wrong.

    Prompts are longer than a step, so that chunks of some share steps with decodes of others.
    """
    drafted: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 7}
    if drafts_itself:
        drafted = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": NUM_DRAFTS}
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        compilation_cache_dir="",
        max_num_seqs=SIZES[0],
        max_num_batched_tokens=SIZES[1],
        block_size=8,
        max_model_len=64,
        enable_lora=True,
        max_loras=1,
        max_lora_rank=4,
        speculative_config=drafted,
        **settings,
    )
    core = InProcessCore(config)
    while known and not core._core.runner.compiled.can_draft(full=False):
        time.sleep(0.05)
    drafts = core._core.scheduler.drafts
    assert drafts is not None
    drafts.times = Untimed((), ())
    if not drafts_itself:
        drafts.proposer = Oracle(core, known, 0.7, Random(0))
    lora = LoRARequest("adapter", 1, str(folder / "adapter"))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 100, size).tolist() for size in (1, 9, 20, 17)]
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "top_k": 20}
    tokens: dict[str, list[int]] = {}
    for turn, suffix in enumerate(([], [3, 1])):
        requests = []
        for index, prompt in enumerate(prompts):
            of = f"{turn} {index}"
            adapter = lora if index % 2 else None
            requests.append(core_request(f"{of} greedy", prompt + suffix, 10, lora=adapter))
            requests.append(core_request(f"{of} seeded", prompt + suffix, 10, prng_key=(index, 3), **drawn))
        tokens |= run_requests(core, requests)
    stats = core.stats()
    missed = [name for name in counters if not getattr(stats, name)]
    assert not missed, f"{missed} are zero: the case does not show what it is for"
    core.shutdown()
    return tokens


def write_model(folder: Path, hf: dict[str, Any]) -> Path:
    """A model folder without weights, and an adapter."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    targets = ADAPTED_MODULES[:4] if "num_experts" in hf else ADAPTED_MODULES  # of attention alone, beside experts
    write_adapter(folder / "adapter", rank=4, seed=1, targets=targets, hf=hf)
    return folder


def report(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """The answers of the cases of these names, and those of their models on one device."""
    # Steps of one size beside that of a single token: compiling is most of the time.
    few, planner.MAX_FULL_PROGRAMS = 4, 4
    planner.MAX_PROGRAMS = few
    chosen = [case for case in CASES if case.name in names]
    folders = {name: write_model(folder / name, MODELS[name]) for name in {case.model for case in chosen}}
    found = {name: answers(path, {}, scan_layers=True, **ALWAYS.get(name, {})) for name, path in folders.items()}
    for case in chosen:
        of_draft_model = len(planner.draft_model_programs(*SIZES, NUM_DRAFTS)) if case.drafts_itself else 0
        planner.MAX_PROGRAMS = few + of_draft_model
        found[case.name] = answers(
            folders[case.model],
            found[case.model],
            case.counters,
            drafts_itself=case.drafts_itself,
            **case.settings,
            **ALWAYS.get(case.model, {}),
        )
    return found
