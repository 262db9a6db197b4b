"""Speculative decoding: what it gains where answers are easy to guess, and costs where they are not.

    python benchmarks/speculative.py                       # the built-in model, one stream and eight
    python benchmarks/speculative.py --streams 1 --num-speculative-tokens 4 --json out.json
    python benchmarks/speculative.py --method draft_model --num-speculative-tokens 4

Two engines that differ in `speculative_config` alone take turns, request by request, so that a busy machine slows both.
Both must give the same tokens. Loads, all of the built-in model's tasks:

- `asked again`: short answers, each asked for a second time in the same conversation. The answer has been given before.
- `tool calls`: a call is to be made, with arguments that the prompt holds.
- `tasks`: questions of all tasks in turn.
- `drafts fail`: answers drawn at temperature 2, in which n-grams recur and nothing follows twice.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accuracy import prompt_ids
from jax_engine import LLM, SamplingParams, TokensPrompt
from jax_engine.models.demo.generator import TASKS, held_out_samples, task_named
from jax_engine.models.demo.samples import Sample
from jax_engine.server.bench.figures import format_table, write_json

REPEATED = ("small talk", "stories", "JSON", "facts", "word lists", "opposites", "month lengths")


@dataclass(frozen=True)
class Load:
    """Prompts, and how they are answered."""

    name: str
    prompts: Sequence[TokensPrompt]
    params: Sequence[SamplingParams]  # of each prompt


@dataclass(frozen=True)
class Result:
    """One load with one number of streams."""

    load: str
    streams: int
    plain_tokens_per_second: float  # medians over the rounds
    tokens_per_second: float
    gain: float  # the median of the rounds' ratios
    tokens_a_draft: float  # drafted, whenever a sequence had drafts in a step
    accepted: float  # share of drafted tokens
    accepted_by_position: Sequence[float]  # share of all drafts that were kept up to there


def main() -> None:
    options = parse_arguments()
    speculation = {"method": options.method, "num_speculative_tokens": options.num_speculative_tokens}
    if options.method == "ngram":
        lookup = {"prompt_lookup_max": options.prompt_lookup_max, "prompt_lookup_min": options.prompt_lookup_min}
        speculation |= lookup
    else:
        speculation["model"] = options.draft_model
    with ExitStack() as stack:
        plain, drafting = (
            stack.enter_context(
                LLM(
                    max_num_seqs=max(options.streams),
                    max_num_batched_tokens=options.max_num_batched_tokens,
                    compile_before_ready=True,
                    enable_prefix_caching=False,  # rounds repeat the same prompts
                    speculative_config=config,
                )
            )
            for config in (None, speculation)
        )
        loads = make_loads(plain, options.prompts)
        loads = [load for load in loads if not options.load or load.name in options.load]
        results = [
            measure(plain, drafting, load, streams, options.rounds) for load in loads for streams in options.streams
        ]
    header = [
        "load",
        "streams",
        "plain, tokens/s",
        "drafts, tokens/s",
        "gain",
        "drafted",
        "accepted",
        "by position",
    ]
    print(format_table(header, [[*list(asdict(result).values())[:-1], positions(result)] for result in results]))
    if options.json:
        write_json(options.json, {"results": [asdict(result) for result in results]})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--streams", nargs="+", default=(1, 8), help="requests at once (default: 1 8)", **number)
    parser.add_argument("--max-num-batched-tokens", default=256, help="default: %(default)s", **number)
    parser.add_argument("--load", action="append", metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--prompts", default=24, help="of each load (default: %(default)s)", **number)
    parser.add_argument("--rounds", default=3, help="over all prompts, after one to warm up", **number)
    parser.add_argument("--method", choices=("ngram", "draft_model"), default="ngram", help="default: %(default)s")
    parser.add_argument("--draft-model", default="demo-draft", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--num-speculative-tokens", default=7, help="default: %(default)s", **number)
    parser.add_argument("--prompt-lookup-max", default=4, help="default: %(default)s", **number)
    parser.add_argument("--prompt-lookup-min", default=2, help="default: %(default)s", **number)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


def positions(result: Result) -> str:
    return " ".join(f"{share:.2f}" for share in result.accepted_by_position)


def make_loads(llm: LLM, count: int) -> list[Load]:
    """Each of `count` prompts; the answers that come before a question that is asked again are the model's own."""
    greedy = [SamplingParams(temperature=0, max_tokens=160)] * count
    wild = [SamplingParams(temperature=2.0, max_tokens=96, seed=number, ignore_eos=True) for number in range(count)]
    repeated = samples_of(REPEATED, count)
    first = [prompt_ids(llm, sample) for sample in repeated]
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in first], greedy, use_tqdm=False)
    again = [
        TokensPrompt(prompt_token_ids=prompt_ids(llm, asked_again(sample, output.outputs[0].text)))
        for sample, output in zip(repeated, outputs, strict=True)
    ]
    calls = [TokensPrompt(prompt_token_ids=prompt_ids(llm, sample)) for sample in samples_of(("tool calls",), count)]
    mixed = samples_of([task.name for task in TASKS], count)
    return [
        Load("asked again", again, greedy),
        Load("tool calls", calls, greedy),
        Load("tasks", [TokensPrompt(prompt_token_ids=prompt_ids(llm, sample)) for sample in mixed], greedy),
        Load("drafts fail", [TokensPrompt(prompt_token_ids=ids) for ids in first], wild),
    ]


def asked_again(sample: Sample, answer: str) -> Sample:
    """The same question once more, after an answer to it."""
    question, reference = sample.prompt, sample.messages[-1]
    return replace(sample, messages=(*question, {"role": "assistant", "content": answer}, question[-1], reference))


def samples_of(tasks: Sequence[str], count: int) -> list[Sample]:
    """So many samples, of the tasks in turn."""
    each = [held_out_samples(task_named(task), seed=0, count=-(-count // len(tasks))) for task in tasks]
    return [sample for group in zip(*each, strict=True) for sample in group][:count]


def measure(plain: LLM, drafting: LLM, load: Load, streams: int, rounds: int) -> Result:
    """Take turns, `streams` prompts at a time."""
    rates: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        seconds, num_tokens = [0.0, 0.0], 0
        if number == 1:
            before = drafting.get_metrics()
        for start in range(0, len(load.prompts), streams):
            part = slice(start, start + streams)
            answers: dict[int, list[Sequence[int]]] = {}
            for index in (0, 1) if (number + start // streams) % 2 else (1, 0):
                began = time.perf_counter()
                outputs = (plain, drafting)[index].generate(load.prompts[part], load.params[part], use_tqdm=False)
                seconds[index] += time.perf_counter() - began
                answers[index] = [output.outputs[0].token_ids for output in outputs]
            if answers[0] != answers[1]:
                raise RuntimeError(f"{load.name}: the tokens differ with drafts")
            num_tokens += sum(map(len, answers[0]))
        if number:
            rates.append((num_tokens / seconds[0], num_tokens / seconds[1]))
    after = drafting.get_metrics()
    drafts = after.spec_drafts_total - before.spec_drafts_total
    drafted = after.spec_draft_tokens_total - before.spec_draft_tokens_total
    kept = [
        late - early
        for early, late in zip(
            before.spec_accepted_tokens_per_position_total, after.spec_accepted_tokens_per_position_total, strict=True
        )
    ]
    return Result(
        load.name,
        streams,
        plain_tokens_per_second=statistics.median(rate for rate, _ in rates),
        tokens_per_second=statistics.median(rate for _, rate in rates),
        gain=statistics.median(fast / slow for slow, fast in rates),
        tokens_a_draft=drafted / max(drafts, 1),
        accepted=sum(kept) / max(drafted, 1),
        accepted_by_position=[count / max(drafts, 1) for count in kept],
    )


if __name__ == "__main__":
    main()
