"""Other engines on the same shapes and the same requests: vLLM, and `transformers` with and without its batching.

Each has its own process, without JAX, and random weights. Only tokens that requests ask for count.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_jobs import Report, Skipped, first_line
from gpu_models import Limits, Workload, model_config, workloads, write_model
from jax_engine.server.bench.figures import WorkItem

PEERS = ("vllm", "transformers continuous", "transformers generate")
WARM_UP_TOKENS = 4
MIXED_BATCH = 64  # sequences at once of a mixed load, where batches are fixed

Generate = Callable[[Sequence[WorkItem]], int]  # runs requests, and returns how many tokens came of them


def measure(report: Report, *, peer: str, model: str, folder: str, seed: int, tiny: bool) -> None:
    """The job: every workload through one peer."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # there may be no network, and nothing is wanted from it
    name = f"{model}, {peer}"
    with report.case(f"{name}, start", section="peers"):
        begin = time.monotonic()
        path = write_model(model, Path(folder), tiny=tiny)
        with STARTS[peer](path, Limits.of(tiny=tiny), tiny) as generate:
            report.add(f"{name}, start", value=time.monotonic() - begin, unit="s, with random weights")
            for load in workloads(model_config(model, tiny=tiny), seed=seed, tiny=tiny):
                with report.case(f"{name}, {load.name}"):
                    measure_load(report, f"{name}, {load.name}", generate, load)


def measure_load(report: Report, name: str, generate: Generate, load: Workload) -> None:
    """Run a workload shortly to warm up, with other prompts, which no cache helps with later; then for the clock."""
    if load.num_sequences is not None:
        generate([WorkItem(item.prompt_token_ids[::-1], WARM_UP_TOKENS) for item in load.items])
    begin = time.perf_counter()
    tokens = generate(load.items)
    seconds = time.perf_counter() - begin
    if tokens != load.output_tokens:
        raise ValueError(f"{tokens} tokens came of {load.output_tokens} that were asked for")
    report.add(name, value=tokens / seconds, unit="tokens/s", figures={"seconds": seconds})


@contextmanager
def start_vllm(path: str, limits: Limits, tiny: bool) -> Iterator[Generate]:
    """vLLM with CUDA graphs, and without the prefix cache, which would skip repeated prompts."""
    if tiny:
        raise Skipped("a dry run leaves vLLM out")
    try:
        from vllm import LLM, SamplingParams
    except ImportError as error:
        raise Skipped(f"vLLM is not installed ({first_line(error)})") from error

    llm = LLM(
        model=path,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enable_prefix_caching=False,
    )

    def generate(items: Sequence[WorkItem]) -> int:
        prompts = [{"prompt_token_ids": list(item.prompt_token_ids)} for item in items]
        params = [
            SamplingParams(temperature=0, max_tokens=item.output_tokens, ignore_eos=True, detokenize=False)
            for item in items
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    yield generate


def imported() -> ModuleType:
    """What runs `transformers`, if that and PyTorch are installed."""
    try:
        return import_module("transformers_peer")
    except ImportError as error:
        raise Skipped(f"PyTorch and transformers are not both installed ({first_line(error)})") from error


@contextmanager
def start_generate(path: str, limits: Limits, tiny: bool) -> Iterator[Generate]:
    """`generate` over fixed batches: all of a decode's requests, or `MIXED_BATCH` of like lengths."""
    transformers_peer = imported()
    model = transformers_peer.load(path, dtype="float32" if tiny else "bfloat16", random_weights=True)

    def generate(items: Sequence[WorkItem]) -> int:
        equal = len({item.output_tokens for item in items}) == 1
        answers = transformers_peer.generate(model, items, len(items) if equal else MIXED_BATCH)
        return sum(map(len, answers))

    yield generate


@contextmanager
def start_continuous(path: str, limits: Limits, tiny: bool) -> Iterator[Generate]:
    """Its continuous batching, with what it chooses by itself."""
    transformers_peer = imported()
    import torch
    from transformers import GenerationConfig

    if not torch.cuda.is_available():
        raise Skipped("its continuous batching is made for GPUs")
    model = transformers_peer.load(path, dtype="bfloat16", random_weights=True)
    settings = GenerationConfig(do_sample=False, max_new_tokens=limits.max_model_len, eos_token_id=-1, pad_token_id=0)

    def answers(manager: Any, items: Sequence[WorkItem]) -> int:
        for item in items:
            manager.add_request(input_ids=list(item.prompt_token_ids), max_new_tokens=item.output_tokens)
        count = finished = 0
        while finished < len(items):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("its thread has ended")
            elif result.is_finished():
                finished += 1
                count += len(result.generated_tokens)
        return count

    with model.continuous_batching_context_manager(generation_config=settings, block=True, timeout=5) as manager:
        yield partial(answers, manager)


STARTS: dict[str, Callable[[str, Limits, bool], AbstractContextManager[Generate]]] = {
    "vllm": start_vllm,
    "transformers continuous": start_continuous,
    "transformers generate": start_generate,
}
