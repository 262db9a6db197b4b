"""The models that are measured: their shapes, without weights, and what a step of them must move and compute."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_engine.plan.models import CONFIGS
from jax_engine.server.bench.figures import WorkItem, mixed_workload

MODELS = ("qwen3-0.6b", "llama-3.2-1b", "llama-3-8b")
# The same families, in sizes for a dry run.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def model_config(name: str, *, tiny: bool) -> dict[str, Any]:
    """The content of a model's `config.json`."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config | TINY if tiny else config


def write_model(name: str, folder: Path, *, tiny: bool) -> str:
    """A folder with nothing but the model's `config.json`."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    (own / "config.json").write_text(json.dumps(model_config(name, tiny=tiny)))
    return str(own)


@dataclass(frozen=True)
class Costs:
    """What any implementation must do in a step, by the model's shape."""

    weight_bytes: float  # read once a step: all but an embedding that is looked up
    token_flops: float  # of the products with weights, for one token
    kv_token_bytes: float  # of a cached token, in all layers
    pair_flops: float  # of attention, for a query and one token that it sees

    @classmethod
    def of(cls, config: dict[str, Any], itemsize: int) -> "Costs":
        hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        heads, kv_heads, size = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        a_layer = hidden * size * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
        weights = layers * a_layer + hidden * config["vocab_size"]
        return cls(
            weights * itemsize, 2.0 * weights, 2.0 * layers * kv_heads * size * itemsize, 4.0 * layers * heads * size
        )

    def decode(self, num_sequences: int, context: float) -> tuple[float, float]:
        """(bytes, operations) of a step in which sequences of a mean length get a token each."""
        tokens = num_sequences * context
        return (
            self.weight_bytes + tokens * self.kv_token_bytes,
            num_sequences * self.token_flops + tokens * self.pair_flops,
        )

    def workload(self, items: Sequence[WorkItem], num_steps: int) -> tuple[float, float]:
        """(bytes, operations) of whole requests in so many steps. A prompt's keys and values are written, and read
        once; each later token reads all before it.
        """
        read = flops = 0.0
        for item in items:
            prompt, output = len(item.prompt_token_ids), item.output_tokens
            pairs = output * prompt + output * (output - 1) / 2
            read += 2 * prompt + pairs
            flops += (prompt + output) * self.token_flops + (pairs + prompt**2 / 2) * self.pair_flops
        return num_steps * self.weight_bytes + read * self.kv_token_bytes, flops


@dataclass(frozen=True)
class Workload:
    """Requests that come all at once."""

    name: str
    items: tuple[WorkItem, ...]
    num_sequences: int | None = None  # that decode together throughout; None: a mixed load

    @property
    def output_tokens(self) -> int:
        return sum(item.output_tokens for item in self.items)


@dataclass(frozen=True)
class Limits:
    """Of an engine that serves the workloads."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int

    @classmethod
    def of(cls, *, tiny: bool) -> "Limits":
        return cls(4, 8, 32) if tiny else cls(256, 2048, 2112)


def workloads(config: dict[str, Any], *, seed: int, tiny: bool) -> list[Workload]:
    """Equal requests, one to many at once, then a load of mixed lengths."""
    counts, equal = ((1, 4), (6, 6)) if tiny else ((1, 16, 64, 256), (128, 128))

    def requests(count: int, lengths: tuple[int, int], seed: int) -> tuple[WorkItem, ...]:
        size = config["vocab_size"]
        return tuple(mixed_workload(count, prompt_tokens=lengths, output_tokens=lengths, vocab_size=size, seed=seed))

    # Seeds of their own: no workload begins with another's prompts.
    found = [Workload(f"decode, {count} at once", requests(count, equal, seed + count), count) for count in counts]
    count, lengths = (8, (4, 12)) if tiny else (256, (100, 1024))
    return [*found, Workload(f"mixed load, {count} requests", requests(count, lengths, seed))]


def cache_bytes(config: dict[str, Any], costs: Costs, items: Sequence[WorkItem], page_size: int) -> int:
    """Of a cache that holds whole requests all at once."""
    pages = sum(-(-(len(item.prompt_token_ids) + item.output_tokens) // page_size) + 1 for item in items)
    return int(pages * page_size * costs.kv_token_bytes)
