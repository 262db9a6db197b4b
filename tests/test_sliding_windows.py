"""Models with sliding windows, alone or mixed with full attention: pages that left a window serve others, and nobody
can tell by the tokens.

Tiny random models of `transformers`, whose `generate` says what is right; contexts are many times a window.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import TINY, core_request, run_requests

from jax_engine.config import EngineConfig
from jax_engine.core.core_client import InProcessCore
from jax_engine.core.messages import Add, CoreRequest
from jax_engine.models.kv_pages import KVPages
from jax_engine.scheduling.scheduler import Scheduler

PAGE = 8
STEPS = {"qwen3": 4}  # tokens that a step may draw
NUM_TOKENS = 60  # that each request is given
IN_TURN = [f"{kind}_attention" for kind in "sliding full sliding full full".split()]
# Of each, the windows of its cache groups.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mistral": ({"sliding_window": 12}, (12,)),
    "qwen2": (
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
        (0, 10),
    ),
    "qwen3": (
        {"num_hidden_layers": 5, "layer_types": IN_TURN, "use_sliding_window": True, "sliding_window": 9},
        (0, 0, 0, 9, 9),
    ),
}
SIZES = {key: value for key, value in TINY.items() if key not in ("architectures", "model_type")}
PROMPTS = [np.random.default_rng(i).integers(0, TINY["vocab_size"], n).tolist() for i, n in enumerate((90, 33, 5, 64))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@functools.cache
def checkpoint(folder: Path, name: str) -> tuple[Path, dict[str, list[int]]]:
    """A model's folder, and the greedy continuation of each prompt by `transformers`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **(SIZES | MODELS[name][0]))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(folder / name)
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, pad_token_id=0
    )
    tokens = {}
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        tokens[f"r{i}"] = out[0, len(prompt) :].tolist()
    return folder / name, tokens


def settings_of(folder: Path, name: str) -> dict[str, Any]:
    """An engine whose steps of at most 8 tokens cut every longer prompt."""
    return {
        "model": str(checkpoint(folder, name)[0]),
        "max_model_len": 160,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "block_size": PAGE,
        "scan_layers": name != "mistral",
        "num_scheduler_steps": STEPS.get(name, 1),
        "compilation_cache_dir": str(folder / "compiled"),
    }


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, InProcessCore]]:
    """A model's name, and an engine over it."""
    core = InProcessCore(EngineConfig(**settings_of(folder, request.param)))
    yield request.param, core
    core.shutdown()


def batch() -> list[CoreRequest]:
    return [core_request(f"r{i}", prompt, NUM_TOKENS) for i, prompt in enumerate(PROMPTS)]


def scheduler_of(core: InProcessCore) -> Scheduler:
    return core._core.scheduler


def test_tokens_are_those_of_transformers(folder: Path, model: tuple[str, InProcessCore]) -> None:
    """In chunks and together, then once more from what the cache kept."""
    name, core = model
    _, expected = checkpoint(folder, name)
    assert core.reset_prefix_cache()
    assert scheduler_of(core).limits.windows == MODELS[name][1]
    assert run_requests(core, batch()) == expected
    before = core.stats()
    assert run_requests(core, batch()) == expected
    after = core.stats()
    hits = after.prefix_cache_hits_total - before.prefix_cache_hits_total
    assert hits == sum((len(prompt) - 1) // PAGE * PAGE for prompt in PROMPTS)
    assert (after.num_pages_in_use, after.num_tokens_in_pages) == (0, 0)


def test_a_window_bounds_the_pages_of_a_long_sequence(model: tuple[str, InProcessCore]) -> None:
    """Of 90 tokens and 60 more: all 19 pages where a layer sees all, else those that a window straddles."""
    name, core = model
    windows = MODELS[name][1]
    core.send(Add(batch()[:1]))
    most = wasted = 0
    while core.has_work():
        core.step()
        stats = core.stats()
        if stats.num_pages_in_use and scheduler_of(core).running[0].num_computed > len(PROMPTS[0]) + 1:
            most = max(most, stats.num_pages_in_use)
            wasted = max(wasted, stats.num_pages_in_use * PAGE - stats.num_tokens_in_pages)
    # Of tokens on their way, those of the step before and of its own, nobody knows yet that they have left a window.
    on_their_way = 2 * (STEPS.get(name, 1) - 1)
    assert most <= sum((window + on_their_way - 2) // PAGE + 2 if window else 19 for window in windows)
    assert most > 19 * windows.count(0)
    # Of a full layer's last page, and of a window's first and last.
    assert 0 < wasted <= sum((1 + (window > 0)) * (PAGE - 1) for window in windows)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_pages_given_up_are_read_by_nobody(folder: Path, name: str) -> None:
    """With no more pages than the longest sequence holds, requests give way; between steps, all pages that nobody holds
    are filled with NaN.
    """
    settings = settings_of(folder, name) | {"enable_prefix_caching": False}
    least_bytes = r"room for 0 tokens; .* or set kv_cache_memory_bytes to at least (\d+)"
    with pytest.raises(ValueError, match=least_bytes) as told:
        InProcessCore(EngineConfig(**settings, kv_cache_memory_bytes=1))
    least = int(str(told.value).rsplit(" ", 1)[1])
    core = InProcessCore(EngineConfig(**settings, kv_cache_memory_bytes=least))
    tokens: dict[str, list[int]] = {f"r{i}": [] for i in range(len(PROMPTS))}
    core.send(Add(batch()))
    while core.has_work():
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
        pool, runner = scheduler_of(core).cache.pool, core._core.runner
        unused = np.asarray([pool.num_users(page) == 0 for page in range(pool.num_pages)])
        cache = jnp.where(unused[None, :, None, None, None, None], jnp.nan, runner.devices.state.cache.data)
        runner.devices.state = replace(runner.devices.state, cache=KVPages(cache))
    assert tokens == checkpoint(folder, name)[1]
    assert core.stats().preemptions_total > 0
    core.shutdown()
