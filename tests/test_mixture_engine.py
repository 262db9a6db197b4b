"""A mixture of experts in the engine gives the tokens of `transformers`, and of adapters merged into its attention."""

from pathlib import Path

import pytest
import torch
import transformers
from adapters import write_adapter, write_base, write_merged
from tiny_engine import TINY_MIXTURE, core_request, placed_model, run_requests

from jax_engine.adapters.adapter_store import AdapterStore
from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.lora_request import LoRARequest
from jax_engine.models.adapters import AdapterShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROMPTS = [[5, 17, 80, 3, 3, 41, 9], [60, 2, 77], list(range(1, 40)), [9] * 12]
NUM_TOKENS = 8


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_prefill_decode_and_mixed_steps_give_the_tokens_of_transformers(tmp_path):
    """Prompts that are cut and shared with decodes, padded steps, and rows with an adapter beside rows without."""
    base = write_base(tmp_path / "base", TINY_MIXTURE)
    adapter = write_adapter(tmp_path / "adapter", rank=4, seed=1, targets=ATTENTION, hf=TINY_MIXTURE)
    merged = write_merged(tmp_path / "merged", base, adapter)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 8, "max_model_len": 64}
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": 8}
    core = InProcessCore(EngineConfig(model=str(base), compilation_cache_dir="", scan_layers=True, **limits, **lora))
    given = {None: base, LoRARequest("adapter", 1, adapter): merged}
    requests, expected = [], {}
    for index, prompt in enumerate(PROMPTS):
        for asked, folder in given.items():
            name = f"{index} {'base' if asked is None else 'adapter'}"
            requests.append(core_request(name, prompt, NUM_TOKENS, lora=asked))
            expected[name] = greedy(folder, prompt)
    assert expected["0 base"] != expected["0 adapter"]
    assert run_requests(core, requests) == expected
    core.shutdown()


def test_adapters_of_experts_are_refused_by_name(tmp_path):
    path = write_adapter(tmp_path / "adapter", rank=4, seed=1, targets=("gate_proj",), hf=TINY_MIXTURE)
    placed = placed_model(hf=TINY_MIXTURE, adapters=AdapterShape(1, 8))
    with pytest.raises(
        ValueError,
        match=r"layers\.0\.mlp\.experts\.\d\.gate_proj are not supported.* q_proj, k_proj, v_proj, o_proj, of",
    ):
        AdapterStore(placed, max_rank=8, max_adapters=1).load(LoRARequest("adapter", 1, path))
