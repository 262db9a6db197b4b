"""Exact-match accuracy by task, on problems that the demo model's training never saw, through the engine's public API.

    python benchmarks/accuracy.py                          # the built-in model, 50 prompts a task
    python benchmarks/accuracy.py --model DIR --json out.json
    python benchmarks/accuracy.py --quantization int8      # as `EngineConfig` has it
    python benchmarks/accuracy.py --kv-cache-dtype int8 --calculate-kv-scales

Answers are generated greedily. The final answer must be the expected one to the letter; JSON and tool calls must have
the expected values; a story must be whole and mention what was asked (`models/demo/samples.py` holds the judges).
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

from jax_engine import LLM, SamplingParams
from jax_engine.config import QUANTIZATIONS
from jax_engine.frontend.processor import Prompt
from jax_engine.models.demo.generator import TASKS, held_out_samples, task_named
from jax_engine.models.demo.samples import Sample


@dataclass(frozen=True)
class TaskResult:
    """How one task went; `first_miss` is a wrong answer's last question and text, None where all are right."""

    task: str
    right: int
    asked: int
    first_miss: tuple[str, str] | None

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.right / self.asked


def measure(llm: LLM, samples: Sequence[Sample], *, max_tokens: int) -> list[TaskResult]:
    """Ask all `samples` in one batch and judge the answers; one result a task, in the samples' order."""
    prompts: list[Prompt] = [prompt_ids(llm, sample) for sample in samples]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    answers = [output.outputs[0].text for output in outputs]
    results = []
    for task in dict.fromkeys(sample.task for sample in samples):
        judged = [
            (sample.prompt[-1]["content"], answer, sample.check(answer))
            for sample, answer in zip(samples, answers, strict=True)
            if sample.task == task
        ]
        misses = [(question, answer) for question, answer, right in judged if not right]
        results.append(TaskResult(task, len(judged) - len(misses), len(judged), misses[0] if misses else None))
    return results


def prompt_ids(llm: LLM, sample: Sample) -> list[int]:
    """The conversation up to the answer, with its tools, as token ids. (`LLM.chat` takes one list of tools for all.)"""
    ids = llm.get_tokenizer().apply_chat_template(
        sample.prompt, tools=list(sample.tools) or None, add_generation_prompt=True, return_dict=False
    )
    return cast(list[int], ids)


def table(results: Sequence[TaskResult]) -> str:
    """One row a task and their mean, as Markdown."""
    lines = ["| task | right | asked | accuracy |", "| --- | --- | --- | --- |"]
    lines += [f"| {result.task} | {result.right} | {result.asked} | {result.accuracy:.1f}% |" for result in results]
    right, asked = sum(result.right for result in results), sum(result.asked for result in results)
    mean = fmean(result.accuracy for result in results)
    return "\n".join([*lines, f"| **mean of tasks** | {right} | {asked} | **{mean:.1f}%** |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; default: the built-in model")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="weights of projections in 8 bits")
    parser.add_argument("--num-prompts", type=int, default=50, help="prompts a task")
    parser.add_argument("--task", action="append", help="only this task; may be given several times")
    parser.add_argument("--max-tokens", type=int, default=192, help="longest answer, in tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the held-out prompts")
    parser.add_argument("--show-misses", action="store_true", help="print one wrong answer of each task")
    parser.add_argument("--kv-cache-dtype", default="auto", help="type of the KV cache")
    parser.add_argument("--calculate-kv-scales", action="store_true", help="measure what its numbers are scaled by")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    if options.num_prompts < 1:
        parser.error(f"--num-prompts is {options.num_prompts}; give at least 1")
    try:
        tasks = [task_named(name) for name in options.task] if options.task else TASKS
    except ValueError as error:
        parser.error(f"--task: {error}")
    samples = [
        sample for task in tasks for sample in held_out_samples(task, seed=options.seed, count=options.num_prompts)
    ]
    cache = {"kv_cache_dtype": options.kv_cache_dtype, "calculate_kv_scales": options.calculate_kv_scales}
    with LLM(options.model, quantization=options.quantization, **cache) as llm:
        results = measure(llm, samples, max_tokens=options.max_tokens)
    print(table(results))
    for result in results:
        if options.show_misses and result.first_miss:
            question, answer = result.first_miss
            print(f"\n{result.task}: {question!r}\n{answer}")
    if options.json:
        content = {"seed": options.seed, "tasks": [asdict(result) for result in results]}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
