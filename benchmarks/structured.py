"""Structured output: whether every output has its form, and what it costs.

    python benchmarks/structured.py                           # speed on the built-in model, 1, 8 and 64 rows
    python benchmarks/structured.py --schemas 500             # that many random schemas instead, each one an output
    python benchmarks/structured.py --schemas 500 --load-format dummy --model FOLDER      # on random weights

Speed: requests held to a grammar and free ones take turns, round by round, in one engine, so that a busy machine slows
both. All generate the same number of tokens, past end of sequence: the grammar is of JSON objects without end, one a
line. Shares are of the rounds' own ratios, and so is the processor time with a grammar, in that without.

Schemas: each output must end by itself, parse, and be what `random_schemas.is_met` says its schema means. Those that
are not are shown, and the exit code is 1.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from jax_engine import LLM, SamplingParams, StructuredOutputsParams, TokensPrompt
from jax_engine.server.bench.figures import format_table, write_json
from random_schemas import is_met, random_schema

PROMPTS = ("Describe a person as JSON:", "What is the capital of France?", "List three colours.", "{")
ENDLESS = StructuredOutputsParams(
    grammar="""start: (object "\\n")+
object: %json {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": \
{"type": "array", "items": {"type": "string"}}}, "required": ["name", "age", "tags"], "additionalProperties": false}
"""
)


def main() -> None:
    options = parse_arguments()
    if options.schemas:
        sys.exit(0 if check_schemas(options) else 1)
    results = [measure(options, rows) for rows in options.rows]
    print(format_table(["rows", "free, tokens/s", "held to a grammar", "share", "processor time"], results))
    if options.json:
        write_json(options.json, {"results": results})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hugging Face name (default: the built-in model)")
    parser.add_argument("--load-format", default="auto", help="'dummy' takes random weights")
    parser.add_argument("--schemas", type=int, default=0, metavar="N", help="check N random schemas, and no speed")
    parser.add_argument("--seed", type=int, default=0, help="of the first schema (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="for the schemas (default: %(default)s)")
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--rows", default=(1, 8, 64), help="requests at once (default: 1 8 64)", **numbers)
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there too")
    return parser.parse_args()


def check_schemas(options: argparse.Namespace) -> bool:
    """Generate an output for each schema; whether all have the form that was asked for."""
    schemas = [random_schema(options.seed + number) for number in range(options.schemas)]
    params = [
        SamplingParams(
            temperature=options.temperature,
            max_tokens=None,
            seed=number,
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=number % 2 == 0),
        )
        for number, schema in enumerate(schemas)
    ]
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(options.schemas)]
    settings = {"max_num_seqs": 64, "max_num_batched_tokens": 64}  # few programs
    with LLM(options.model, load_format=options.load_format, **settings) as llm:
        start = time.perf_counter()
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        seconds = time.perf_counter() - start
    good = 0
    for output, schema in zip(outputs, schemas, strict=True):
        try:
            met = output.finish_reason == "stop" and is_met(json.loads(output.text), schema)
        except ValueError:
            met = False
        if not met:
            print(f"{output.finish_reason}: {output.text!r}\nis not of {json.dumps(schema)}")
        good += met
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{good} of {len(outputs)} outputs parse and have their form; {tokens} tokens, {seconds:.1f} s")
    return good == len(outputs)


def measure(options: argparse.Namespace, rows: int) -> list[float]:
    """Rows, tokens a second without and with a grammar, the median of their ratios, and that of the processor time that
    the whole process takes with a grammar to that without.
    """
    prompts = [TokensPrompt(prompt_token_ids=list(range(100 + row, 116 + row))) for row in range(rows)]
    limits: dict[str, Any] = {"temperature": 0, "max_tokens": options.output_tokens, "ignore_eos": True}
    free, held = SamplingParams(**limits), SamplingParams(**limits, structured_outputs=ENDLESS)
    settings = {"max_num_seqs": rows, "enable_prefix_caching": False, "compile_before_ready": True}
    with LLM(options.model, load_format=options.load_format, max_num_batched_tokens=16 + rows, **settings) as llm:

        def rate(params: SamplingParams) -> tuple[float, float]:
            began = time.process_time()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            spent = time.process_time() - began
            times = [output.metrics for output in outputs]
            assert all(len(output.outputs[0].token_ids) == options.output_tokens for output in outputs)
            begin = max(time.first_token_time for time in times if time and time.first_token_time)
            end = min(time.last_token_time for time in times if time and time.last_token_time)
            return rows * (options.output_tokens - 1) / (end - begin), spent

        for params in (free, held):
            rate(params)
        rounds = [(rate(free), rate(held)) for _ in range(options.rounds)]
    medians = [statistics.median(each[index][0] for each in rounds) for index in (0, 1)]
    share, spent = (statistics.median(held[index] / free[index] for free, held in rounds) for index in (0, 1))
    return [rows, *medians, share, spent]


if __name__ == "__main__":
    main()
